"""Bound the memory of all answers and decodes at a time.

A picture of a few hundred kilobytes may be 100 million pixels, and every thread may get the largest answer at once.
"""

import io
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from imnet_prep.files import exclusive_lock
from imnet_prep.images.check import decide, read_header
from imnet_prep.images.decode import PILLOW_FAULTS
from imnet_prep.images.formats import MAX_PIXELS, sniff
from imnet_prep.images.jpeg import jpeg_size
from imnet_prep.types import ImageFault, Stop

_PIXELS_AT_A_TIME = 24_000_000  # in a process; a decode takes 3 to 8 bytes a pixel
_REDUCED = 8  # each side of a large JPEG that is looked at or shrunk
_LOCK_NAME = "large-image.lock"  # held by the process that decodes an image of more pixels
_POLL_S = 0.05


class Stopped(Exception):
    """The run ends before the room was free."""


class NoRoom(Exception):
    """The room was not free in time."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for room.

    Attributes:
        wait_s: Longest wait, in seconds.
        stop: Called meanwhile; once it returns true, waiting ends.
    """

    wait_s: float = math.inf
    stop: Stop = lambda: False

    def waits(self) -> Callable[[], None]:
        """Begin to wait. The function returned is to be called now and then.

        It raises :class:`Stopped` once the run ends, and :class:`NoRoom` once the wait has lasted too long.
        """
        until = time.monotonic() + self.wait_s

        def check() -> None:
            if self.stop():
                raise Stopped
            if time.monotonic() > until:
                raise NoRoom(f"no memory was free for {self.wait_s:.0f} s")

        return check


class Room:
    """Something of which a process may hold so much at a time.

    Args:
        size: How much.
        patience: How long to wait for it.
    """

    def __init__(self, size: int, patience: Patience = Patience()) -> None:
        self._patience = patience
        self._turn, self._changed = threading.Lock(), threading.Condition()
        self._size = self._free = size

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Wait until so much is free, and hold it; what is larger than all holds all. Nobody overtakes who waits."""
        count, check = min(count, self._size), self._patience.waits()
        with turn(self._turn, check), self._changed:
            while not self._changed.wait_for(lambda: count <= self._free, _POLL_S):
                check()
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


@contextmanager
def turn(lock: threading.Lock, check: Callable[[], None]) -> Iterator[None]:
    """Hold a lock; ``check`` is called while another holds it, and may raise."""
    while not lock.acquire(timeout=_POLL_S):
        check()
    try:
        yield
    finally:
        lock.release()


class PixelBudget:
    """Let a process decode images of so many pixels at a time, and all processes one larger image at a time.

    Args:
        folder: Where the lock file of larger images lies.
        patience: How long to wait.
    """

    def __init__(self, folder: Path, patience: Patience = Patience()) -> None:
        self._patience = patience
        self._lock_path = folder / _LOCK_NAME
        self._room = Room(_PIXELS_AT_A_TIME, patience)
        self._one = threading.Lock()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until an image of so many pixels may be decoded, and hold its part of the budget."""
        if pixels > _PIXELS_AT_A_TIME:
            check = self._patience.waits()
            with turn(self._one, check), self._alone(check):
                yield
        else:
            with self._room.hold(pixels):
                yield

    @contextmanager
    def _alone(self, check: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of all processes; the system frees it if this one dies."""
        with ExitStack() as held:
            while True:
                try:
                    held.enter_context(exclusive_lock(self._lock_path))
                    break
                except BlockingIOError:
                    check()
                    time.sleep(_POLL_S)
            yield


def pixels_of(data: bytes) -> int:
    """Return the pixels of an image by its header, 0 where it has none that can be read."""
    with suppress(ImageFault, *PILLOW_FAULTS):
        kind = sniff(data)
        if kind == "JPEG":
            width, height = jpeg_size(data) or (0, 0)
            return width * height
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            return image.width * image.height
    return 0


def pixels_held(data: bytes, short_side: int | None) -> int:
    """Return how many pixels the check of an image decodes at a time.

    A second look at a large JPEG tells whether it is read as a stream, as most are: then it need not wait for others.

    Args:
        data: The image.
        short_side: As of :class:`~imnet_prep.download.options.ContentOptions`.
    """
    pixels = pixels_of(data)
    if pixels > MAX_PIXELS:
        return 0  # it is refused before anything is decoded
    if pixels > _PIXELS_AT_A_TIME:
        with suppress(ImageFault):
            _, info = read_header(data, MAX_PIXELS, scan=True)
            if info is not None and info.clean:
                action = decide(info, short_side)
                is_small = short_side is not None and min(info.width, info.height) >= _REDUCED * short_side
                if action == "keep" or (action == "encode" and is_small):
                    return pixels // _REDUCED**2
    return pixels
