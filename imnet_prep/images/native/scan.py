"""Tell fast that a JPEG is whole: every entropy-coded bit is read, no pixel is made.

The C++ library is optional, and only ever says "clean": what it doubts, libjpeg decides. So the results are the same
with and without it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("imnet_scan.so")
_ABI = 3  # kAbi in scan.cc
_LANES = 4  # kLanes in scan.cc


@cache
def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # not built, or for another machine
        return None
    if library.imnet_scan_abi() != _ABI:
        return None
    library.imnet_scan_clean_end.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    library.imnet_scan_clean_end.restype = ctypes.c_size_t
    return library


def available() -> bool:
    """Tell whether the library is there."""
    return _load() is not None


def clean_end(data: bytes, lanes: int = _LANES) -> int:
    """Read every entropy-coded bit of a baseline JPEG.

    Args:
        data: From SOI on; what follows EOI is not looked at.
        lanes: Places of the stream that are read by turns, 1 to 4: the answer is the same, sooner with more.

    Returns:
        The byte right behind the end marker (EOI), where libjpeg would decode all of it without a complaint. 0 where
        that is in doubt, always so for what is not a baseline Huffman JPEG of one interleaved scan, and where the
        library is not built.
    """
    library = _load()
    return 0 if library is None else int(library.imnet_scan_clean_end(data, len(data), lanes))
