"""Read, write, flush and lock files, on Linux, macOS and Windows alike."""

import errno
import hashlib
import os
import sqlite3
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

READ_BYTES = 1 << 20
MAX_OPEN_FILES = 256
_SCANNED_S = 2.0
# What only some systems have: 0 or None elsewhere.
_BINARY, _NONBLOCK, _NOFOLLOW = (getattr(os, name, 0) for name in ("O_BINARY", "O_NONBLOCK", "O_NOFOLLOW"))
_pread, _fadvise = getattr(os, "pread", None), getattr(os, "posix_fadvise", None)
_sync = getattr(os, "sync", None)
_WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", 0)


def write_atomically(path: Path, data: bytes, *, stage: Path | None = None) -> None:
    """Write a file so that it is whole or absent, also after a power loss.

    Args:
        path: The file.
        data: Its bytes.
        stage: A folder of the same file system in which to write it first. By default it is first written beside
            ``path``, always under the same name, so the next write replaces what a kill left there.
    """
    temporary = path.with_name(f".{path.name}.tmp") if stage is None else stage / f"{uuid.uuid4().hex}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link, or into a FIFO, that someone put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename a file, replacing another one, or a folder."""
    patiently(lambda: os.replace(source, target))


def patiently(change: Callable[[], None]) -> None:
    """Rename or delete something; on Windows, wait for a virus scanner or an indexer that has it open for a moment."""
    until = time.monotonic() + _SCANNED_S
    while True:
        try:
            return change()
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > until:
                raise
        time.sleep(0.05)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Windows flushes the names itself."""
    flags = os.O_RDONLY
    if sys.platform == "win32":
        if path.is_dir():
            return
        flags = os.O_RDWR  # it flushes no file that is open for reading only
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Flush everything that was written to the disk, where the system can; else each file in a folder."""
    if _sync is not None:
        _sync()
        return
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def _open_plain(path: str | Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | _BINARY | _NONBLOCK)  # a FIFO would wait for a writer
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
    """A regular file, open for reads at any offset, also from several threads. It is closed with its last reference.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """

    __slots__ = ("_descriptor", "_seeking")

    def __init__(self, path: str | Path) -> None:
        self._descriptor = _open_plain(path)
        self._seeking = threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return os.fstat(self._descriptor).st_size

    def read(self, size_bytes: int, offset: int) -> bytes:
        """Read a byte range; the result is shorter only at the end of the file."""
        data = self._read_some(size_bytes, offset)
        while data and len(data) < size_bytes:
            more = self._read_some(size_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _read_some(self, size_bytes: int, offset: int) -> bytes:
        if _pread:
            return bytes(_pread(self._descriptor, size_bytes, offset))
        with self._seeking:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, size_bytes)

    def will_need(self, size_bytes: int, offset: int) -> None:
        """Tell the system, where it listens, that a byte range will be read soon."""
        if _fadvise:
            _fadvise(self._descriptor, offset, size_bytes, _WILL_NEED)


@cache
def max_open_files() -> int:
    """Return how many files one cache may keep open: 256, or a third of the process's limit if that is less."""
    if sys.platform != "win32":
        with suppress(ImportError):
            import resource

            if (soft := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) >= 0:
                return max(4, min(MAX_OPEN_FILES, soft // 3))
    return MAX_OPEN_FILES


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a lock file, which is deleted with the lock. The system ends the lock of a process that dies.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: It cannot be made.
    """
    descriptor = _locked(path)
    try:
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be deleted, nor one that another process has opened since
            os.close(descriptor)
            with suppress(OSError):
                path.unlink()
        else:
            path.unlink(missing_ok=True)  # while it is held
            os.close(descriptor)


def _locked(path: Path) -> int:
    from filelock import lock_descriptor

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW, 0o644)
        try:
            if not lock_descriptor(descriptor, blocking=False):
                raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process", str(path))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.lstat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder deleted it after it was opened here: take the new one


def is_possible_name(name: str, *, windows: bool = sys.platform == "win32") -> bool:
    """Return whether a file can have a name: Windows reserves some, and drops dots and spaces at the end."""
    return not windows or not (PureWindowsPath(name).is_reserved() or name.endswith((".", " ")))


def is_disk_full(error: OSError) -> bool:
    """Return whether an error means that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sqlite_failure(error: sqlite3.Error, path: Path) -> OSError:
    """Return the OSError behind an error of SQLite while writing."""
    return OSError(errno.ENOSPC if "full" in str(error) else errno.EIO, f"SQLite: {error}", str(path))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    file, digest, done = PlainFile(path), hashlib.sha256(), 0
    while chunk := file.read(READ_BYTES, done):
        digest.update(chunk)
        done += len(chunk)
    return digest.hexdigest()
