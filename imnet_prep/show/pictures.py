"""Make the small pictures of pages."""

import base64
from contextlib import suppress
from dataclasses import dataclass

import cv2

from imnet_prep.errors import RecordsError
from imnet_prep.images.decode import decode_quietly
from imnet_prep.images.encode import shrink_to_fit
from imnet_prep.records.folder import Row

_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 70, cv2.IMWRITE_JPEG_OPTIMIZE, 1)


@dataclass(frozen=True, slots=True)
class Picture:
    """A small picture on a page.

    Attributes:
        alt: Its text alternative, shown in its place if there is no picture.
        caption: The text under it; may be empty.
        jpeg: A JPEG in base64; empty if there is no picture.
    """

    alt: str
    caption: str = ""
    jpeg: str = ""


def picture_of(row: Row, alt: str, caption: str = "", side: int = 96) -> Picture:
    """Return a record as a picture of at most ``side`` pixels; without one if it cannot be read or decoded."""
    with suppress(RecordsError):
        if jpeg := thumbnail(row.image, side):
            return Picture(alt, caption, base64.b64encode(jpeg).decode())
    return Picture(alt, f"{caption or alt}: does not decode")


def thumbnail(image: bytes, side: int) -> bytes:
    """Return an image as a JPEG of at most ``side`` pixels; empty if it does not decode."""
    pixels = decode_quietly(image)
    if pixels is None:
        return b""
    return bytes(cv2.imencode(".jpg", shrink_to_fit(pixels, side), _JPEG)[1])
