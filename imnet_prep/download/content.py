"""Is this answer an image, and a real one? The check itself is :func:`imnet_prep.validate.validate`, as elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import numpy as np

from imnet_prep import imaging
from imnet_prep.download.options import ContentOptions, FailReason
from imnet_prep.formats import sniff
from imnet_prep.types import ImageRef, RawImage, Reason, Sample
from imnet_prep.validate import ValidateOptions, validate

# Flickr answers a lost photograph with 302 to one of these: photo_unavailable.png, _l.png, _en-us.png, ...
# Source: ../shared/FACTS.md section 5.
_PLACEHOLDER_NAME = re.compile(r"photo_unavailable[^/]*", re.IGNORECASE)
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
_FAIL = {
    Reason.EMPTY: FailReason.NOT_AN_IMAGE,
    Reason.NOT_AN_IMAGE: FailReason.NOT_AN_IMAGE,
    Reason.TRUNCATED: FailReason.TRUNCATED,
    Reason.CORRUPT: FailReason.NOT_AN_IMAGE,
    Reason.ANIMATED: FailReason.NOT_AN_IMAGE,
    Reason.TOO_MANY_PIXELS: FailReason.TOO_LARGE,
    Reason.TOO_LARGE: FailReason.TOO_LARGE,
}
_MAYBE_FLAT_BYTES_PER_PIXEL = 0.12  # of coded data; photographs lie above, and a second look costs a decode
_ONE_COLOUR_RANGE = 8  # largest spread of any channel, of 255: what JPEG's rounding leaves of one colour
_FLAT_SHARE = 0.4  # of the pixels in one of 4,096 colours: a sign or an icon
_MAX_STORED = 1 << 30  # the byte cap of the fetch rules here


@dataclass(frozen=True, slots=True)
class Image:
    """An image that passed.

    Attributes:
        ext: Extension of the stored bytes' real format.
        data: What to store. reencoded: Whether that differs from what came.
        sha256: Digest of what came. stored_sha256: Digest of ``data``.
        width, height: Of ``data``, in pixels.
        flat: A picture with one dominant colour, such as a sign.
    """

    ext: str
    data: bytes
    reencoded: bool
    sha256: bytes
    stored_sha256: bytes
    width: int
    height: int
    flat: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer that is no image to keep."""

    reason: FailReason
    detail: str


def is_placeholder_url(url: str) -> bool:
    """Say whether a URL is a host's stand-in for a lost photograph, by its file name."""
    if "%" not in url and "unavailable" not in url.lower():  # the common case, without taking the URL apart
        return False
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    return bool(_PLACEHOLDER_NAME.fullmatch(name))


def judge(data: bytes, options: ContentOptions) -> Image | Refused:
    """Read every compressed bit of an answer and say what it is.

    Args:
        data: The whole body, decompressed.
        options: Limits and storage.
    """
    checks = ValidateOptions(short_side=options.short_side, quality=options.quality, max_bytes=_MAX_STORED)
    raw = RawImage(ImageRef("train", "", "download", "", 0, len(data)), data)
    sample = validate(raw, checks)
    if not isinstance(sample, Sample):
        return Refused(_FAIL.get(sample.reason, FailReason.NOT_AN_IMAGE), sample.detail)
    if min(sample.width, sample.height) < options.min_side:
        return Refused(FailReason.PLACEHOLDER, f"tiny: {sample.width} x {sample.height} pixels")
    kind = sniff(data)
    flat = False
    if _may_be_flat(sample):
        one_colour, flat = _colours(sample)
        if one_colour:
            return Refused(FailReason.PLACEHOLDER, "an image of one colour")
    keeps = options.short_side is None
    source = bytes.fromhex(sample.source_sha256)
    return Image(
        ext=_EXTENSION[kind] if keeps else "jpg",
        data=data if keeps else sample.image,
        reencoded=not keeps and sample.image is not data,
        sha256=source,
        stored_sha256=source if keeps else bytes.fromhex(sample.sha256),
        width=sample.width,
        height=sample.height,
        flat=flat,
    )


def _may_be_flat(sample: Sample) -> bool:
    """Tell from sizes alone whether a look at the colours is due: a flat JPEG has hardly any coded data."""
    coded = len(sample.image) - max(0, sample.image.find(b"\xff\xda"))
    return coded < _MAYBE_FLAT_BYTES_PER_PIXEL * sample.width * sample.height


def _colours(sample: Sample) -> tuple[bool, bool]:
    """Say whether an image has one colour, and whether one colour dominates it."""
    pixels, _ = imaging.decode_jpeg(sample.image, reduce=8)
    if pixels is None:
        return False, False
    by_pixel = pixels.reshape(-1, 3)
    spread = int((by_pixel.max(axis=0).astype(int) - by_pixel.min(axis=0)).max())
    codes = (by_pixel >> 4).astype(np.int64) @ np.array([256, 16, 1])
    share = np.bincount(codes).max() / len(codes)
    return spread <= _ONE_COLOUR_RANGE, bool(share >= _FLAT_SHARE)
