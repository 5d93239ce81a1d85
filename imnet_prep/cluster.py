"""Run tasks on the workers of a Dask cluster, and turn what ends their work into errors for the user."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from imnet_prep.cpu import library_versions
from imnet_prep.errors import PlanError
from imnet_prep.process_pool import Advance, drive, run_processes
from imnet_prep.types import Stop

Task = TypeVar("Task")
Result = TypeVar("Result")
EXECUTORS = ("local", "dask")
CONNECT_S = 20
_LOOK_EVERY_S = 2.0  # for workers
_log = logging.getLogger(__name__)


def check_executor(executor: str, scheduler: str | None) -> None:
    """Check the values of ``--executor`` and ``--scheduler``.

    Raises:
        PlanError: The executor is not known, or one of the two is given without the other.
    """
    if executor not in EXECUTORS:
        raise PlanError("unknown --executor", expected=" or ".join(EXECUTORS), got=executor)
    if (executor == "dask") != (scheduler is not None):
        raise PlanError("--executor dask and --scheduler go together", expected="both, or neither")


@contextmanager
def connected(scheduler: str, task: str, remedy: str) -> Iterator[Any]:
    """Connect to a scheduler that has workers, and yield the Dask client.

    Args:
        scheduler: Address of the scheduler.
        task: What a worker does at a time, for messages: "shard".
        remedy: What to do when the work was cut short.

    Raises:
        PlanError: Dask is not installed, the scheduler cannot be reached, has no workers or is lost, or workers died
            again and again on the same task.
    """
    try:
        from distributed import Client, KilledWorker
        from distributed.comm import parse_address
        from distributed.comm.registry import get_backend
    except ImportError as error:
        raise PlanError("--executor dask: Dask is not installed", remedy="pip install 'imnet-prep[dask]'") from error
    try:
        get_backend(parse_address(scheduler)[0])  # a client that cannot begin complains of it when it is collected
        client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--scheduler {scheduler}: cannot be reached", got=str(error) or f"no answer in {CONNECT_S} s"
        ) from error
    with _closed(client):
        if not client.nthreads():
            raise PlanError(f"--scheduler {scheduler}: has no workers", remedy="start `dask worker` processes")
        try:
            yield client
        except KilledWorker as error:
            raise PlanError(f"Dask workers died repeatedly on one {task}", got=str(error), remedy=remedy) from error
        except CancelledError as error:
            raise PlanError(f"--scheduler {scheduler}: was lost", got=str(error), remedy=remedy) from error


@contextmanager
def _closed(client: Any) -> Iterator[None]:
    """Close a client at the end, without Dask's tracebacks for the tasks that are left: the caller knows why."""
    try:
        yield
    finally:
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            client.close()
        finally:
            logging.disable(before)


def this_worker() -> str:
    """Return the address of the Dask worker that runs the task."""
    from distributed import get_worker

    return str(get_worker().address)


def run_tasks(
    function: Callable[[Task, Advance], Result],
    tasks: Iterable[Task],
    width: int,
    scheduler: str | None,
    report: Advance,
    stop: Stop = lambda: False,
    *,
    task: str,
    remedy: str = "run the same command again",
) -> Generator[Result, None, None]:
    """Carry out tasks on Dask workers, or in processes of this machine, and yield each result when it is there.

    The results come in any order. Close the iterator (:func:`contextlib.closing`) if you do not read it to its end.

    Args:
        function: Carries out a task; must be importable. It reports its progress through its second argument.
        tasks: Taken one by one as workers become free.
        width: Number of processes of this machine; with 0 there are no tasks.
        scheduler: Address of a Dask scheduler, or None for this machine.
        report: Called with the totals of this run so far: images, bytes and bad ones.
        stop: Once it returns true, no further task begins; those in hand are finished and yielded.
        task: What a task is, for messages: "shard".
        remedy: What to do when the cluster cuts the work short.

    Raises:
        PlanError: A worker process was killed, or Dask cannot be used.
    """
    if scheduler is None or not width:
        yield from run_processes(function, tasks, width, report, stop)
        return
    with connected(scheduler, task, remedy) as client:
        slots, total, watch = sum(client.nthreads().values()), [0, 0, 0], WorkerWatch(client)
        pool = client.get_executor(pure=False)
        counted = partial(_counted, function, _version())

        def look(*_: int) -> None:
            watch.look()

        work = drive(pool, counted, [0] * (3 * slots), iter(tasks), look, stop)
        for result, counts in work:
            total = [before + more for before, more in zip(total, counts, strict=True)]
            report(*total)
            yield result


def _version() -> str:
    return library_versions("imnet-prep")["imnet-prep"]


def _counted(
    function: Callable[[Task, Advance], Result], version: str, task: Task, _slot: int
) -> tuple[Result, tuple[int, int, int]]:
    """Carry out a task on a worker; return its result, and how many images, bytes and bad ones it reported.

    Raises:
        PlanError: The worker has another version than the command.
    """
    if _version() != version:
        what, remedy = f"Dask worker {this_worker()}: another version of imnet-prep", "install one version everywhere"
        raise PlanError(what, expected=version, got=_version(), remedy=remedy)
    counts = (0, 0, 0)

    def advance(images: int, size: int, bad: int) -> None:
        nonlocal counts
        counts = (counts[0] + images, counts[1] + size, counts[2] + bad)

    result = function(task, advance)
    return result, counts


class WorkerWatch:
    """Tell the user when no worker is left: the tasks then wait for one."""

    def __init__(self, client: Any) -> None:
        self._client, self._looked_at, self._is_alone = client, time.monotonic(), False

    def look(self) -> bool:
        """Return whether no worker is left, as of at most two seconds ago; warn when the last one has gone."""
        if time.monotonic() - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            try:
                is_alone = not self._client.nthreads()
            except OSError:  # the scheduler is lost, which the tasks tell
                return self._is_alone
            if is_alone and not self._is_alone:
                _log.warning("no Dask worker is left (their logs say why); waiting for one")
            self._is_alone = is_alone
        return self._is_alone
