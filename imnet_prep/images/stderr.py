"""Capture what C libraries write to stderr: the last resort where they have no other way to report.

File descriptor 2 belongs to the whole process. What other threads write meanwhile is passed on afterwards.
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# Every warning of libjpeg (jerror.h), OpenCV's log, and libtiff's messages, which begin with the name of a function.
_OURS = re.compile(
    rb"(?:Corrupt JPEG data: |Premature end of JPEG file|Inconsistent progression sequence |Invalid SOS parameters "
    rb"|Warning: unknown JFIF revision |Unknown Adobe color transform code |Application transferred too many scanlines"
    rb"|\[ ?(?:WARN|ERROR| INFO):\d|im(?:de)?(?:code|read)_\("
    rb"|(?:_?TIFF|LZW|ZIP|PackBits|Fax|JPEG|OJPEG|Log|PixarLog|LZMA|ZSTD|WebP|SGILog|Thunder|NeXT|DumpMode)\w*: "
    rb"|tempfile\.tif: )[^\n]*\n?"
)
_MAX_CAPTURE_BYTES = 1 << 20  # the capture file is emptied beyond this
_READ: dict[int, int] = {}  # by capture file: the bytes that were read
_LOCKS: dict[int, threading.Lock] = {}  # by process: a forked child cannot use one that a thread of its parent holds


def process_lock() -> threading.Lock:
    """Return the lock for what belongs to the whole process: stderr, and Python's filters of warnings."""
    return _LOCKS.setdefault(os.getpid(), threading.Lock())


@cache
def _capture_file(process: int) -> int:
    """Return the file in place of stderr, one a process; writes go to its end, wherever it is read."""
    with tempfile.TemporaryFile("a+b") as file:
        return os.dup(file.fileno())


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Capture what libjpeg, OpenCV and libtiff write to stderr; at the end, their messages are in the list."""
    messages: list[str] = []
    with process_lock():
        try:
            saved = os.dup(2)
        except OSError:  # a daemon without stderr
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            saved = os.dup(2)
        file = _capture_file(os.getpid())
        os.dup2(file, 2)
        try:
            yield messages
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            # A write of another thread may still be under way: it ends up behind this, and is passed on next time.
            os.lseek(file, _READ.get(file, 0), os.SEEK_SET)
            written = b"".join(iter(lambda: os.read(file, 1 << 16), b""))
            _READ[file] = os.lseek(file, 0, os.SEEK_CUR)
            if _READ[file] > _MAX_CAPTURE_BYTES:
                os.ftruncate(file, 0)
                _READ[file] = 0
            messages += [message.decode("utf-8", "replace").strip() for message in _OURS.findall(written)]
            if others := _OURS.sub(b"", written):
                os.write(2, others)
