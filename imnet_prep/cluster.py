"""Connect to the workers of a Dask cluster, and turn what ends its work into errors for the user."""

from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from imnet_prep.errors import PlanError

EXECUTORS = ("local", "dask")
CONNECT_S = 20


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
    except ImportError as error:
        raise PlanError("--executor dask: Dask is not installed", remedy="pip install 'imnet-prep[dask]'") from error
    try:
        client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--scheduler {scheduler}: cannot be reached", got=str(error) or f"no answer in {CONNECT_S} s"
        ) from error
    with client:
        if not client.nthreads():
            raise PlanError(f"--scheduler {scheduler}: has no workers", remedy="start `dask worker` processes")
        try:
            yield client
        except KilledWorker as error:
            raise PlanError(f"Dask workers died repeatedly on one {task}", got=str(error), remedy=remedy) from error
        except CancelledError as error:
            raise PlanError(f"--scheduler {scheduler}: was lost", got=str(error), remedy=remedy) from error
