"""Run the shard tasks in a pool of processes here, or on Dask workers of machines that share the folder."""

from collections.abc import Generator, Sequence

from imnet_prep.build.shard_task import ShardResult, ShardTask, run_task
from imnet_prep.cluster import connected
from imnet_prep.process_pool import Advance, drive, process_count, run_processes
from imnet_prep.types import Stop


def run(
    tasks: Sequence[ShardTask], workers: int | None, scheduler: str | None, report: Advance, stop: Stop
) -> Generator[ShardResult, None, None]:
    """Carry out tasks in any order, and yield each result as it comes.

    Close the iterator (:func:`contextlib.closing`) if it is not read to its end; this kills the local workers.

    Args:
        tasks: The shards to write.
        workers: Processes of the local pool; None for one per core.
        scheduler: Address of a Dask scheduler, or None for the local pool.
        report: Called with the totals of images, bytes and rejected images so far.
        stop: Returns whether to begin no further task; those in progress are finished and yielded.

    Raises:
        PlanError: A worker process was killed, or Dask cannot be reached.
        OSError: The disk is full or fails.
    """
    width = min(process_count(workers), len(tasks))
    if width:
        yield from (
            run_processes(run_task, tasks, width, report, stop)
            if scheduler is None
            else _run_dask(tasks, scheduler, report, stop)
        )


def _run_uncounted(task: ShardTask, slot: int) -> ShardResult:
    return run_task(task, lambda images, size, rejected: None)


def _run_dask(
    tasks: Sequence[ShardTask], scheduler: str, report: Advance, stop: Stop
) -> Generator[ShardResult, None, None]:
    with connected(scheduler, "shard", "run the same command again: finished shards are kept") as client:
        width, images, rejected = sum(client.nthreads().values()), 0, 0
        pool = client.get_executor(pure=False)
        for result in drive(pool, _run_uncounted, [0] * (3 * width), iter(tasks), lambda *_: None, stop):
            images, rejected = images + result.images, rejected + len(result.rejected)
            report(images + rejected, 0, rejected)
            yield result
