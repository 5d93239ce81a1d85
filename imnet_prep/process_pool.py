"""Start worker processes, and carry out tasks in a pool of them with progress.

Workers are spawned on every system: the threads of OpenCV and MindSpore do not survive a fork. They leave the signals
of the terminal to the parent, and die with it.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from imnet_prep.cpu import cpu_count
from imnet_prep.errors import PlanError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int, int, int], None]  # images, bytes and bad ones since the last call
SPAWN = multiprocessing.get_context("spawn")
# What Ctrl-C, a supervisor, a closed terminal, and Ctrl-Break (on Windows alone) send.
STOP_SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")]
MAX_PROCESSES = 30 if sys.platform == "win32" else 1000  # Windows waits for 63 handles at once; a download needs 2 each
POLL_S = 0.2
SMALL_BYTES = 64 << 20  # hashed before a second process has started
_live: Any = None  # in a worker: images, bytes and bad ones of each task in hand, shared with the parent
_M_MMAP_THRESHOLD, _LARGE_BUFFER_BYTES = -3, 4 << 20  # malloc.h


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a command to stop; under ``nohup``, a closed terminal does not."""
    return [number for number in STOP_SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]


def begin_worker() -> None:
    """Prepare a spawned process for work: it ignores the signals, uses one thread, and dies with its parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True, name="parent").start()
    import cv2

    cv2.setNumThreads(1)  # the processes share the cores already
    gc.freeze()  # what was imported stays: it is not looked through at every collection


def return_large_buffers() -> None:
    """Let a process of many threads return each buffer of over 4 MiB to the system as soon as it is free.

    By default, glibc keeps buffers of up to 32 MiB once it has seen such a one, in a heap of each thread: 2 GiB.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BUFFER_BYTES)


def _die_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def process_count(asked: int | None) -> int:
    """Return the number of processes asked for, by default one per usable core.

    Raises:
        PlanError: Less than one was asked for.
    """
    if asked is not None and asked < 1:
        raise PlanError("--workers is out of range", expected="1 or more", got=str(asked))
    return min(asked or cpu_count(), MAX_PROCESSES)


def in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Yield results that come with their number, from 0, by number."""
    early: dict[int, Result] = {}
    wanted = 0
    for number, result in results:
        early[number] = result
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


def worker_count(asked: int | None, size_bytes: int) -> int:
    """Return the number of processes for work that mostly copies and hashes: one where there is little of it."""
    return process_count(asked) if asked is not None or size_bytes >= SMALL_BYTES else 1


def run_processes(
    function: Callable[[Task, Advance], Result],
    tasks: Iterable[Task],
    width: int,
    report: Advance,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[Result, None, None]:
    """Carry out tasks and yield each result when it is there, in any order.

    At most ``width`` tasks are taken at a time, so memory does not grow with their number. Close the iterator
    (:func:`contextlib.closing`) if you do not read it to its end: that kills the workers.

    Args:
        function: Carries out a task; must be importable. It reports its progress through its second argument.
        tasks: Taken one by one as workers become free.
        width: Number of processes; with 1 the work is done in this process.
        report: Called with the totals of this run so far: images, bytes and bad ones.
        stop: Once it returns true, no further task begins; those in hand are finished and yielded.

    Raises:
        PlanError: A worker process was killed.
    """
    if width <= 1:
        yield from _run_here(function, tasks, report, stop)
        return
    live = SPAWN.RawArray("q", 3 * width)  # no lock: a worker killed while it holds one would stop all others
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(width, SPAWN, _begin_counted, (live,))
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


def _begin_counted(live: Any) -> None:
    global _live  # noqa: PLW0603, a process-wide handle is what an initializer is for
    _live = live
    begin_worker()


def _counted(function: Callable[[Task, Advance], Result], task: Task, slot: int) -> Result:
    """Carry out a task that reports its progress through shared memory."""

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
    """Carry out tasks in a pool, at most one for each slot of three numbers in ``live``, so that a stop is quick."""
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
