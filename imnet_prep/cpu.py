"""How many cores this process may use, and which libraries are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from contextlib import suppress
from pathlib import Path

OPENCV = tuple(f"opencv-{name}" for name in ("python-headless", "python", "contrib-python-headless", "contrib-python"))
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "<quota us> <period us>" or "max <period us>" (cgroup v2)


def cpu_count() -> int:
    """Count the cores this process may use: its affinity mask, lowered to a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def library_versions(*names: str) -> dict[str, str]:
    """Return the versions of installed distributions by their names.

    ``opencv`` stands for whichever distribution of OpenCV is installed; where there is none (conda, an own build), the
    key is ``opencv`` and the version is OpenCV's own. Any other that is not installed has an empty version.
    """
    found: dict[str, str] = {}
    for name in names:
        for candidate in OPENCV if name == "opencv" else (name,):
            with suppress(importlib.metadata.PackageNotFoundError):
                found[candidate] = importlib.metadata.version(candidate)
                break
        else:
            found[name] = importlib.import_module("cv2").__version__ if name == "opencv" else ""
    return found
