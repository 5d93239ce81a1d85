"""Sources to a records folder: the plan is carried out shard by shard, and committed as a whole.

Everything is written in ``<out>.partial/`` (see :mod:`imnet_prep.workspace`). A shard is made in a folder of its own,
read back, brought to the disk and moved to its place; then its note in ``.work/done/`` says that it is there. So
whatever stops the work, at most the shards in hand are lost, and the same command goes on.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from imnet_prep import executors
from imnet_prep.commit import commit, write_rejected
from imnet_prep.errors import BudgetError, ImnetError, Interrupted, PlanError
from imnet_prep.files import write_atomically
from imnet_prep.plan import Plan, PlanOptions, load_plan, make_plan, shard_refs
from imnet_prep.records.manifest import MANIFEST, Manifest
from imnet_prep.records.shards import Layout
from imnet_prep.shard_task import ShardResult, ShardTask, finished, tasks_of
from imnet_prep.sources import Source, SourceInfo, SourceSummary, detect, merge, read
from imnet_prep.types import Progress, ProgressCallback, Reason, Rejected
from imnet_prep.validate import validate
from imnet_prep.workers import process_count
from imnet_prep.workspace import (
    DIGESTS,
    PLAN_FRESH,
    REJECTED,
    Workspace,
    begin,
    check_begun,
    check_out,
    finished_before,
    hold,
    is_full,
    publish,
)

LOG = logging.getLogger(__name__)
LAYOUTS = "layouts.json"  # in .work: how often each split's layout was doubled, where it had to be
SAMPLE_IMAGES = 64  # timed for the estimate of --dry-run
_BUDGET = re.compile(r"(\d+)|(\d+(?:\.\d+)?)%")
Stop = Callable[[], bool]


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
        if self.workers is not None and self.workers < 1:
            raise PlanError("--workers is out of range", expected="1 or more", got=str(self.workers))
        if not _BUDGET.fullmatch(self.max_rejected):
            raise PlanError(
                "--max-rejected is not a budget", expected="a number or a share as 1%", got=self.max_rejected
            )
        if self.executor not in executors.EXECUTORS:
            choices = " or ".join(executors.EXECUTORS)
            raise PlanError("unknown --executor", expected=choices, got=self.executor)
        if (self.executor == "dask") != (self.scheduler is not None):
            raise PlanError("--executor dask and --scheduler go together", expected="both, or neither")

    def allowed(self, found: int) -> float:
        """Give how many of ``found`` images may be rejected."""
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
        """Give the object that ``--json`` prints."""
        splits = self.manifest.splits.values()
        rejected: Counter[str] = Counter()
        for split in splits:
            rejected.update(split.rejected)
        shards = [shard for split in splits for shard in split.shards]
        return {
            "images": sum(split.images for split in splits),
            "rejected": dict(rejected),
            "shards": len(shards),
            "bytes": sum(shard.size_bytes + shard.index_size_bytes for shard in shards),
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.images_now / self.seconds, 1) if self.seconds > 0 else 0.0,
            "manifest": str(self.path / MANIFEST),
            "already_done": self.already_done,
            "notes": list(self.notes),
        }


def convert(
    paths: Sequence[Path],
    out: Path,
    split: str | None,
    plan_options: PlanOptions,
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Stop,
) -> ConvertResult:
    """Convert sources to a records folder.

    Args:
        paths: Archives and folders, in any order.
        out: The records folder to make.
        split: Where a source does not say which split it is.
        plan_options: What shapes the result.
        options: How it is carried out.
        progress: Told of images found, hashed and stored.
        stop: Asked between shards whether to leave after those in hand.

    Raises:
        SourceError: A source is missing, empty, damaged or of no known layout.
        PlanError: ``out`` is in use, or holds something else; the disk is full; a worker was killed.
        BudgetError: More images were rejected than ``options.max_rejected``.
        Interrupted: ``stop`` said so; what is finished is kept.
    """
    started = time.monotonic()
    sources = detect(paths, split)
    space = check_out(out, paths, force=options.force)
    heeding = _heeding(progress, stop)
    with _named_failures(space), hold(space):
        key = _archive_key(sources, split, plan_options)
        plan = _plan(space, sources, key, plan_options, heeding)
        if (done := finished_before(space, plan, force=options.force)) is not None:
            return ConvertResult(done, out, time.monotonic() - started, 0, (), already_done=True)
        check_begun(space, plan, force=options.force)
        _check_space(space, plan)
        infos, notes = _source_infos(space, sources, heeding)
        for note in notes:
            LOG.warning("%s", note)
        state = {"inputs": [asdict(info) for info in infos], "key": key, "notes": notes}
        plan = begin(space, plan, state, force=options.force)
        results, layouts, images_now = _run(space, plan, options, progress, stop)
        manifest = commit(space.partial, plan, layouts, infos, results)
        publish(space)
    return ConvertResult(manifest, out, time.monotonic() - started, images_now, tuple(notes), already_done=False)


def _heeding(progress: ProgressCallback, stop: Stop) -> ProgressCallback:
    """Give a progress callback that leaves when it is asked to, for the time before there is anything to finish."""

    def told(state: Progress) -> None:
        if stop():
            raise Interrupted("stopped before the first shard", remedy="run the same command again")
        progress(state)

    return told


@contextmanager
def _named_failures(space: Workspace) -> Iterator[None]:
    """Turn failures of the file system into one line: a full disk says how much is missing."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            where = error.filename or space.partial
            raise PlanError(
                f"{where if isinstance(where, str | Path) else os.fsdecode(where)}: cannot be written or read",
                got=error.strerror or str(error),
                remedy="mend that and run the same command again: finished shards are kept",
            ) from error
        plan = None
        with suppress(ImnetError):
            plan = load_plan(space.database, PlanOptions())
        raise _disk_full(space, plan) from error


def _disk_full(space: Workspace, plan: Plan | None) -> PlanError:
    missing = 1 << 20
    if plan is not None:
        there = sum(file.stat().st_size for split in plan.splits for file in (space.partial / split).glob("*"))
        needed = sum(part.stored_bytes for part in plan.splits.values())
        missing = max(missing, needed - there - shutil.disk_usage(space.out.parent).free)
    return PlanError(
        f"{space.partial}: the disk is full",
        expected=f"about {missing:,} more bytes free",
        remedy="free them and run the same command again: finished shards are kept",
    )


def _check_space(space: Workspace, plan: Plan) -> None:
    """Refuse to begin what cannot end; not for images to be shrunk, as their stored size is not known."""
    there = sum(file.stat().st_size for split in plan.splits for file in (space.partial / split).glob("*"))
    if plan.options.store.short_side is None and plan.bytes - there > shutil.disk_usage(space.partial).free:
        raise _disk_full(space, plan)


# --- the plan and the sources ----------------------------------------------------------------------------------------


def _file_state(path: Path) -> list[Any] | None:
    """Tell a file from what may stand under its name later; None for a folder."""
    if path.is_dir():
        return None
    state = path.stat()
    return [str(path.absolute()), state.st_size, state.st_mtime_ns, state.st_ino]


def _archive_key(sources: Sequence[Source], split: str | None, options: PlanOptions) -> str | None:
    """Give what a plan of archives depends on; None where there is a folder, which must be listed again."""
    states = [_file_state(source.path) for source in sources]
    if None in states:
        return None
    return json.dumps([states, split, options.content(), options.seed, options.label_names()], sort_keys=True)


def _plan(
    space: Workspace, sources: Sequence[Source], key: str | None, options: PlanOptions, progress: ProgressCallback
) -> Plan:
    """Make the plan, or take the one begun where all sources are archives that were not touched since."""
    begun = space.begun()
    if key is not None and begun is not None and begun.get("key") == key:
        plan = load_plan(space.database, options)
        if plan is not None and plan.digest == begun["plan"]:
            return plan
    return make_plan(merge(sources), space.work / PLAN_FRESH, options, progress)


def _source_infos(
    space: Workspace, sources: Sequence[Source], progress: ProgressCallback
) -> tuple[list[SourceInfo], list[str]]:
    """Describe the sources, and give their notes; the digests of an archive are remembered while it is not touched."""
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads((space.work / DIGESTS).read_bytes())
    infos: list[SourceInfo] = []
    notes: list[str] = []
    for source in sources:
        state = json.dumps([source.kind, _file_state(source.path)])
        if state not in known or source.path.is_dir():
            info = source.info(progress)
            known[state] = {"info": asdict(info), "notes": list(source.notes)}
            write_atomically(space.work / DIGESTS, json.dumps(known).encode())
        infos.append(SourceInfo(**known[state]["info"]))
        notes += known[state]["notes"]
    return infos, notes


# --- the work --------------------------------------------------------------------------------------------------------


def _run(
    space: Workspace, plan: Plan, options: ConvertOptions, progress: ProgressCallback, stop: Stop
) -> tuple[list[ShardResult], dict[str, Layout], int]:
    """Carry out what is not done; where a row does not fit its page, once more with larger pages for its split.

    Returns:
        The results of all shards in the order of the plan, the layout of each split, and the images read now.
    """
    path = space.work / LAYOUTS
    doubled: dict[str, int] = json.loads(path.read_bytes()) if path.exists() else {}
    images_now = 0
    while True:
        layouts = {split: part.layout.grown(doubled.get(split, 0)) for split, part in plan.splits.items()}
        tasks = tasks_of(plan, space.partial, layouts)
        results, more, images = _run_tasks(space, plan, tasks, options, progress, stop)
        images_now += images
        if not more:
            return results, layouts, images_now
        for split, doublings in more.items():
            doubled[split] = doubled.get(split, 0) + doublings
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
) -> tuple[list[ShardResult], dict[str, int], int]:
    """Carry out the tasks that are not finished; also gives the doublings needed by split, and the images read."""
    results = {task.name: result for task in tasks if (result := finished(task)) is not None}
    budget = _Budget(space, plan, options)
    for result in results.values():
        budget.spend(result.rejected)
    kept_images = sum(result.images + len(result.rejected) for result in results.values())
    kept_rejected = len(budget.rejected)
    more: dict[str, int] = {}

    def report(images: int, size: int, rejected: int) -> None:
        counts = (("rejected", kept_rejected + rejected),)
        progress(Progress(min(plan.images, kept_images + images), plan.images, "images", size, counts))

    todo = [task for task in tasks if task.name not in results]
    work = executors.run(todo, options.workers, options.scheduler, report, lambda: stop() or bool(more))
    try:
        with closing(work):
            for result in work:
                if result.doublings:
                    more[result.split] = max(more.get(result.split, 0), result.doublings)
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
        write_rejected(self._path, self.rejected)
        counted = [item for item in self.rejected if item.reason is not Reason.DUPLICATE] or self.rejected
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(r.reason for r in counted).most_common(4))
        return BudgetError(
            f"{len(counted)} of {self._found} images rejected ({reasons}); the first: {counted[0].file_name}",
            expected=f"at most {self._budget} (--max-rejected)",
            remedy=f"see {self._path}; mend the source, or allow more and run again: finished shards are kept",
        )


# --- the preview -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preview:
    """What ``--dry-run`` says: the plan, what it will cost, and what was noticed on the way."""

    plan: Plan
    sources: tuple[SourceSummary, ...]
    seconds: float
    disk_free: int

    def to_json(self) -> dict[str, Any]:
        """Give the object that ``--json`` prints."""
        return {
            "sources": [
                {"kind": source.kind, "name": source.name, "notes": list(source.notes)} for source in self.sources
            ],
            "images": self.plan.images,
            "classes": len(self.plan.classes),
            "shards": sum(part.shards for part in self.plan.splits.values()),
            "rejected": dict(Counter(item.reason.value for item in self.plan.rejected)),
            "splits": {
                name: {
                    "images": part.images,
                    "shards": part.shards,
                    "bytes": part.bytes,
                    "page_size": part.layout.page_size,
                }
                for name, part in self.plan.splits.items()
            },
            "bytes": self.plan.bytes,
            "seconds_estimated": round(self.seconds, 1),
            "disk_needed": sum(part.stored_bytes for part in self.plan.splits.values()),
            "disk_free": self.disk_free,
            "label_convention": self.plan.label_convention,
        }


def dry_run(
    paths: Sequence[Path],
    out: Path,
    split: str | None,
    plan_options: PlanOptions,
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Stop,
) -> Preview:
    """Make the plan, time a few images of it, and write nothing that stays.

    Raises:
        SourceError: A source is missing, empty, damaged or of no known layout.
        PlanError: A class list cannot be read, or ``out`` cannot be made.
        Interrupted: ``stop`` said so.
    """
    sources = detect(paths, split)
    space = check_out(out, paths, force=options.force)
    parent = next(folder for folder in space.out.parents if folder.exists())
    with _named_failures(space), tempfile.TemporaryDirectory(prefix="imnet-prep-") as folder:
        plan = make_plan(merge(sources), Path(folder) / "plan", plan_options, _heeding(progress, stop))
        seconds = _estimate_seconds(plan) / process_count(options.workers)
    return Preview(plan, tuple(source.summary() for source in sources), seconds, shutil.disk_usage(parent).free)


def _estimate_seconds(plan: Plan) -> float:
    """Check a few images of each split and scale their time by the bytes."""
    total = 0.0
    for part in plan.splits.values():
        refs = list(islice(shard_refs(plan.database, part.first, part.first + part.images), SAMPLE_IMAGES))
        started = time.perf_counter()
        for ref in refs:
            raw = read(ref)
            if not isinstance(raw, Rejected):
                validate(raw, plan.options.store)
        total += (time.perf_counter() - started) * part.bytes / max(1, sum(ref.size_bytes for ref in refs))
    return total
