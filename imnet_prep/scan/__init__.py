"""Tell fast that a JPEG is whole: every entropy-coded bit is read, no pixel is made.

The C++ library is optional, and only ever says "clean": what it doubts, libjpeg decides. So the results are the same
with and without it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("imnet_scan.so")
_ABI = 1  # kAbi in scan.cc


@cache
def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # not built, or for another machine
        return None
    if library.imnet_scan_abi() != _ABI:
        return None
    library.imnet_scan_jpeg.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    return library


def available() -> bool:
    """Tell whether the library is there."""
    return _load() is not None


def is_clean(data: bytes) -> bool:
    """Read every entropy-coded bit of a baseline JPEG.

    Args:
        data: From SOI on; what follows EOI is not looked at.

    Returns:
        True where libjpeg would decode all of it without a complaint; False where that is in doubt, always so for what
        is not a baseline Huffman JPEG of one interleaved scan, and where the library is not built.
    """
    library = _load()
    return library is not None and library.imnet_scan_jpeg(data, len(data)) == 1
