"""Decode, convert, shrink and encode: the pixels behind :mod:`imnet_prep.images.check`.

OpenCV decodes JPEG, because its libjpeg says on stderr what it had to make up ("premature end of data segment"), and
Pillow's says nothing. stderr is captured around each call, so nothing is printed and the complaint is read.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imnet_prep.images.jpeg import ImageFault, reporting
from imnet_prep.images.native.scan import clean_end
from imnet_prep.types import Change, Reason

Pixels = NDArray[np.uint8]  # (H, W) grey or (H, W, 3) BGR, OpenCV's order
MAX_JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_FILE_BUFFER = 4096  # bytes that libjpeg reads of a file at once (INPUT_BUF_SIZE in jdatasrc.c)
_REPORTED = 448  # bytes before a buffer's end: an MCU that begins there is decoded slowly (BUFSIZE in jdhuff.c is 512)
_ORIENTATION_TAG = 0x0112
# Everything that Pillow's plugins let out on damaged files; each is the image's fault, not ours.
_PILLOW_FAULTS = (
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


@dataclass(slots=True)
class _Heard:
    text: str = ""


@dataclass(slots=True)
class _Ear:
    """The file that stands in for stderr, one a process: a forked child must not share its offset."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    pid: int = -1
    fd: int = -1

    def open(self) -> int:
        if self.pid != os.getpid():
            if hasattr(os, "memfd_create"):
                self.fd = os.memfd_create("imnet-prep-stderr")
            else:
                with tempfile.TemporaryFile() as file:
                    self.fd = os.dup(file.fileno())
            self.pid = os.getpid()
        return self.fd


_EAR = _Ear()
os.register_at_fork(after_in_child=lambda: setattr(_EAR, "lock", threading.Lock()))


@contextlib.contextmanager
def captured_stderr() -> Iterator[_Heard]:
    """Take what C libraries write to file descriptor 2 meanwhile; its ``text`` is filled on the way out."""
    heard = _Heard()
    with _EAR.lock:
        ear = _EAR.open()
        try:
            saved = os.dup(2)
        except OSError:  # a daemon without stderr
            saved = -1
        os.dup2(ear, 2)
        try:
            yield heard
        finally:
            if saved >= 0:
                os.dup2(saved, 2)
                os.close(saved)
            else:
                os.close(2)
            if size := os.lseek(ear, 0, os.SEEK_CUR):
                heard.text = os.pread(ear, min(size, 1 << 16), 0).decode("utf-8", "replace").strip()
                os.lseek(ear, 0, os.SEEK_SET)
                os.ftruncate(ear, 0)


def decode_jpeg(data: bytes, *, grey: bool = False, reduce: int = 1) -> tuple[Pixels | None, str]:
    """Decode a JPEG, EXIF orientation not applied; the whole entropy-coded stream is read at every scale.

    Args:
        data: A file that :func:`imnet_prep.images.jpeg.read_markers` accepted.
        grey: One channel instead of BGR.
        reduce: Divide both sides by 1, 2, 4 or 8 in the DCT domain.

    Returns:
        The pixels, or None where the decoder gave up; and the decoder's first complaint, or an empty string.
    """
    flag = getattr(cv2, f"IMREAD_REDUCED_{'GRAYSCALE' if grey else 'COLOR'}_{reduce}") if reduce > 1 else int(not grey)
    copy = reporting(data)
    pixels, said = _heard(cv2.imdecode, np.frombuffer(copy or data, np.uint8), flag)
    if copy is None and not clean_end(data):
        said = _said_of_files(data, said)
    return pixels, said


def _heard(decode: Callable[[Any, int], Any], source: object, flag: int) -> tuple[Pixels | None, str]:
    with captured_stderr() as heard:
        try:
            pixels = decode(source, flag | cv2.IMREAD_IGNORE_ORIENTATION)
        except (cv2.error, MemoryError):
            pixels = None
    return pixels, heard.text


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
        image.load()
        return bgr(image.convert("RGB"))


@contextlib.contextmanager
def opened(data: bytes, kind: str) -> Iterator[Image.Image]:
    """Open with Pillow, whatever it says or raises kept in: its warnings, libtiff's stderr, its many exceptions."""
    with captured_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                yield image
        except Image.DecompressionBombError as exc:
            raise ImageFault(Reason.TOO_MANY_PIXELS, str(exc)) from exc
        except _PILLOW_FAULTS as exc:
            reason = Reason.TRUNCATED if "truncated" in str(exc).lower() else Reason.CORRUPT
            said = " ".join(str(exc).partition("<_io.BytesIO")[0].split())  # where it lies differs from run to run
            raise ImageFault(reason, f"{kind}: {said or type(exc).__name__}") from exc


def decode_other(data: bytes, kind: str, *, deep: bool, max_pixels: int) -> tuple[Pixels, list[Change]]:
    """Decode PNG, GIF, WebP, BMP or TIFF to 8-bit BGR, upright, transparency over white.

    Args:
        data: The file's bytes.
        kind: Pillow's name of the format.
        deep: The header says 16 bits a sample.
        max_pixels: More than these are refused before anything is decoded.

    Raises:
        ImageFault: It does not decode, has more frames than one, or more pixels than allowed.
    """
    with opened(data, kind) as image:
        refuse_bomb(*image.size, max_pixels)
        if _has_second_frame(image):
            raise ImageFault(Reason.ANIMATED, f"{kind} with more than one frame")
        orientation, damaged = _orientation(image)
        image.load()
        seen = (
            (Change.ORIENTED, orientation != 1),
            (Change.EXIF_DAMAGED, damaged),
            (Change.CMYK, image.mode == "CMYK"),
            (Change.SIXTEEN_BIT, deep or image.mode.startswith("I")),
            (Change.ALPHA, image.has_transparency_data),
        )
        upright: Image.Image = image
        if orientation != 1 and _orientation(image)[0] != 1:  # Pillow turns a TIFF by itself while loading
            upright = ImageOps.exif_transpose(upright)
        if image.has_transparency_data:
            over = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
        return bgr(_eight_bit(upright, deep=deep)), [change for change, is_so in seen if is_so]


def _has_second_frame(image: Image.Image) -> bool:
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _orientation(image: Image.Image) -> tuple[int, bool]:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_FAULTS:
        return 1, True
    known = isinstance(value, int) and 0 <= value <= 8
    return (value if known and value else 1), not known


def _eight_bit(image: Image.Image, *, deep: bool) -> Image.Image:
    """Bring 16-bit grey to 8 by its high byte, as Pillow does with 16-bit colour."""
    if image.mode.startswith("I;16") or (image.mode == "I" and deep):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageFault(Reason.CORRUPT, "32-bit samples: their range is not defined")
    return image


def bgr(image: Image.Image) -> Pixels:
    """Return Pillow's image as pixels, uint8 (H, W, 3)."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def grey(pixels: Pixels) -> Pixels:
    """Bring BGR to grey, uint8 (H, W); grey stays."""
    if pixels.ndim == 2:
        return pixels
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY), dtype=np.uint8)


def refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    """Raise an :class:`ImageFault` for more pixels than ``max_pixels``, or than a JPEG can hold a side."""
    if width * height > max_pixels:
        raise ImageFault(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels, at most {max_pixels} are allowed")
    if max(width, height) > MAX_JPEG_SIDE:
        raise ImageFault(
            Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels, a JPEG holds at most {MAX_JPEG_SIDE} a side"
        )


def orient(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror pixels upright. Source: EXIF 2.32, tag 0x0112."""
    if orientation >= 5:
        pixels = cv2.transpose(pixels)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)


def shrink(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resize down to ``width`` x ``height``: Pillow's antialiased bilinear filter.

    It works in integers, so the result is the same on every CPU. :mod:`~.native.decode_shrunk` does the same faster.
    """
    image = Image.fromarray(pixels)  # to Pillow BGR is RGB: all channels are treated alike
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def encode_jpeg(pixels: Pixels, quality: int, *, halve_chroma: bool) -> bytes:
    """Encode a baseline JPEG with no metadata: grey as one component, else YCbCr 4:2:0 or 4:4:4."""
    sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420 if halve_chroma else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    done, out = cv2.imencode(".jpg", pixels, options)
    if not done:
        raise ImageFault(Reason.CORRUPT, "cannot be encoded as a JPEG")
    return bytes(out)
