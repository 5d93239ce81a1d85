"""A job to a records folder: its plan is carried out shard by shard, and committed as a whole.

Everything is written in ``<out>.partial/`` (see :mod:`.workdir`). A shard is made in a folder of its own,
read back, brought to the disk and moved to its place; then its note in ``.work/done/`` says that it is there. So
whatever stops the work, at most the shards in hand are lost, and the same command goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from imnet_prep.build import executors
from imnet_prep.build.commit import assemble
from imnet_prep.build.plan import Plan, PlanOptions, load_plan
from imnet_prep.build.shard_task import ShardResult, ShardTask, finished, tasks_of
from imnet_prep.build.workdir import (
    Workspace,
    begin,
    check_begun,
    check_out,
    finished_before,
    hold,
    publish_folder,
)
from imnet_prep.errors import BudgetError, Interrupted, PlanError
from imnet_prep.files import write_atomically
from imnet_prep.process_pool import process_count
from imnet_prep.records.manifest import MANIFEST, Manifest
from imnet_prep.records.publish import BUILD_WORK
from imnet_prep.records.record_list import REJECTED, rejected_bytes
from imnet_prep.records.shards import Layout
from imnet_prep.types import Progress, ProgressCallback, Reason, Rejected, Stop

LOG = logging.getLogger(__name__)
LAYOUTS = "layouts.json"  # in .work: how often each split's layout was doubled, where it had to be
_BUDGET = re.compile(r"(\d+)|(\d+(?:\.\d+)?)%")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How a plan is carried out; nothing here changes a byte of the result.

    Attributes:
        workers: Worker processes, or None for one a core that this process may use.
        max_rejected: How many images may be rejected: a number, or a share as ``1%``. Those that
            ``--duplicates reject`` keeps out were asked for, and do not count.
        executor: ``local`` or ``dask``.
        scheduler: Address of the Dask scheduler.
        force: Start over where another plan was begun, and replace a finished folder once the new one is whole.
    """

    workers: int | None = None
    max_rejected: str = "1%"
    executor: str = "local"
    scheduler: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        process_count(self.workers)  # raises where it is out of range
        if not _BUDGET.fullmatch(self.max_rejected):
            raise PlanError(
                "--max-rejected is not a budget", expected="a number or a share as 1%", got=self.max_rejected
            )
        if self.executor not in executors.EXECUTORS:
            raise PlanError("unknown --executor", expected=" or ".join(executors.EXECUTORS), got=self.executor)
        if (self.executor == "dask") != (self.scheduler is not None):
            raise PlanError("--executor dask and --scheduler go together", expected="both, or neither")

    def allowed(self, found: int) -> float:
        """Return how many of ``found`` images may be rejected."""
        match = _BUDGET.fullmatch(self.max_rejected)
        assert match is not None  # checked at construction
        return float(match[1]) if match[1] else found * float(match[2]) / 100


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion made.

    Attributes:
        manifest: Of the whole folder.
        path: The folder.
        seconds: What this run took.
        images_now: Images that this run read; the rest was there before.
        notes: What a person should know of the sources.
        already_done: The folder was whole before.
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
        }


class Job(Protocol):
    """What is converted: sources, or other records folders."""

    paths: Sequence[Path]

    def plan(self, space: Workspace, progress: ProgressCallback) -> Plan:
        """Make the plan in the workspace, or take the one begun."""

    def state(self, space: Workspace, progress: ProgressCallback) -> dict[str, Any]:
        """Describe the inputs for the note of the plan: ``inputs`` (see :func:`begin`), ``infos`` and ``notes``."""

    def seal(self, space: Workspace, manifest: Manifest) -> Manifest:
        """Check what was written against what was read, and return the manifest as it is to be written."""
        return manifest


def carry_out(job: Job, out: Path, options: ConvertOptions, progress: ProgressCallback, stop: Stop) -> ConvertResult:
    """Make a records folder: plan, shards, lists, manifest, name.

    Raises:
        PlanError: ``out`` is in use, or holds something else; the disk is full; a worker was killed.
        BudgetError: More images were rejected than ``options.max_rejected``.
        Interrupted: ``stop`` said so; what is finished is kept.
    """
    started = time.monotonic()
    space = check_out(out, job.paths, force=options.force)
    told = heeding(progress, stop)
    with named_failures(space), hold(space) as published:
        plan = job.plan(space, told)
        done = finished_before(space, plan, force=options.force and not published)
        if done is not None:
            return ConvertResult(done, out, time.monotonic() - started, 0, (), already_done=True)
        check_begun(space, plan, force=options.force)
        _check_space(space, plan)
        state = job.state(space, told)
        plan = begin(space, plan, state, force=options.force)
        results, layouts, images_now = _run(space, plan, options, progress, stop)
        manifest = job.seal(space, assemble(space.partial, plan, layouts, state["infos"], results))
        write_atomically(space.partial / MANIFEST, manifest.to_bytes(), stage=space.work)
        publish_folder(space)
    return ConvertResult(manifest, out, time.monotonic() - started, images_now, tuple(state["notes"]), False)


def heeding(progress: ProgressCallback, stop: Stop) -> ProgressCallback:
    """Return a progress callback that raises `Interrupted` when ``stop()`` is true, for before the first shard."""

    def told(state: Progress) -> None:
        if stop():
            raise Interrupted("stopped before the first shard", remedy="run the same command again")
        progress(state)

    return told


@contextmanager
def named_failures(space: Workspace) -> Iterator[None]:
    """Turn failures of the file system into one line: a full disk says how much is missing."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(space, load_plan(space.database, PlanOptions())) from error
        raise PlanError(
            f"{os.fsdecode(error.filename or space.partial)}: cannot be written or read",
            got=error.strerror or str(error),
            remedy="mend that and run the same command again: finished shards are kept",
        ) from error


def _stored_bytes(space: Workspace, plan: Plan) -> int:
    return sum(file.stat().st_size for split in plan.splits for file in (space.partial / split).glob("*"))


def _disk_full(space: Workspace, plan: Plan | None) -> PlanError:
    missing = 1 << 20
    if plan is not None:
        needed = sum(part.stored_bytes for part in plan.splits.values()) - _stored_bytes(space, plan)
        missing = max(missing, needed - shutil.disk_usage(space.out.parent).free)
    return PlanError(
        f"{space.partial}: the disk is full",
        expected=f"about {missing:,} more bytes free",
        remedy="free them and run the same command again: finished shards are kept",
    )


def _check_space(space: Workspace, plan: Plan) -> None:
    """Refuse to begin what cannot end; not for images to be shrunk, as their stored size is not known."""
    free = shutil.disk_usage(space.partial).free
    if plan.options.store.short_side is None and plan.bytes - _stored_bytes(space, plan) > free:
        raise _disk_full(space, plan)


# --- the work --------------------------------------------------------------------------------------------------------


def _run(
    space: Workspace, plan: Plan, options: ConvertOptions, progress: ProgressCallback, stop: Stop
) -> tuple[list[ShardResult], dict[str, Layout], int]:
    """Carry out what is not done; where a row does not fit its page, once more with larger pages for its split.

    Returns:
        The results of all shards in the order of the plan, the layout of each split, and the images read now.
    """
    path = space.work / LAYOUTS
    doubled, images_now = Counter[str](json.loads(path.read_bytes()) if path.exists() else {}), 0
    while True:
        layouts = {split: part.layout.grown(doubled[split]) for split, part in plan.splits.items()}
        results, more, images = _run_tasks(space, plan, tasks_of(plan, space.partial, layouts), options, progress, stop)
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
    space: Workspace,
    plan: Plan,
    tasks: Sequence[ShardTask],
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Stop,
) -> tuple[list[ShardResult], Counter[str], int]:
    """Carry out the tasks that are not finished; also gives the doublings needed by split, and the images read."""
    results = {task.name: result for task in tasks if (result := finished(task)) is not None}
    budget = _Budget(space, plan, options)
    for result in results.values():
        budget.spend(result.rejected)
    kept_images = sum(result.images + len(result.rejected) for result in results.values())
    kept_rejected, more = len(budget.rejected), Counter[str]()

    def report(images: int, size: int, rejected: int) -> None:
        done, counts = min(plan.images, kept_images + images), (("rejected", kept_rejected + rejected),)
        progress(Progress(done, plan.images, "images", size, counts))

    todo = [task for task in tasks if task.name not in results]
    work = executors.run(todo, options.workers, options.scheduler, report, lambda: stop() or bool(more))
    try:
        with closing(work):
            for result in work:
                if result.doublings:
                    more[result.split] = max(more[result.split], result.doublings)
                else:
                    results[result.name] = result
                    budget.spend(result.rejected)
    finally:
        for left in (space.work / "tmp").glob("*"):  # of workers that were killed
            shutil.rmtree(left, ignore_errors=True)
    done_now = sum(result.images + len(result.rejected) for result in results.values()) - kept_images
    if len(results) < len(tasks) and (stop() or not more):
        raise Interrupted(
            f"stopped after {len(results)} of {len(tasks)} shards", remedy="run the same command again to go on"
        )
    if not more and not any(result.images for result in results.values()):
        raise budget.exceeded()
    return [results[task.name] for task in tasks if task.name in results], more, done_now


class _Budget:
    """Counts what is rejected, and stops the work where it is more than allowed."""

    def __init__(self, space: Workspace, plan: Plan, options: ConvertOptions) -> None:
        self.rejected: list[Rejected] = []
        self._path = space.partial / REJECTED
        self._found = plan.images + len(plan.rejected)
        self._allowed, self._budget = options.allowed(self._found), options.max_rejected
        self._spent = 0
        self.spend(plan.rejected)

    def spend(self, rejected: Sequence[Rejected]) -> None:
        self.rejected += rejected
        self._spent += sum(item.reason is not Reason.DUPLICATE for item in rejected)
        if self._spent > self._allowed:
            raise self.exceeded()

    def exceeded(self) -> BudgetError:
        write_atomically(self._path, rejected_bytes(self.rejected), stage=self._path.parent / BUILD_WORK)
        counted = [item for item in self.rejected if item.reason is not Reason.DUPLICATE] or self.rejected
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(r.reason for r in counted).most_common(4))
        return BudgetError(
            f"{len(counted)} of {self._found} images rejected ({reasons}); the first: {counted[0].file_name}",
            expected=f"at most {self._budget} (--max-rejected)",
            remedy=f"see {self._path}; mend the source, or allow more and run again: finished shards are kept",
        )
