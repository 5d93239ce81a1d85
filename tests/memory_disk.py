"""A disk in memory for many small files: on a real one, fsync takes much of the time of the tests."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

MEMORY_DISK = Path("/dev/shm")


def memory_disk(needed_bytes: int) -> Path | None:
    """Return a folder in memory with so much room, whose files may be executed, or None."""
    if sys.platform != "linux" or not os.access(MEMORY_DISK, os.W_OK):
        return None
    usable = not os.statvfs(MEMORY_DISK).f_flag & os.ST_NOEXEC and shutil.disk_usage(MEMORY_DISK).free > needed_bytes
    return MEMORY_DISK if usable else None
