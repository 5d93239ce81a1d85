"""Count the cores and the memory that this process may use, and find the versions of installed libraries."""

import importlib
import importlib.metadata
import os
import sys
from contextlib import suppress
from pathlib import Path

OPENCV = tuple(f"opencv-{name}" for name in ("python-headless", "python", "contrib-python-headless", "contrib-python"))
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "<quota us> <period us>" or "max <period us>" (cgroup v2)
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")  # "<bytes>" or "max" (cgroup v2)


def cpu_count() -> int:
    """Count the cores that this process may use: those of its affinity, or fewer in a container with a quota."""
    return _within_quota(_affinity(0) or os.cpu_count() or 1)


def cpu_share(processes: int) -> int:
    """Count the cores for one of several equal processes that the same launcher started on this machine.

    The launcher's cores are shared out; it may have bound each process to some of them, so this process takes no more
    than it may use itself.
    """
    cores = cpu_count()
    if processes == 1:
        return cores
    return max(1, min(cores, _within_quota(max(cores, _affinity(os.getppid()))) // processes))


def _within_quota(cores: int) -> int:
    try:
        quota, period = _CGROUP_QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _affinity(process: int) -> int:
    """Count the cores on which a process (0: this one) may run; 0 where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        try:
            return len(os.sched_getaffinity(process))
        except OSError:  # it has ended, or is another user's
            return 0
    if sys.platform == "win32" and process == 0:
        import ctypes

        mine, all_cores, this_process = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p(-1)
        ctypes.windll.kernel32.GetProcessAffinityMask(this_process, ctypes.byref(mine), ctypes.byref(all_cores))
        return mine.value.bit_count()  # 0 also where the process runs on several groups of 64 cores
    return 0


def memory_bytes() -> int:
    """Return the memory of the machine, or of the container if that is less, in bytes; 0 where it is not known."""
    total = 0
    if sys.platform == "win32":
        import ctypes

        kilobytes = ctypes.c_ulonglong()
        if ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes)):
            total = kilobytes.value * 1024
    else:
        with suppress(OSError, ValueError):
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        return min(int(_CGROUP_MEMORY.read_text(encoding="ascii")), total or sys.maxsize)
    return total


def library_versions(*names: str) -> dict[str, str]:
    """Return the versions of installed distributions by their names.

    ``opencv`` stands for whichever distribution of OpenCV is installed. Where there is none (conda, an own build), the
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
