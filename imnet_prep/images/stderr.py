"""Capture what C libraries write to stderr: the last resort where they have no other way to report.

File descriptor 2 belongs to the whole process. What other threads write meanwhile is passed on afterwards.
"""

import io
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# Every warning of libjpeg (jerror.h), OpenCV's log, and libtiff's messages, which begin with the name of a function.
_OURS = re.compile(
    rb"(?:Corrupt JPEG data: |Premature end of JPEG file|Inconsistent progression sequence |Invalid SOS parameters "
    rb"|Warning: unknown JFIF revision |Unknown Adobe color transform code |Application transferred too many scanlines"
    rb"|\[ ?(?:WARN|ERROR| INFO):\d|im(?:de)?(?:code|read)_\("
    rb"|(?:_?TIFF|LZW|ZIP|PackBits|Fax|JPEG|OJPEG|Log|PixarLog|LZMA|ZSTD|WebP|SGILog|Thunder|NeXT|DumpMode)\w*: "
    rb"|tempfile\.tif: )[^\n]*\n?"
)
_MARK = b"\0"
_LOCKS: dict[int, threading.Lock] = {}  # by process: a forked child cannot use one that a thread of its parent holds


def process_lock() -> threading.Lock:
    """Return the lock for what belongs to the whole process: stderr, and Python's filters of warnings."""
    return _LOCKS.setdefault(os.getpid(), threading.Lock())


@cache
def _capture_files(process: int) -> tuple[int, io.FileIO, bytearray]:
    """Return the file in place of stderr, the same file to read from where it was last read, and what was left over."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows deletes no open file
        path = Path(folder, "stderr")
        with path.open("ab") as writer, path.open("rb") as reader:
            return os.dup(writer.fileno()), open(os.dup(reader.fileno()), "rb", 0, closefd=False), bytearray()


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
        writer, reader, left_over = _capture_files(os.getpid())
        os.dup2(writer, 2)
        try:
            yield messages
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            # Writes take turns, so those before the mark are whole. What another thread writes after it may be half
            # written when it is read, and is left to the next capture.
            os.write(writer, _MARK)
            written, _, rest = (bytes(left_over) + reader.read()).rpartition(_MARK)
            left_over[:] = rest
            messages += [message.decode("utf-8", "replace").strip() for message in _OURS.findall(written)]
            if others := _OURS.sub(b"", written):
                os.write(2, others)
