"""The optional C++ batch JPEG decoder: only the crop is decoded, resized and flipped straight into the batch.

Built with the package where libjpeg-turbo's headers are; without them :func:`load` says so and OpenCV decodes.
"""

from __future__ import annotations

import ctypes
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import PipelineError
from imnet_prep.images.decode import INTERPOLATIONS, Fault, Geometry, PortableDecoder

LIBRARY = Path(__file__).with_name("imnet_jpeg.so")
_ABI = 3  # kAbi in decoder.cc
_MESSAGE_BYTES = 256
_REDUCE, _FAST = 1, 2
_FAULT, _NOT_TAKEN = 1, 2


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Load the library once.

    Returns:
        The library and what it is built on, or None and why it cannot be used.
    """
    if not LIBRARY.is_file():
        return None, "the C++ decoder is not built: install libjpeg-turbo's headers and a compiler, then this package"
    # Our library's libjpeg goes before any other copy in the process (MindSpore and OpenCV bring their own).
    mode = os.RTLD_LOCAL | os.RTLD_NOW | getattr(os, "RTLD_DEEPBIND", 0)
    try:
        library = ctypes.CDLL(str(LIBRARY), mode=mode)
    except OSError as error:
        return None, f"the C++ decoder does not load: {error}"
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.imnet_jpeg_library.restype = ctypes.c_char_p
    library.imnet_jpeg_new.restype = pointer
    library.imnet_jpeg_free.argtypes = [pointer]
    library.imnet_jpeg_decode.argtypes = [pointer, integer, *[pointer] * 6, *[integer] * 3, *[pointer] * 3]
    if library.imnet_jpeg_abi() != _ABI:
        return None, "the C++ decoder was built for another version of this package: install it again"
    return library, library.imnet_jpeg_library().decode()


@contextmanager
def borrowed(idle: queue.SimpleQueue[int], make: Callable[[], int | None]) -> Iterator[int | None]:
    """Lend an idle decoder, or a new one: as many are made as threads are at work at once."""
    try:
        handle: int | None = idle.get_nowait()
    except queue.Empty:
        handle = make()
    try:
        yield handle
    finally:
        if handle:
            idle.put(handle)


class NativeDecoder(PortableDecoder):
    """The C++ decoder. What it does not take (other formats, CMYK), the portable one decodes.

    Args:
        reduce: Halve large images in the DCT domain before they are resized.
        fast: Read the entropy-coded data with our own decoder where it can; the pixels are the same.

    Raises:
        PipelineError: It is not built, or does not load.
    """

    def __init__(self, *, reduce: bool = True, fast: bool = True) -> None:
        library, text = load()
        if library is None:
            raise PipelineError(text, remedy="or use the portable decoder")
        self._library = library
        self._flags = _REDUCE * reduce + _FAST * fast
        self.name = f"native ({text})"
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __del__(self) -> None:
        while hasattr(self, "_idle") and not self._idle.empty():
            self._library.imnet_jpeg_free(self._idle.get())

    def decode(
        self, images: Sequence[bytes], geometry: Geometry, interpolation: str, out: NDArray[np.uint8]
    ) -> list[Fault]:
        """See :meth:`imnet_prep.images.decode.PortableDecoder.decode`."""
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
        status, messages = np.zeros(count, dtype=np.int32), np.zeros(count, dtype=f"S{_MESSAGE_BYTES}")
        with borrowed(self._idle, self._library.imnet_jpeg_new) as handle:
            if not handle:
                raise MemoryError("no memory for a decoder")
            bad = self._library.imnet_jpeg_decode(
                handle,
                count,
                (ctypes.c_char_p * count)(*images),
                *(array.ctypes.data for array in given),
                INTERPOLATIONS.index(interpolation),
                out.shape[1],
                self._flags,
                *(array.ctypes.data for array in (out, status, messages)),
            )
        assert bad >= 0, "the geometry lies outside the image"
        faults = [
            (row, messages[row].split(b"\0", 1)[0].decode("utf-8", "replace"))
            for row in np.flatnonzero(status == _FAULT).tolist()
        ]
        others = np.flatnonzero(status == _NOT_TAKEN)
        if len(others):
            pixels = out[others]
            found = super().decode([images[row] for row in others], geometry.of(others), interpolation, pixels)
            faults += [(int(others[number]), why) for number, why in found]
            out[others] = pixels
        return faults
