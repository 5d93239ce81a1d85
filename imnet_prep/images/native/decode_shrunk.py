"""A JPEG to its shrunk pixels in one pass of the C++ library, where the library has no doubt of any of its bits.

Optional: the pixels are OpenCV's, shrunk as :func:`imnet_prep.images.imaging.shrink` does it, to the last bit (tested),
and for whatever is not plainly whole the answer is None. So the results are the same without the library.
"""

from __future__ import annotations

import ctypes
import queue
from functools import cache

import numpy as np
from numpy.typing import NDArray

from imnet_prep.images.native import borrowed, load

_IDLE: queue.SimpleQueue[int] = queue.SimpleQueue()  # decoders


@cache
def _library() -> ctypes.CDLL | None:
    library, _ = load()
    if library is None or not hasattr(library, "imnet_small_decode"):  # built without jpegint.h
        return None
    library.imnet_small_new.restype = ctypes.c_void_p
    library.imnet_small_decode.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_int] * 6, ctypes.c_void_p
    ]  # fmt: skip
    library.imnet_small_decode.restype = ctypes.c_size_t
    return library


def available() -> bool:
    """Tell whether the library is there, with this part of it."""
    return _library() is not None


def decode(
    data: bytes, *, components: int, reduce: int, size: tuple[int, int], small: tuple[int, int]
) -> tuple[NDArray[np.uint8] | None, int]:
    """Decode a baseline JPEG, EXIF orientation not applied, and shrink it.

    Args:
        data: From SOI on; what follows EOI is not looked at.
        components: 1 or 3, as its header says.
        reduce: Divide both sides by 1, 2, 4 or 8 in the DCT domain.
        size: Width and height by its header, in pixels.
        small: Width and height to shrink to; at most those that the reduction leaves.

    Returns:
        The pixels, uint8 (H, W) grey or (H, W, 3) BGR, and the byte behind EOI; or None and 0 for what is not a whole
        baseline Huffman JPEG, grey, 4:4:4, 4:2:2 or 4:2:0, of which libjpeg would decode every bit without a complaint.
    """
    library = _library()
    if library is None:
        return None, 0
    shape = (small[1], small[0], 3) if components == 3 else (small[1], small[0])
    pixels = np.empty(shape, dtype=np.uint8)
    reduced = [-(-side // reduce) for side in size]
    with borrowed(_IDLE, library.imnet_small_new) as handle:
        end = library.imnet_small_decode(
            handle, data, len(data), reduce, components, *reduced, *small, pixels.ctypes.data
        )
    return (pixels, end) if end else (None, 0)
