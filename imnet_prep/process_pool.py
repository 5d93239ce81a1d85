"""A pool of processes for tasks of any kind, made as they are wanted, with a count of how far each one is.

Workers are spawned (not forked: the threads of OpenCV and MindSpore do not survive that), leave the terminal's signals
to the parent, and die with it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from imnet_prep.cpu import cpu_count
from imnet_prep.errors import PlanError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int, int, int], None]  # images, bytes and bad ones since the last call
POLL_S = 0.2
SMALL_BYTES = 64 << 20  # hashed before a second process has started
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_live: Any = None  # in a worker: images, bytes and bad ones of each task in hand, shared with the parent


def process_count(asked: int | None) -> int:
    """Return the number of processes asked for, or one a core that this process may use.

    Raises:
        PlanError: Less than one was asked for.
    """
    if asked is not None and asked < 1:
        raise PlanError("--workers is out of range", expected="1 or more", got=str(asked))
    return asked or cpu_count()


def worker_count(asked: int | None, size_bytes: int) -> int:
    """Choose a number of processes for work that is little more than copying and hashing some bytes."""
    return process_count(asked) if asked is not None or size_bytes >= SMALL_BYTES else 1


def run_processes(
    function: Callable[[Task, Advance], Result],
    tasks: Iterable[Task],
    width: int,
    report: Advance,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Result, None, None]:
    """Carry out tasks and give each result as it comes, in any order.

    At most ``width`` tasks are in hand and no other is made yet, so memory does not grow with their number. Close the
    iterator (:func:`contextlib.closing`) where it is not read to its end: the workers are killed then.

    Args:
        function: What a worker does with a task; from a module. It says now and then how far it is.
        tasks: Taken one by one as workers come free.
        width: Number of processes; for 1 the work is done in this one, which is there already.
        report: Told the totals of this run so far: images, bytes and bad ones.
        stop: Once true, no further task begins; those in hand are finished and given.

    Raises:
        PlanError: A worker process was killed.
    """
    if width <= 1:
        yield from _run_here(function, tasks, report, stop)
        return
    context = multiprocessing.get_context("spawn")
    live = context.RawArray("q", 3 * width)  # no lock: a worker killed while it holds one would stop all others
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(width, context, _begin_worker, (live, os.getpid()))
    finished = False
    try:
        yield from drive(pool, partial(_counted, function), live, iter(tasks), report, stop)
        finished = True
    except BrokenProcessPool as error:
        raise PlanError(
            "a worker process was killed (out of memory?)",
            remedy="run the same command again, with fewer --workers if memory is short",
        ) from error
    finally:
        if not finished:  # workers ignore SIGTERM, so the pool's own clean-up after a death would wait for ever
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
        pool.shutdown(cancel_futures=True)


def _run_here(
    function: Callable[[Task, Advance], Result], tasks: Iterable[Task], report: Advance, stop: Callable[[], bool]
) -> Iterator[Result]:
    total = [0, 0, 0]

    def advance(images: int, size: int, bad: int) -> None:
        total[:] = [total[0] + images, total[1] + size, total[2] + bad]
        report(*total)

    for task in tasks:
        if stop():
            return
        yield function(task, advance)


def _begin_worker(live: Any, parent: int) -> None:
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


def _counted(function: Callable[[Task, Advance], Result], task: Task, slot: int) -> Result:
    """Carry out a task that reports its progress through the memory shared with the parent."""

    def advance(images: int, size: int, bad: int) -> None:
        for position, value in enumerate((images, size, bad), 3 * slot):
            _live[position] += value

    return function(task, advance)


def drive(
    pool: Executor,
    function: Callable[[Task, int], Result],
    live: Any,
    todo: Iterator[Task],
    report: Advance,
    stop: Callable[[], bool],
) -> Generator[Result, None, None]:
    """Keep as many tasks in hand as there are slots of three in ``live``, so that stopping waits for no more."""
    free = list(range(len(live) // 3))
    in_hand: dict[Future[Result], int] = {}
    total = [0, 0, 0]
    while True:
        while free and not stop() and (task := next(todo, None)) is not None:
            slot = free.pop()
            live[3 * slot : 3 * slot + 3] = [0, 0, 0]
            in_hand[pool.submit(function, task, slot)] = slot
        if not in_hand:
            return
        done, _ = wait(in_hand, timeout=POLL_S, return_when=FIRST_COMPLETED)
        for future in done:
            slot = in_hand.pop(future)
            total = [total[part] + live[3 * slot + part] for part in range(3)]
            free.append(slot)
        report(*(total[part] + sum(live[3 * slot + part] for slot in in_hand.values()) for part in range(3)))
        yield from (future.result() for future in done)
