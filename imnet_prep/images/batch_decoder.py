"""Decode batches for the loader: many images a call, cropped, resized and flipped into one array.

:class:`PortableDecoder` (OpenCV and Pillow) defines the result; :class:`NativeDecoder` (C++) stays within a stated
tolerance of it. Both release the GIL.
"""

import ctypes
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.errors import PipelineError
from imnet_prep.images.decode import PILLOW_FAULTS
from imnet_prep.images.formats import MAX_PIXELS, refuse_bomb
from imnet_prep.images.jpeg import jpeg_size
from imnet_prep.images.native import MESSAGE_BYTES, decoder_status, function
from imnet_prep.types import ImageFault, Reason

SOI = b"\xff\xd8"  # how a JPEG begins
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
INTERPOLATIONS = tuple(_FILTERS)  # Pillow's filters, antialiased when reducing
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # stored pixels are upright; the tag is not looked at
Faults = dict[int, str]  # by row of the call: why it does not decode


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

    def of(self, rows: NDArray[np.int64] | slice) -> "Geometry":
        """Return the geometry of some of the images."""
        return Geometry(self.sizes[rows], self.limits[rows], self.box[rows], self.flip[rows])


def image_size(data: bytes) -> tuple[int, int]:
    """Read width and height from the header of an image of any format that Pillow knows.

    Raises:
        ImageFault: It is no image, or has more pixels than conversion takes.
    """
    size = jpeg_size(data)
    if size is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the limit below is ours
                with Image.open(io.BytesIO(data)) as picture:
                    size = picture.size
        except PILLOW_FAULTS as error:
            raise ImageFault(Reason.NOT_AN_IMAGE, f"no image header: {error}") from error
    refuse_bomb(*size, MAX_PIXELS)
    return size


class PortableDecoder:
    """Bytes to pixels, many images a call; safe to share between threads. This one is OpenCV and Pillow."""

    name = "portable (OpenCV decode, Pillow resize)"

    def sizes(self, images: Sequence[bytes]) -> tuple[NDArray[np.int32], Faults]:
        """Read widths and heights, int32 (N, 2), from the headers; zeros where a fault is reported."""
        found = np.zeros((len(images), 2), dtype=np.int32)
        faults: Faults = {}
        for number, data in enumerate(images):
            try:
                found[number] = image_size(data)
            except ImageFault as fault:
                faults[number] = fault.detail
        return found, faults

    def decode(self, images: Sequence[bytes], geometry: Geometry, interpolation: str, out: NDArray[np.uint8]) -> Faults:
        """Decode into ``out``, uint8 (N, S, S, 3) RGB; rows with a fault are left undefined.

        An image whose header gives another size than ``geometry.sizes`` is a fault, before memory is taken for it.
        """
        faults: Faults = {}
        for number, data in enumerate(images):
            try:
                out[number] = _square(data, geometry.of(slice(number, number + 1)), interpolation, out.shape[1])
            except (ImageFault, ValueError, cv2.error) as error:
                faults[number] = " ".join(str(error).split())
        return faults


def _square(data: bytes, geometry: Geometry, interpolation: str, size: int) -> NDArray[np.uint8]:
    (wide, tall), listed = image_size(data), geometry.sizes[0].tolist()
    if [wide, tall] != listed:
        raise ImageFault(Reason.CORRUPT, f"{wide} x {tall} by its header, {listed[0]} x {listed[1]} by the record list")
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _FLAGS)
    if pixels is None:
        raise ImageFault(Reason.CORRUPT, "does not decode: truncated, or no image")
    left, top, right, bottom = geometry.limits[0].tolist()
    if right > pixels.shape[1] or bottom > pixels.shape[0]:
        raise ImageFault(Reason.CORRUPT, f"decodes to {pixels.shape[1]} x {pixels.shape[0]}, not as its header says")
    box = geometry.box[0] - (left, top, left, top)
    square = resize(pixels[top:bottom, left:right], tuple(box.tolist()), interpolation, size)
    return square[:, ::-1] if geometry.flip[0] else square


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


_REDUCE, _FAST = 1, 2  # flags
_FAULT, _NOT_TAKEN = 1, 2  # status


class NativeDecoder(PortableDecoder):
    """The C++ decoder. What it does not take (other formats, CMYK), the portable one decodes.

    Args:
        reduce: Halve large images in the DCT domain before they are resized.
        fast: Read the entropy-coded data with our own decoder where it can; the pixels are the same.

    Raises:
        PipelineError: It is not built, or does not load.
    """

    def __init__(self, *, reduce: bool = True, fast: bool = True) -> None:
        built, text = decoder_status()
        decode = function("imnet_decode_batch")
        if not built or decode is None:
            raise PipelineError(text, remedy="or use the portable decoder")
        self._decode = decode
        self._flags = _REDUCE * reduce + _FAST * fast
        self.name = f"native ({text})"

    def decode(self, images: Sequence[bytes], geometry: Geometry, interpolation: str, out: NDArray[np.uint8]) -> Faults:
        """See :meth:`PortableDecoder.decode`."""
        count = len(images)
        assert out.flags.c_contiguous
        assert out.shape == (count, out.shape[1], out.shape[1], 3)
        given = (
            np.array([len(image) for image in images], dtype=np.uintp),
            np.ascontiguousarray(geometry.sizes, dtype=np.int32),
            np.ascontiguousarray(geometry.limits, dtype=np.int32),
            np.ascontiguousarray(geometry.box, dtype=np.float64),
            np.ascontiguousarray(geometry.flip, dtype=np.uint8),
        )
        status, messages = np.zeros(count, dtype=np.int32), np.zeros(count, dtype=f"S{MESSAGE_BYTES}")
        bad = self._decode(
            count,
            (ctypes.c_char_p * count)(*images),
            *(array.ctypes.data for array in given),
            INTERPOLATIONS.index(interpolation),
            out.shape[1],
            self._flags,
            *(array.ctypes.data for array in (out, status, messages)),
        )
        assert bad >= 0, "the geometry lies outside the image"
        faults = {
            row: messages[row].split(b"\0", 1)[0].decode("utf-8", "replace")
            for row in np.flatnonzero(status == _FAULT).tolist()
        }
        others = np.flatnonzero(status == _NOT_TAKEN)
        if len(others):
            pixels = out[others]
            found = super().decode([images[row] for row in others], geometry.of(others), interpolation, pixels)
            faults |= {int(others[number]): why for number, why in found.items()}
            out[others] = pixels
        return faults
