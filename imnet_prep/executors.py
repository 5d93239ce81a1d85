"""Who carries out the shard tasks: a pool of processes here, or Dask workers on machines that share the folder."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from imnet_prep.errors import PlanError
from imnet_prep.shard_task import ShardResult, ShardTask, run_task

EXECUTORS = ("local", "dask")
POLL_S = 0.2
CONNECT_S = 20
Report = Callable[[int, int, int], None]  # images, bytes and rejected of this run so far
Stop = Callable[[], bool]
_live: Any = None  # in a worker process: images, bytes and rejected of each task in hand, shared with the parent
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(
    tasks: Sequence[ShardTask], workers: int | None, scheduler: str | None, report: Report, stop: Stop
) -> Generator[ShardResult, None, None]:
    """Carry out tasks, in any order, and give each result as it comes.

    Close the iterator (:func:`contextlib.closing`) where it is not read to its end: local workers are killed then.

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
        return
    if scheduler is None:
        yield from _run_local(tasks, workers or len(os.sched_getaffinity(0)), report, stop)
    else:
        yield from _run_dask(tasks, scheduler, report, stop)


def _run_local(
    tasks: Sequence[ShardTask], workers: int, report: Report, stop: Stop
) -> Generator[ShardResult, None, None]:
    context = multiprocessing.get_context("spawn")
    width = min(workers, len(tasks))
    live = context.RawArray("q", 3 * width)  # no lock: a worker killed while it holds one would stop all others
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(width, context, _begin_worker, (live, os.getpid()))
    finished = False
    try:
        yield from _drive(pool, _run_counted, live, tasks, report, stop)
        finished = True
    except BrokenProcessPool as error:
        raise PlanError(
            "a worker process was killed (out of memory?)",
            remedy="run the same command again, with fewer --workers if memory is short: finished shards are kept",
        ) from error
    finally:
        if not finished:  # workers ignore SIGTERM, so the pool's own clean-up after a death would wait for ever
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
        pool.shutdown(cancel_futures=True)


def _begin_worker(live: Any, parent: int) -> None:
    """Leave signals of the terminal to the parent, die with it, and do not multiply threads."""
    global _live  # noqa: PLW0603, a process-wide handle is what an initializer is for
    _live = live
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    import cv2

    cv2.setNumThreads(1)


def _run_counted(task: ShardTask, slot: int) -> ShardResult:
    def advance(images: int, size: int, rejected: int) -> None:
        for position, value in enumerate((images, size, rejected)):
            _live[3 * slot + position] += value

    return run_task(task, advance)


def _run_uncounted(task: ShardTask, slot: int) -> ShardResult:
    return run_task(task, lambda images, size, rejected: None)


def _run_dask(
    tasks: Sequence[ShardTask], scheduler: str, report: Report, stop: Stop
) -> Generator[ShardResult, None, None]:
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise PlanError("--executor dask: Dask is not installed", remedy="pip install 'imnet-prep[dask]'") from error
    try:
        client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--scheduler {scheduler}: cannot be reached", got=str(error) or f"no answer in {CONNECT_S} s"
        ) from error
    again = "run the same command again: finished shards are kept"
    with client:
        width = sum(client.nthreads().values())
        if not width:
            raise PlanError(f"--scheduler {scheduler}: has no workers", remedy="start `dask worker` processes")
        done = [0, 0]

        def told(results: Iterator[ShardResult]) -> Generator[ShardResult, None, None]:
            for result in results:
                done[0] += result.images + len(result.rejected)
                done[1] += len(result.rejected)
                report(done[0], 0, done[1])
                yield result

        pool = client.get_executor(pure=False)
        try:
            yield from told(_drive(pool, _run_uncounted, [0] * (3 * width), tasks, lambda *_: None, stop))
        except KilledWorker as error:
            raise PlanError("Dask workers died again and again on one shard", got=str(error), remedy=again) from error
        except CancelledError as error:
            raise PlanError(f"--scheduler {scheduler}: was lost", got=str(error), remedy=again) from error


def _drive(
    pool: Executor,
    function: Callable[[ShardTask, int], ShardResult],
    live: Any,
    tasks: Sequence[ShardTask],
    report: Report,
    stop: Stop,
) -> Generator[ShardResult, None, None]:
    """Keep as many tasks in hand as there are slots of three in ``live``, so that stopping waits for no more."""
    todo = iter(tasks)
    free = list(range(len(live) // 3))
    in_hand: dict[Future[ShardResult], int] = {}
    total = [0, 0, 0]
    while True:
        while free and not stop() and (task := next(todo, None)) is not None:
            slot = free.pop()
            live[3 * slot : 3 * slot + 3] = [0, 0, 0]
            in_hand[pool.submit(function, task, slot)] = slot
        if not in_hand:
            return
        done, _ = wait(in_hand, timeout=POLL_S, return_when=FIRST_COMPLETED)
        report(*(total[part] + sum(live[3 * slot + part] for slot in in_hand.values()) for part in range(3)))
        for future in done:
            slot = in_hand.pop(future)
            total = [total[part] + live[3 * slot + part] for part in range(3)]
            live[3 * slot : 3 * slot + 3] = [0, 0, 0]
            free.append(slot)
        for future in done:
            yield future.result()
