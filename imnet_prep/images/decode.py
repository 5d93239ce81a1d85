"""Decode images for storage: every complaint of a decoder is read, and none is printed."""

import io
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imnet_prep.images.formats import check_container, refuse_bomb
from imnet_prep.images.jpeg import jpeg_size, reporting
from imnet_prep.images.native import clean_end, decode_whole
from imnet_prep.images.stderr import captured_stderr, process_lock
from imnet_prep.images.tiff import ORIENTATION
from imnet_prep.types import Change, ImageFault, Reason

Pixels = NDArray[np.uint8]  # (H, W) grey or (H, W, 3) BGR, OpenCV's order
_FILE_BUFFER = 4096  # bytes that libjpeg reads of a file at once (INPUT_BUF_SIZE in jdatasrc.c)
_REPORTED = 448  # bytes before a buffer's end: an MCU that begins there is decoded slowly (BUFSIZE in jdhuff.c is 512)
_BAND_PIXELS = 1 << 20
# Everything that Pillow's plugins raise on damaged files; each is the image's fault, not ours.
PILLOW_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    MemoryError,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_jpeg(data: bytes, *, grey: bool = False, reduce: int = 1) -> tuple[Pixels | None, str]:
    """Decode a JPEG, EXIF orientation not applied; the whole entropy-coded stream is read at every scale.

    Args:
        data: A file that :func:`imnet_prep.images.jpeg.read_markers` accepted.
        grey: One channel instead of BGR.
        reduce: Divide both sides by 1, 2, 4 or 8 in the DCT domain.

    Returns:
        The pixels, or None where the decoder gave up; and the decoder's first complaint, or an empty string.
    """
    if (decoded := _decode_natively(data, grey=grey, reduce=reduce)) is not None:
        return decoded
    flag = getattr(cv2, f"IMREAD_REDUCED_{'GRAYSCALE' if grey else 'COLOR'}_{reduce}") if reduce > 1 else int(not grey)
    copy = reporting(data)
    pixels, said = _heard(cv2.imdecode, np.frombuffer(copy or data, np.uint8), flag)
    if copy is None and not clean_end(data):
        said = _said_of_files(data, said)
    return pixels, said


def decode_quietly(data: bytes) -> Pixels | None:
    """Decode an image to BGR, uint8 (H, W, 3), ignoring its orientation tag; return None if it does not decode."""
    decoded = _decode_natively(data, grey=False, reduce=1)
    return (decoded or _heard(cv2.imdecode, np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))[0]


def _decode_natively(data: bytes, *, grey: bool, reduce: int) -> tuple[Pixels | None, str] | None:
    """Decode a JPEG with the C++ library, where that gives OpenCV's pixels; None where it cannot tell."""
    size = jpeg_size(data)
    return decode_whole(data, grey=grey, reduce=reduce, size=size) if size else None


def _heard(decode: Callable[[Any, int], Any], source: object, flag: int) -> tuple[Pixels | None, str]:
    with captured_stderr() as heard:
        try:
            pixels = decode(source, flag | cv2.IMREAD_IGNORE_ORIENTATION)
        except (cv2.error, MemoryError):
            pixels = None
    return pixels, "\n".join(heard)


def _said_of_files(data: bytes, said: str) -> str:
    """Return what libjpeg says of a JPEG that no restart interval makes it report, or ``said`` where that is all.

    libjpeg-turbo decodes an MCU slowly, and reports, where it begins near the end of the input buffer. The buffer of a
    file is small, so comments of different lengths at the front bring each MCU near the end of one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.jpg")
        for shift in range(0, _FILE_BUFFER, _REPORTED):
            comment = b"\xff\xfe" + (shift - 2).to_bytes(2, "big") + bytes(shift - 4) if shift else b""
            path.write_bytes(data[:2] + comment + data[2:])
            _, heard = _heard(cv2.imread, str(path), cv2.IMREAD_REDUCED_GRAYSCALE_8)
            if heard != said:
                return heard
    return said


def decode_cmyk_jpeg(data: bytes) -> Pixels:
    """Decode a CMYK or YCCK JPEG to BGR: each of R, G, B is its ink's complement times black's, no ICC profile used.

    The samples are taken as inverted, as Adobe's programs write them with and without their marker.

    Raises:
        ImageFault: It does not decode.
    """
    with opened(data, "JPEG") as image:
        return bgr(image)


@contextmanager
def opened(data: bytes, kind: str) -> Iterator[Image.Image]:
    """Open with Pillow, and turn its exceptions into an :class:`ImageFault`; nothing is printed."""
    # Pillow keeps every library silent but libtiff.
    with captured_stderr() if kind == "TIFF" else process_lock(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                yield image
        except Image.DecompressionBombError as exc:
            raise ImageFault(Reason.TOO_MANY_PIXELS, str(exc)) from exc
        except PILLOW_FAULTS as exc:
            reason = Reason.TRUNCATED if "truncated" in str(exc).lower() else Reason.CORRUPT
            said = " ".join(str(exc).partition("<_io.BytesIO")[0].split())  # where it lies differs from run to run
            raise ImageFault(reason, f"{kind}: {said or type(exc).__name__}") from exc


def decode_other(data: bytes, kind: str, max_pixels: int) -> tuple[Pixels, list[Change]]:
    """Decode PNG, GIF, WebP, BMP or TIFF to 8-bit BGR, upright, transparency over white.

    Args:
        data: The file's bytes.
        kind: Pillow's name of the format.
        max_pixels: Refuse more pixels than these before anything is decoded.

    Returns:
        The pixels, and what was noticed or changed.

    Raises:
        ImageFault: It is not whole, does not decode, has more frames than one, or more pixels than allowed.
    """
    deep = check_container(data, kind)
    with opened(data, kind) as image:
        refuse_bomb(*image.size, max_pixels)
        with suppress(EOFError):
            image.seek(1)
            raise ImageFault(Reason.ANIMATED, f"{kind} with more than one frame")
        orientation, damaged = _orientation(image)
        image.load()
        seen = {
            Change.ORIENTED: orientation != 1,
            Change.EXIF_DAMAGED: damaged,
            Change.CMYK: image.mode == "CMYK",
            Change.SIXTEEN_BIT: deep or image.mode.startswith("I"),
            Change.ALPHA: image.has_transparency_data,
        }
        upright: Image.Image = image
        if orientation != 1 and _orientation(image)[0] != 1:  # Pillow turns a TIFF by itself while loading
            upright = ImageOps.exif_transpose(upright)
        over_white = image.has_transparency_data
        pixels = bgr(upright if over_white else _eight_bit(upright, deep=deep), over_white=over_white)
        return pixels, [change for change, is_so in seen.items() if is_so]


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """Return the orientation, 1 to 8, and whether the EXIF block is damaged."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except PILLOW_FAULTS:
        return 1, True
    known = isinstance(value, int) and 0 <= value <= 8
    return (value if known and value else 1), not known


def _eight_bit(image: Image.Image, *, deep: bool) -> Image.Image:
    """Reduce 16-bit grey to its high byte, as Pillow does with 16-bit colour."""
    if image.mode.startswith("I;16") or (image.mode == "I" and deep):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageFault(Reason.CORRUPT, "32-bit samples: their range is not defined")
    return image


def bgr(image: Image.Image, *, over_white: bool = False) -> Pixels:
    """Return Pillow's image as pixels, uint8 (H, W, 3); ``over_white`` composes its transparency over white."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND_PIXELS // width)  # at a time, or a large image would be held five times
    for top in range(0, height, rows):
        band = image if rows >= height else image.crop((0, top, width, min(height, top + rows)))
        if over_white:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        pixels[top : top + rows] = np.asarray(band.convert("RGB"))[:, :, ::-1]
    return pixels
