"""The C++ library: reads, checks, decodes and shrinks JPEGs. It is optional, and its parts are.

Scanning is always part of it; decoding needs libjpeg-turbo's headers, and shrinking its ``jpegint.h`` as well. What the
library finds in doubt is left to OpenCV and Pillow, so the results are the same without it.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARY = Path(__file__).with_name("imnet_native.so")
_ABI = 4  # kAbi in api.h
MESSAGE_BYTES = 256  # kMessageBytes in api.h
_LANES = 4  # kLanes in scan.cc
_POINTER, _INT, _SIZE, _BYTES = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {  # result and arguments of each function; see the C++ source
    "imnet_abi": (_INT, []),
    "imnet_clean_end": (_SIZE, [_BYTES, _SIZE, _INT]),
    "imnet_decoder": (_BYTES, []),
    "imnet_decode_whole": (_INT, [_BYTES, _SIZE, *[_INT] * 4, _POINTER, _POINTER]),
    "imnet_decode_batch": (_INT, [_INT, *[_POINTER] * 6, *[_INT] * 3, *[_POINTER] * 3]),
    "imnet_decode_shrunk": (_SIZE, [_BYTES, _SIZE, *[_INT] * 6, _POINTER]),
}


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Load the library once.

    Returns:
        The library, or None and why it cannot be used.
    """
    if not LIBRARY.is_file():
        return None, "the C++ decoder is not built: install libjpeg-turbo's headers and a compiler, then this package"
    # Our library's libjpeg goes before any other copy in the process (MindSpore and OpenCV bring their own).
    try:
        library = ctypes.CDLL(str(LIBRARY), mode=ctypes.DEFAULT_MODE | getattr(os, "RTLD_DEEPBIND", 0))
    except OSError as error:
        return None, f"the C++ decoder does not load: {error}"
    if not hasattr(library, "imnet_abi") or library.imnet_abi() != _ABI:
        return None, "the C++ decoder was built for another version of this package: install it again"
    return library, ""


@cache
def function(name: str) -> Callable[..., Any] | None:
    """Return a function of the library; None where it, or the part of it with that function, is not built."""
    found: Callable[..., Any] | None = getattr(load()[0], name, None)
    if found is not None:
        found.restype, found.argtypes = _SIGNATURES[name]  # type: ignore[attr-defined]
    return found


def decoder_status() -> tuple[bool, str]:
    """Tell whether the batch decoder is built, and what it is built on; or why it cannot be used."""
    describe = function("imnet_decoder")
    if describe is not None:
        return True, describe().decode()
    return False, load()[1] or "the C++ decoder is not built: install libjpeg-turbo's headers, then this package"


def clean_end(data: bytes, lanes: int = _LANES) -> int:
    """Read every entropy-coded bit of a baseline JPEG, and make no pixel.

    Args:
        data: From SOI on; what follows EOI is not looked at.
        lanes: Places of the stream that are read by turns, 1 to 4. More are faster; the answer is the same.

    Returns:
        The position after the end marker (EOI), if libjpeg would decode all of the image without a warning. 0 where
        that is in doubt. That is so for everything but a baseline Huffman JPEG of one interleaved scan, and where the
        library is not built.
    """
    scan = function("imnet_clean_end")
    return 0 if scan is None else int(scan(data, len(data), lanes))


def decode_whole(
    data: bytes, *, grey: bool, reduce: int, size: tuple[int, int]
) -> tuple[NDArray[np.uint8] | None, str] | None:
    """Decode a JPEG, EXIF orientation not applied.

    Args:
        data: A whole JPEG.
        grey: One channel instead of BGR.
        reduce: Divide both sides by 1, 2, 4 or 8 in the DCT domain.
        size: Width and height by its header, in pixels.

    Returns:
        The pixels, uint8 (H, W) grey or (H, W, 3) BGR, or None where libjpeg gave up, and its first warning or an empty
        string. None instead of both for what may look different in another version of libjpeg (CMYK, rare samplings).
    """
    decode = function("imnet_decode_whole")
    if decode is None:
        return None
    width, height = (-(-side // reduce) for side in size)
    pixels = np.empty((height, width) if grey else (height, width, 3), dtype=np.uint8)
    said = ctypes.create_string_buffer(MESSAGE_BYTES)
    status = decode(data, len(data), reduce, 1 if grey else 3, width, height, pixels.ctypes.data, said)
    if status == 2:
        return None
    return (pixels if status == 0 else None), said.value.decode("utf-8", "replace")


def decode_shrunk(
    data: bytes, *, components: int, reduce: int, size: tuple[int, int], small: tuple[int, int]
) -> tuple[NDArray[np.uint8] | None, int]:
    """Decode a baseline JPEG, EXIF orientation not applied, and shrink it, in one pass.

    The pixels are OpenCV's, shrunk as :func:`imnet_prep.images.encode.shrink` does it, to the last bit.

    Args:
        data: From SOI on; what follows EOI is not looked at.
        components: 1 or 3, as its header says.
        reduce: Divide both sides by 1, 2, 4 or 8 in the DCT domain.
        size: Width and height by its header, in pixels.
        small: Width and height to shrink to; at most those that the reduction leaves.

    Returns:
        The pixels, uint8 (H, W) grey or (H, W, 3) BGR, and the position after EOI; or None and 0 for everything but a
        whole baseline Huffman JPEG, grey, 4:4:4, 4:2:2 or 4:2:0, that libjpeg would decode without a warning.
    """
    decode = function("imnet_decode_shrunk")
    if decode is None:
        return None, 0
    pixels = np.empty((small[1], small[0], 3) if components == 3 else (small[1], small[0]), dtype=np.uint8)
    reduced = [-(-side // reduce) for side in size]
    end = decode(data, len(data), reduce, components, *reduced, *small, pixels.ctypes.data)
    return (pixels, end) if end else (None, 0)
