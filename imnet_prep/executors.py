"""Who carries out tasks: a pool of processes here, or Dask workers on machines that share the folder."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from imnet_prep.errors import PlanError
from imnet_prep.shard_task import Advance, ShardResult, ShardTask, run_task

EXECUTORS = ("local", "dask")
POLL_S = 0.2
Report = Callable[[int, int, int], None]  # images, bytes and rejected of this run so far
Stop = Callable[[], bool]
Task = TypeVar("Task")
Result = TypeVar("Result")
_counters: Any = None  # in a worker process: images, bytes, rejected, shared with the parent
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(
    tasks: Sequence[ShardTask], workers: int | None, scheduler: str | None, report: Report, stop: Stop
) -> Iterator[ShardResult]:
    """Carry out tasks, in any order, and give each result as it comes.

    Args:
        tasks: What to do.
        workers: Processes of the local pool; one a usable core where None.
        scheduler: Address of a Dask scheduler, or None for the local pool.
        report: Told now and then how far the work is.
        stop: Once true, no further task begins; those in hand are finished and given.

    Raises:
        PlanError: A worker process was killed, or Dask cannot be reached.
        OSError: A task met a disk that is full or fails.
    """
    if not tasks:
        return iter(())
    if scheduler is None:
        width = min(workers or len(os.sched_getaffinity(0)), len(tasks))
        return run_processes(run_task, tasks, width, report, stop)
    return _run_dask(tasks, scheduler, report, stop)


def run_processes(
    function: Callable[[Task, Advance], Result], tasks: Iterable[Task], width: int, report: Report, stop: Stop
) -> Iterator[Result]:
    """Carry out tasks in fresh processes that die with this one; at most ``width`` are in hand, the rest not yet made.

    Args:
        function: What a worker does with a task, from a module; it is told how to say how far it is.
        tasks: Taken one by one, as workers come free.
        width: Number of processes.
        report: Told now and then how far the work is.
        stop: Once true, no further task begins.

    Raises:
        PlanError: A worker process was killed.
    """
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 3)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(width, context, _begin_worker, (counters, os.getpid()))
    try:
        yield from _drive(pool, _Counted(function), width, tasks, lambda: report(*counters[:]), stop)
    except BrokenProcessPool as error:
        raise PlanError(
            "a worker process was killed (out of memory?)",
            remedy="run the same command again, with fewer --workers if memory is short: finished shards are kept",
        ) from error
    except KeyboardInterrupt:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(counters: Any, parent: int) -> None:
    """Leave signals of the terminal to the parent, die with it, and do not multiply threads."""
    global _counters  # noqa: PLW0603, a process-wide handle is what an initializer is for
    _counters = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    import cv2

    cv2.setNumThreads(1)


@dataclass(frozen=True, slots=True)
class _Counted(Generic[Task, Result]):
    """A function that adds what it says of itself to the counters shared with the parent."""

    function: Callable[[Task, Advance], Result]

    def __call__(self, task: Task) -> Result:
        return self.function(task, _advance)


def _advance(images: int, size: int, rejected: int) -> None:
    with _counters.get_lock():
        for position, value in enumerate((images, size, rejected)):
            _counters[position] += value


def _run_uncounted(task: ShardTask) -> ShardResult:
    return run_task(task, lambda images, size, rejected: None)


def _run_dask(tasks: Sequence[ShardTask], scheduler: str, report: Report, stop: Stop) -> Iterator[ShardResult]:
    try:
        from distributed import Client
    except ImportError as error:
        raise PlanError("--executor dask: Dask is not installed", remedy="pip install 'imnet-prep[dask]'") from error
    try:
        client = Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        raise PlanError(f"--scheduler {scheduler}: cannot be reached", got=str(error) or "no answer in 20 s") from error
    with client:
        width = sum(client.nthreads().values())
        if not width:
            raise PlanError(f"--scheduler {scheduler}: has no workers", remedy="start `dask worker` processes")
        done = [0, 0, 0]

        def counted(results: Iterator[ShardResult]) -> Iterator[ShardResult]:
            for result in results:
                size = result.info.size_bytes if result.info else 0
                for position, value in enumerate((result.images + len(result.rejected), size, len(result.rejected))):
                    done[position] += value
                yield result

        pool = client.get_executor(pure=False)
        yield from counted(_drive(pool, _run_uncounted, width, tasks, lambda: report(*done), stop))


def _drive(
    pool: Executor,
    function: Callable[[Task], Result],
    width: int,
    tasks: Iterable[Task],
    report: Callable[[], None],
    stop: Stop,
) -> Iterator[Result]:
    """Keep ``width`` tasks in hand, so that stopping never waits for more than those."""
    todo = iter(tasks)
    in_hand: set[Future[Result]] = set()
    while True:
        while len(in_hand) < width and not stop() and (task := next(todo, None)) is not None:
            in_hand.add(pool.submit(function, task))
        if not in_hand:
            return
        done, in_hand = wait(in_hand, timeout=POLL_S, return_when=FIRST_COMPLETED)
        report()
        for future in done:
            yield future.result()
