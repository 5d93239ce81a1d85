"""The portable decoder: OpenCV decodes, Pillow resizes; both leave the GIL. What it makes is the definition.

The C++ decoder (:mod:`imnet_prep.images.native`) has the same methods and stays within a stated tolerance of this one.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

SOI = b"\xff\xd8"  # how a JPEG begins
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, a quarter of 2**32 / 6
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
INTERPOLATIONS = tuple(_FILTERS)  # Pillow's filters, antialiased when reducing
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # stored pixels are upright; the tag is not looked at
_FRAME_MARKERS = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
Fault = tuple[int, str]
"""A row's position in the call and one line that says why it does not decode."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the output square comes from in each image.

    Attributes:
        sizes: int32 (N, 2): width and height of the images that it was made for; decoders refuse others.
        limits: int32 (N, 4): left, top, right, bottom of the pixels that may be looked at.
        box: float64 (N, 4): the rectangle that becomes the square, inside ``limits``.
        flip: bool (N,): mirrored left to right.
    """

    sizes: NDArray[np.int32]
    limits: NDArray[np.int32]
    box: NDArray[np.float64]
    flip: NDArray[np.bool_]

    def of(self, rows: NDArray[np.int64] | slice) -> Geometry:
        """Return the geometry of some of the images."""
        return Geometry(self.sizes[rows], self.limits[rows], self.box[rows], self.flip[rows])


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read width and height from a JPEG's frame header; None where there is none.

    Source: ITU-T T.81, annex B.
    """
    position = 2 if data.startswith(SOI) else len(data)
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return (width, height) if width and height else None
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            position += 2
        else:
            length = struct.unpack_from(">H", data, position + 2)[0]
            if length < 2 or marker in (0xD9, 0xDA):
                break
            position += 2 + length
    return None


def image_size(data: bytes) -> tuple[int, int]:
    """Read width and height from the header of an image of any format that Pillow knows.

    Raises:
        ValueError: It is no image, or has more than :data:`MAX_PIXELS` pixels.
    """
    size = jpeg_size(data)
    if size is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the limit below is ours
                with Image.open(io.BytesIO(data)) as picture:
                    size = picture.size
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"no image header: {error}") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels, more than the {MAX_PIXELS} allowed")
    return size


class PortableDecoder:
    """Bytes to pixels, many images a call; safe to share between threads. This one is OpenCV and Pillow."""

    name = "portable (OpenCV decode, Pillow resize)"

    def sizes(self, images: Sequence[bytes]) -> tuple[NDArray[np.int32], list[Fault]]:
        """Read widths and heights, int32 (N, 2), from the headers; zeros where a fault is reported."""
        found = np.zeros((len(images), 2), dtype=np.int32)
        faults: list[Fault] = []
        for number, data in enumerate(images):
            try:
                found[number] = image_size(data)
            except ValueError as error:
                faults.append((number, str(error)))
        return found, faults

    def decode(
        self, images: Sequence[bytes], geometry: Geometry, interpolation: str, out: NDArray[np.uint8]
    ) -> list[Fault]:
        """Decode into ``out``, uint8 (N, S, S, 3) RGB; rows with a fault are left undefined.

        An image whose header gives another size than ``geometry.sizes`` is a fault, before memory is taken for it.
        """
        faults: list[Fault] = []
        for number, data in enumerate(images):
            try:
                (wide, tall), listed = image_size(data), geometry.sizes[number].tolist()
                if [wide, tall] != listed:
                    raise ValueError(f"{wide} x {tall} by its header, {listed[0]} x {listed[1]} by the record list")
                pixels = decode_rgb(data)
                left, top, right, bottom = geometry.limits[number].tolist()
                if right > pixels.shape[1] or bottom > pixels.shape[0]:
                    raise ValueError(f"decodes to {pixels.shape[1]} x {pixels.shape[0]}, not as its header says")
                box = geometry.box[number] - (left, top, left, top)
                square = resize(pixels[top:bottom, left:right], tuple(box.tolist()), interpolation, out.shape[1])
                out[number] = square[:, ::-1] if geometry.flip[number] else square
            except (ValueError, cv2.error) as error:
                faults.append((number, " ".join(str(error).split())))
        return faults


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """Decode an image to uint8 (H, W, 3) RGB, whatever its orientation tag says.

    Raises:
        ValueError: It does not decode.
    """
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _FLAGS) if data else None
    if pixels is None:
        raise ValueError("does not decode: truncated, or no image")
    return np.asarray(pixels, dtype=np.uint8)


def resize(pixels: NDArray[np.uint8], box: tuple[float, ...], interpolation: str, size: int) -> NDArray[np.uint8]:
    """Resize a rectangle to a square with Pillow's antialiased filters.

    Args:
        pixels: uint8 (H, W, 3).
        box: Left, top, right, bottom in pixels, fractions allowed.
        interpolation: See :data:`INTERPOLATIONS`.
        size: Side of the square, pixels.

    Returns:
        uint8 (size, size, 3).
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize((size, size), _FILTERS[interpolation], box=(box[0], box[1], box[2], box[3])))
