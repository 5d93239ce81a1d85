"""Run a job that makes a records folder: carry out its plan shard by shard, and publish the result as a whole.

Everything is written to ``<out>.partial/`` (see :mod:`.workdir`). A shard is written in a folder of its own, read back,
flushed and moved to its place. Then a note in ``.work/done/`` records it. An interruption loses at most the shards in
progress, and the same command continues.
"""

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from imnet_prep.build.commit import assemble
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.build.plan import Plan, load_plan
from imnet_prep.build.shard_task import ShardResult, ShardTask, finished, run_task, tasks_of
from imnet_prep.build.workdir import Workdir, begin, check_begun, check_out, finished_before, hold, publish_folder
from imnet_prep.cluster import run_tasks
from imnet_prep.errors import BudgetError, Interrupted, PlanError
from imnet_prep.files import is_disk_full, write_atomically
from imnet_prep.process_pool import process_count
from imnet_prep.records.manifest import MANIFEST, Manifest
from imnet_prep.records.record_list import REJECTED, rejected_bytes
from imnet_prep.records.shards import Layout
from imnet_prep.types import Progress, ProgressCallback, Reason, Rejected, Stop

LOG = logging.getLogger(__name__)
LAYOUTS = "layouts.json"  # in .work: how often the layout of a split was doubled


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """The result of a conversion.

    Attributes:
        manifest: The manifest of the folder.
        path: The folder.
        seconds: The duration of this run.
        images_now: Images that this run read; earlier runs read the others.
        notes: Messages about the sources.
        already_done: The folder was finished before.
    """

    manifest: Manifest
    path: Path
    seconds: float
    images_now: int
    notes: tuple[str, ...]
    already_done: bool

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        splits = self.manifest.splits.values()
        shards = [shard for split in splits for shard in split.shards]
        skipped = [source["skipped_bytes"] for source in self.manifest.sources if "skipped_bytes" in source]
        return {
            "images": sum(split.images for split in splits),
            "rejected": dict(sum((Counter(split.rejected) for split in splits), Counter())),
            "shards": len(shards),
            "bytes": sum(shard.size_bytes + shard.index_size_bytes for shard in shards),
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.images_now / self.seconds, 1) if self.seconds > 0 else 0.0,
            "manifest": str(self.path / MANIFEST),
            "already_done": self.already_done,
            "notes": list(self.notes),
            **({"skipped_bytes": sum(skipped)} if skipped else {}),
        }


class Job(Protocol):
    """The conversion of sources, or of other records folders."""

    paths: Sequence[Path]

    def plan(self, workdir: Workdir, progress: ProgressCallback) -> Plan:
        """Make the plan in the working folder, or return the one begun."""

    def describe(self, workdir: Workdir, progress: ProgressCallback) -> dict[str, Any]:
        """Describe the inputs: ``inputs`` to recognize them (see :func:`begin`), ``infos`` and ``notes``."""

    def close(self) -> None:
        """End what goes on in the background."""
        return

    def seal(self, workdir: Workdir, manifest: Manifest) -> Manifest:
        """Check the shards against the inputs, and return the manifest to be written."""
        return manifest


def run_job(job: Job, out: Path, options: ConvertOptions, progress: ProgressCallback, stop: Stop) -> ConvertResult:
    """Make a records folder: the plan, the shards, the lists, the manifest, and then its name.

    Raises:
        PlanError: ``out`` is in use or holds other files; the disk is full; a worker was killed.
        BudgetError: More images were rejected than ``options.max_rejected``.
        Interrupted: ``stop`` returned True; finished shards are kept.
    """
    started = time.monotonic()
    workdir, report = check_out(out, job.paths, force=options.force), interruptible(progress, stop)
    with named_failures(workdir), closing(job), hold(workdir) as published:
        plan = job.plan(workdir, report)
        done = finished_before(workdir, plan, force=options.force and not published)
        if done is not None:
            return ConvertResult(done, out, time.monotonic() - started, 0, (), already_done=True)
        check_begun(workdir, plan, force=options.force)
        growth = plan.bytes - _stored_bytes(workdir, plan)
        # Not for images that are to be shrunk: their stored size is not known.
        if plan.options.store.short_side is None and growth > shutil.disk_usage(workdir.partial).free:
            raise _disk_full(workdir, plan)
        inputs = job.describe(workdir, report)
        plan = begin(workdir, plan, inputs, force=options.force)
        results, layouts, images_now = _run(workdir, plan, options, progress, stop)
        manifest = job.seal(workdir, assemble(workdir.partial, plan, layouts, inputs["infos"], results))
        write_atomically(workdir.partial / MANIFEST, manifest.to_bytes(), stage=workdir.work)
        publish_folder(workdir)
    return ConvertResult(manifest, out, time.monotonic() - started, images_now, tuple(inputs["notes"]), False)


def interruptible(progress: ProgressCallback, stop: Stop) -> ProgressCallback:
    """Return a progress callback that raises `Interrupted` when ``stop()`` is true, for before the first shard."""

    def report(state: Progress) -> None:
        if stop():
            raise Interrupted("stopped before the first shard", remedy="run the same command again")
        progress(state)

    return report


@contextmanager
def named_failures(workdir: Workdir) -> Iterator[None]:
    """Turn an error of the file system into one line; for a full disk it says how much space is missing."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full(workdir, load_plan(workdir.database, PlanOptions())) from error
        raise PlanError(
            f"{os.fsdecode(error.filename or workdir.partial)}: cannot be written or read",
            got=error.strerror or str(error),
            remedy="repair that and run the same command again: finished shards are kept",
        ) from error


def _stored_bytes(workdir: Workdir, plan: Plan) -> int:
    return sum(file.stat().st_size for split in plan.splits for file in (workdir.partial / split).glob("*"))


def _disk_full(workdir: Workdir, plan: Plan | None) -> PlanError:
    missing = 1 << 20
    if plan is not None:
        needed = sum(part.stored_bytes for part in plan.splits.values()) - _stored_bytes(workdir, plan)
        missing = max(missing, needed - shutil.disk_usage(workdir.out.parent).free)
    return PlanError(
        f"{workdir.partial}: the disk is full",
        expected=f"about {missing:,} more bytes free",
        remedy="free them and run the same command again: finished shards are kept",
    )


# --- the work --------------------------------------------------------------------------------------------------------


def _run(
    workdir: Workdir, plan: Plan, options: ConvertOptions, progress: ProgressCallback, stop: Stop
) -> tuple[list[ShardResult], dict[str, Layout], int]:
    """Write all shards; where a row does not fit its page, write its split again with larger pages.

    Returns:
        The results of all shards in the order of the plan, the layout of each split, and the images read now.
    """
    path = workdir.work / LAYOUTS
    doubled, images_now = Counter[str](json.loads(path.read_bytes()) if path.exists() else {}), 0
    while True:
        layouts = {split: part.layout.grown(doubled[split]) for split, part in plan.splits.items()}
        results, more, images = _run_tasks(
            workdir, plan, tasks_of(plan, workdir.partial, layouts), options, progress, stop
        )
        images_now += images
        if not more:
            return results, layouts, images_now
        doubled.update(more)
        for split in more:
            if plan.splits[split].layout.grown(doubled[split]) == layouts[split]:
                raise PlanError(f"a shard of {split} cannot be laid out", remedy="use more shards (--shards)")
        LOG.info("larger pages are needed: writing the shards of %s again", ", ".join(more))
        write_atomically(path, json.dumps(doubled).encode())


def _run_tasks(
    workdir: Workdir,
    plan: Plan,
    tasks: Sequence[ShardTask],
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Stop,
) -> tuple[list[ShardResult], Counter[str], int]:
    """Carry out the unfinished tasks; return all results, the doublings needed by split, and the images read now."""
    results = {task.name: result for task in tasks if (result := finished(task)) is not None}
    budget = _Budget(workdir, plan, options)
    for result in results.values():
        budget.spend(result.rejected)
    kept_images = sum(result.images + len(result.rejected) for result in results.values())
    kept_rejected, total, more = len(budget.rejected), plan.images, Counter[str]()

    def report(images: int, size: int, rejected: int) -> None:
        done, counts = min(total, kept_images + images), (("rejected", kept_rejected + rejected),)
        progress(Progress(done, total, "images", size, counts))

    todo = [task for task in tasks if task.name not in results]
    width = min(process_count(options.workers), len(todo))
    work = run_tasks(
        run_task, todo, width, options.scheduler, report, lambda: stop() or bool(more),
        task="shard", remedy="run the same command again: finished shards are kept",
    )  # fmt: skip
    try:
        with closing(work):
            for result in work:
                if result.doublings:
                    more[result.split] = max(more[result.split], result.doublings)
                else:
                    results[result.name] = result
                    budget.spend(result.rejected)
    finally:
        for left in (workdir.work / "tmp").glob("*"):  # of workers that were killed
            shutil.rmtree(left, ignore_errors=True)
    if len(results) < len(tasks) and (stop() or not more):
        raise Interrupted(
            f"stopped after {len(results)} of {len(tasks)} shards", remedy="run the same command again to continue"
        )
    if not more and not any(result.images for result in results.values()):
        raise budget.exceeded()
    images_now = sum(result.images + len(result.rejected) for result in results.values()) - kept_images
    return [results[task.name] for task in tasks if task.name in results], more, images_now


class _Budget:
    """Count the rejected images, and stop the work if there are more than allowed."""

    def __init__(self, workdir: Workdir, plan: Plan, options: ConvertOptions) -> None:
        self.rejected: list[Rejected] = []
        self._workdir, self._options = workdir, options
        self._found, self._spent = plan.images + len(plan.rejected), 0
        self.spend(plan.rejected)

    def spend(self, rejected: Sequence[Rejected]) -> None:
        self.rejected += rejected
        self._spent += sum(item.reason is not Reason.DUPLICATE for item in rejected)
        if self._spent > self._options.allowed(self._found):
            raise self.exceeded()

    def exceeded(self) -> BudgetError:
        path = self._workdir.partial / REJECTED
        counted = [item for item in self.rejected if item.reason is not Reason.DUPLICATE] or self.rejected
        write_atomically(path, rejected_bytes(self.rejected), stage=self._workdir.work)
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(r.reason for r in counted).most_common(4))
        return BudgetError(
            f"{len(counted)} of {self._found} images rejected ({reasons}); the first: {counted[0].file_name}",
            expected=f"at most {self._options.max_rejected} (--max-rejected)",
            remedy=f"see {path}; repair the source, or allow more and run again: finished shards are kept",
        )
