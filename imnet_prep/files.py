"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import sqlite3
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

READ_BYTES = 1 << 20
MAX_OPEN_FILES = 256


def write_atomically(path: Path, data: bytes, *, stage: Path | None = None) -> None:
    """Write a file that is there whole or not at all, also after a power loss.

    Args:
        path: The file.
        data: Its bytes.
        stage: A folder of the same file system in which it is written first. Without one that happens beside ``path``,
            under one name, so that whatever a kill leaves there is replaced by the next write.
    """
    temporary = path.with_name(f".{path.name}.tmp") if stage is None else stage / f"{uuid.uuid4().hex}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link, or into a FIFO, that someone put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_plain(path: str | Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return descriptor


def open_plain(path: str | Path) -> BinaryIO:
    """Open a regular file for reading from its beginning to its end.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    return os.fdopen(_open_plain(path), "rb")


class PlainFile:
    """A regular file, open for positioned reads. It is closed when nobody holds it any more, so threads share it.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """

    __slots__ = ("descriptor",)

    def __init__(self, path: str | Path) -> None:
        self.descriptor = _open_plain(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, size_bytes: int, offset: int) -> bytes:
        """Read a byte range; shorter only where the file ends."""
        data = os.pread(self.descriptor, size_bytes, offset)
        while data and len(data) < size_bytes:
            more = os.pread(self.descriptor, size_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


@cache
def max_open_files() -> int:
    """Return how many files one cache may keep open: 256, or a third of what the process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return MAX_OPEN_FILES
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN_FILES if soft < 0 else max(4, min(MAX_OPEN_FILES, soft // 3))


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a lock file that goes away with the lock.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: It cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.sameopenfile(descriptor, there := os.open(path, os.O_RDONLY | os.O_CLOEXEC)):
                    os.close(there)
                    break
                os.close(there)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder before us removed it after we opened it: take the new one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held
        os.close(descriptor)


def sqlite_failure(error: sqlite3.Error, path: Path) -> OSError:
    """Return the OSError that stands behind an error of SQLite while writing."""
    number = errno.ENOSPC if "full" in str(error) else errno.EIO
    return OSError(number, f"SQLite: {error}", str(path))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    file, digest, done = PlainFile(path), hashlib.sha256(), 0
    while chunk := file.read(READ_BYTES, done):
        digest.update(chunk)
        done += len(chunk)
    return digest.hexdigest()
