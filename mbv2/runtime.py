"""Every MindSpore setting of the process, and the threads that decoding and training share.

MindSpore's settings are process-wide, and two of them can be set once only; nothing else in the project touches them.
"""

import importlib
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from imnet_prep.cpu import cpu_count, cpu_share, library_versions
from imnet_prep.errors import TrainError

DEVICE_TARGETS = ("CPU", "GPU", "Ascend")
GRAPH_DEPTH = 10_000  # a step over 158 weights and 104 statistics nests deeper than MindSpore's 1,000
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Runtime:
    """How MindSpore was started in this process.

    Attributes:
        device_target: ``CPU``, ``GPU`` or ``Ascend``.
        threads: Threads that MindSpore's CPU operators use.
        rank: This process's number under MindSpore's ``msrun``, else 0.
        ranks: Number of processes that train together, else 1.
        local_ranks: How many of them run on this machine.
    """

    device_target: str
    threads: int
    rank: int = 0
    ranks: int = 1
    local_ranks: int = 1


_started: Runtime | None = None


def import_mindspore() -> ModuleType:
    """Import MindSpore with its C++ logs down to errors; a user's own ``GLOG_v`` wins.

    The setting is read when MindSpore is first imported, so whoever may be first imports it here.
    """
    os.environ.setdefault("GLOG_v", "3")
    return importlib.import_module("mindspore")


def start_mindspore(device_target: str = "CPU", threads: int | None = None) -> Runtime:
    """Set up MindSpore for this process: device, graph mode, threads, quiet logs. Asked again, it does nothing.

    Started by ``msrun``, the process joins the others; those on one machine share its cores.

    Args:
        device_target: ``CPU``, ``GPU`` or ``Ascend``.
        threads: Threads for CPU operators; this process's share of the machine's cores if not given.

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
    ms = import_mindspore()
    with _unless_in_use(ms, device_target):
        ms.set_device(device_target)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_recursion_limit(GRAPH_DEPTH)
    rank, ranks, local_ranks = _join_ranks()
    threads = threads or cpu_share(local_ranks)
    if device_target == "CPU":
        with _unless_in_use(ms, device_target):
            ms.device_context.cpu.op_tuning.threads_num(threads)
            # One dispatcher: the graph is a chain, and its operators bring their own threads.
            ms.runtime.dispatch_threads_num(1)
    _started = Runtime(device_target, threads, rank, ranks, local_ranks)
    _logger.debug("MindSpore: %s", _started)
    return _started


@contextmanager
def _unless_in_use(ms: ModuleType, device_target: str) -> Iterator[None]:
    """Leave a setting as it is where the caller's own MindSpore code has run on that device already."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "has been initialized" in str(error) and ms.get_context("device_target") == device_target:
            _logger.warning("MindSpore was in use before: its thread settings stay as they are")
            return
        got = " ".join(str(error).split())[:200]
        remedy = "use --device-target CPU, or install the MindSpore build for the device"
        raise TrainError(f"MindSpore cannot use {device_target} here", got=got, remedy=remedy) from error


def _join_ranks() -> tuple[int, int, int]:
    """Join the other processes of ``msrun``: return the rank, the number of ranks, and of those on this machine."""
    if not os.environ.get("MS_ROLE"):  # set by msrun for its workers and their scheduler
        return 0, 1, 1
    communication = importlib.import_module("mindspore.communication")
    communication.init()
    return communication.get_rank(), communication.get_group_size(), communication.get_local_rank_size()


def runtime() -> Runtime:
    """Return how MindSpore was started; one process on the CPU where it was not yet."""
    return _started or Runtime("CPU", cpu_count())


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, for ``config.json``."""
    found = library_versions("imnet-prep", "mindspore", "numpy", "opencv")
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
