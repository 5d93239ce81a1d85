"""Every MindSpore setting of the process, and the threads that decoding and training share.

MindSpore's settings are process-wide, and two of them can be set once only; nothing else in the project touches them.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
from dataclasses import dataclass
from types import ModuleType

from imnet_prep.cpu import cpu_count, library_versions
from imnet_prep.errors import TrainError

DEVICE_TARGETS = ("CPU", "GPU", "Ascend")
GRAPH_DEPTH = 10_000  # a step over 158 weights and 104 statistics nests deeper than MindSpore's 1,000
_logger = logging.getLogger(__name__)
_started: Runtime | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """How MindSpore was started in this process.

    Attributes:
        device_target: ``CPU``, ``GPU`` or ``Ascend``.
        threads: Threads that MindSpore's CPU operators use.
        rank: This process's number under MindSpore's ``msrun``, else 0.
        ranks: Number of processes that train together, else 1.
    """

    device_target: str
    threads: int
    rank: int = 0
    ranks: int = 1


def import_mindspore() -> ModuleType:
    """Import MindSpore with its C++ logs down to errors; a user's own ``GLOG_v`` wins.

    The setting is read when MindSpore is first imported, so whoever may be first imports it here.
    """
    os.environ.setdefault("GLOG_v", "3")
    return importlib.import_module("mindspore")


def start_mindspore(device_target: str = "CPU", threads: int | None = None) -> Runtime:
    """Set up MindSpore for this process: device, graph mode, threads, quiet logs. Asked again, it does nothing.

    Started by ``msrun``, the process joins the others; the cores of the machine are then shared out among them.

    Args:
        device_target: ``CPU``, ``GPU`` or ``Ascend``.
        threads: Threads for CPU operators; the cores this process may use if not given.

    Raises:
        TrainError: Unknown or absent device, or MindSpore was started otherwise before.
    """
    global _started  # noqa: PLW0603 - the state it mirrors is MindSpore's own, and process-wide
    if device_target not in DEVICE_TARGETS:
        raise TrainError("unknown device target", expected=f"one of {', '.join(DEVICE_TARGETS)}", got=device_target)
    if _started is not None:
        have = (_started.device_target, _started.threads)
        wanted = (device_target, threads or _started.threads)
        if wanted != have:
            raise TrainError("MindSpore was already started in this process", expected=f"{have}", got=f"{wanted}")
        return _started
    threads = threads or max(1, cpu_count() // _local_ranks())
    ms = import_mindspore()
    _settle(ms, device_target, threads)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_recursion_limit(GRAPH_DEPTH)
    rank, ranks = 0, 1
    if os.environ.get("MS_ROLE"):  # set by msrun for its workers and their scheduler
        communication = importlib.import_module("mindspore.communication")
        communication.init()
        rank, ranks = communication.get_rank(), communication.get_group_size()
    _started = Runtime(device_target, threads, rank, ranks)
    _logger.debug("MindSpore: %s", _started)
    return _started


def _settle(ms: ModuleType, device_target: str, threads: int) -> None:
    """Choose device and threads; where the caller's own MindSpore code has run on that device already, they stay."""
    try:
        ms.set_device(device_target)
        if device_target == "CPU":
            ms.device_context.cpu.op_tuning.threads_num(threads)
            # One dispatcher: the graph is a chain, and its operators bring their own threads.
            ms.runtime.dispatch_threads_num(1)
    except (RuntimeError, ValueError) as error:
        if "has been initialized" in str(error) and ms.get_context("device_target") == device_target:
            _logger.warning("MindSpore was in use before: its thread settings stay as they are")
            return
        got = " ".join(str(error).split())[:200]
        remedy = "use --device-target CPU, or install the MindSpore build for the device"
        raise TrainError(f"MindSpore cannot use {device_target} here", got=got, remedy=remedy) from error


def _local_ranks() -> int:
    """Count the processes of ``msrun`` on this machine: it does not say, so all of them are taken to be."""
    return int(os.environ.get("MS_WORKER_NUM", "1")) if os.environ.get("MS_ROLE") else 1


def runtime() -> Runtime:
    """Return how MindSpore was started; one process on the CPU where it was not yet."""
    return _started or Runtime("CPU", cpu_count())


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, for ``config.json``."""
    found = library_versions("imnet-prep", "mindspore", "numpy", "opencv")
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
