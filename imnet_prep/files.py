"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import sqlite3
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

READ_BYTES = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also after a power loss."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders or files of one file system change names in one step, where the system can.

    Returns:
        Whether it did; False where it cannot be done in one step here.
    """
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (ctypes.c_char_p(os.fsencode(path)) for path in (one, other))
    first, second = names
    return bool(rename(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a lock file that goes away with the lock.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: It cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
    """Give the OSError that stands behind an error of SQLite while writing."""
    number = errno.ENOSPC if "full" in str(error) else errno.EIO
    return OSError(number, f"SQLite: {error}", str(path))


def file_digest(path: Path) -> str:
    """Give the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
