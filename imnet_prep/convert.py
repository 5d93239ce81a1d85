"""Sources to a records folder: the plan is carried out shard by shard, and committed as a whole.

Everything is written in ``<out>.partial/``. A shard is made in a folder of its own, read back, brought to the disk and
moved to its place; then its note in ``.work/done/`` says that it is there. So whatever stops the work, at most the
shards in hand are lost, and the same command goes on. The manifest comes last, and then the folder gets its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog, executors
from imnet_prep.errors import BudgetError, Interrupted, PlanError
from imnet_prep.files import file_digest, sync, write_atomically
from imnet_prep.manifest import MANIFEST, RECORDS, REJECTED, Manifest, SplitInfo, load_manifest, write_records
from imnet_prep.plan import Plan, PlanOptions, make_plan, shard_refs
from imnet_prep.shard_task import ShardResult, ShardTask, finished, lines_path
from imnet_prep.sources import Source, SourceInfo, SourceSummary, detect, merge, read
from imnet_prep.types import Progress, ProgressCallback, Rejected
from imnet_prep.validate import validate

WORK = ".work"
SAMPLE_IMAGES = 64  # timed for the estimate of --dry-run
_BUDGET = re.compile(r"(\d+)|(\d+(?:\.\d+)?)%")


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How a plan is carried out; nothing here changes a byte of the result.

    Attributes:
        workers: Worker processes, or None for one a core that this process may use.
        max_rejected: How many images may be rejected: a number, or a share as ``1%``.
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
    """What a conversion made; ``already_done`` where the folder was whole before."""

    manifest: Manifest
    path: Path
    bytes: int
    seconds: float
    already_done: bool

    def to_json(self) -> dict[str, Any]:
        """Give the object that ``--json`` prints."""
        splits = self.manifest.splits.values()
        images = sum(split.images for split in splits)
        rejected: Counter[str] = Counter()
        for split in splits:
            rejected.update(split.rejected)
        return {
            "images": images,
            "rejected": dict(rejected),
            "shards": sum(len(split.shards) for split in splits),
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(images / self.seconds, 1) if self.seconds > 0 and not self.already_done else 0.0,
            "manifest": str(self.path / MANIFEST),
            "already_done": self.already_done,
        }


def convert(
    paths: Sequence[Path],
    out: Path,
    split: str | None,
    plan_options: PlanOptions,
    options: ConvertOptions,
    progress: ProgressCallback,
    stop: Callable[[], bool],
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
    with _work_folder(out) as partial:
        plan = _plan(sources, partial / WORK, plan_options, progress)
        done = _already_done(out, plan, options)
        if done is not None:
            return ConvertResult(done, out, stored_bytes(done), time.monotonic() - started, True)
        _resume_or_start(out, partial, plan, options)
        infos = [source.info(progress) for source in sources]
        _check_space(partial, plan)
        results = _run(partial, plan, options, progress, stop)
        manifest = _commit(partial, plan, infos, results)
        publish(partial, out)
    return ConvertResult(manifest, out, stored_bytes(manifest), time.monotonic() - started, False)


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
) -> Preview:
    """Make the plan, time a few images of it, and write nothing that stays.

    Raises:
        SourceError: A source is missing, empty, damaged or of no known layout.
        PlanError: A class list cannot be read.
    """
    sources = detect(paths, split)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(prefix="imnet-prep-") as folder:
        plan = _plan(sources, Path(folder), plan_options, progress)
        seconds = _estimate_seconds(plan) / (options.workers or len(os.sched_getaffinity(0)))
    return Preview(plan, tuple(source.summary() for source in sources), seconds, shutil.disk_usage(parent).free)


def _estimate_seconds(plan: Plan) -> float:
    """Check a few images of each split and scale their time by the bytes."""
    total = 0.0
    for split, part in plan.splits.items():
        refs = shard_refs(plan.database, split, 0, min(part.images, SAMPLE_IMAGES))
        started = time.perf_counter()
        for ref in refs:
            raw = read(ref)
            if not isinstance(raw, Rejected):
                validate(raw, plan.options.store)
        total += (time.perf_counter() - started) * part.bytes / max(1, sum(ref.size_bytes for ref in refs))
    return total


def _plan(sources: Sequence[Source], folder: Path, options: PlanOptions, progress: ProgressCallback) -> Plan:
    fresh = folder / "plan.new"
    plan = make_plan(merge(sources), fresh, options, progress)
    database = folder / "plan.sqlite"
    os.replace(fresh, database)
    return Plan(**{**{name: getattr(plan, name) for name in Plan.__slots__}, "database": database})


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """Take ``<out>.partial`` for this process alone; leave nothing where nothing was begun."""
    partial = out.with_name(out.name + ".partial")
    work = partial / WORK
    begun = work.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{partial}: cannot be made", got=str(error), remedy="choose another --out") from error
    lock = (work / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise PlanError(f"{partial}: another conversion is at work there", remedy="wait for it, or stop it") from error
    try:
        yield partial
    except BaseException:
        if not begun and not (work / "plan.json").exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.close()


def _already_done(out: Path, plan: Plan, options: ConvertOptions) -> Manifest | None:
    if not out.exists() or options.force:
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    if not out.is_dir() or not (out / MANIFEST).exists():
        raise PlanError(f"{out}: is there already and holds no records", remedy="choose another --out, or --force")
    manifest = load_manifest(out)
    if manifest.plan != plan.digest:
        raise PlanError(
            f"{out}: holds the result of another plan (other images, options or seed)",
            expected=f"plan {plan.digest[:12]}",
            got=f"plan {manifest.plan[:12] or 'none'}",
            remedy="choose another --out, or --force to replace it once the new one is whole",
        )
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    return manifest


def _resume_or_start(out: Path, partial: Path, plan: Plan, options: ConvertOptions) -> None:
    work = partial / WORK
    note = work / "plan.json"
    if note.exists():
        begun = json.loads(note.read_text(encoding="utf-8"))["plan"]
        if begun != plan.digest and not options.force:
            raise PlanError(
                f"{partial}: holds an unfinished conversion with another plan (other images, options or seed)",
                expected=f"plan {plan.digest[:12]}",
                got=f"plan {begun[:12]}",
                remedy="repeat its command to go on with it, or --force to start over",
            )
        if begun != plan.digest:
            for item in [*partial.iterdir(), *work.iterdir()]:
                if item.name not in (WORK, "lock", plan.database.name):
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
    for folder in (work / "tmp", work / "done", *(partial / split for split in plan.splits)):
        folder.mkdir(exist_ok=True)
    for left in (work / "tmp").iterdir():
        shutil.rmtree(left, ignore_errors=True)
    write_atomically(note, json.dumps({"plan": plan.digest}).encode())


def _check_space(partial: Path, plan: Plan) -> None:
    """Refuse to begin what cannot end; not for images to be shrunk, as their stored size is unknown."""
    if plan.options.store.short_side is not None:
        return
    there = sum(file.stat().st_size for split in plan.splits for file in (partial / split).iterdir())
    missing = plan.bytes - there - shutil.disk_usage(partial).free
    if missing > 0:
        raise _disk_full(partial, missing)


def _disk_full(partial: Path, missing: int) -> PlanError:
    return PlanError(
        f"{partial}: the disk is full",
        expected=f"about {missing:,} more bytes free",
        remedy="free them and run the same command again: finished shards are kept",
    )


def _tasks(partial: Path, plan: Plan) -> list[ShardTask]:
    labels = {name: label for label, name in enumerate(plan.classes)}
    return [
        ShardTask(
            folder=partial.absolute(),
            split=split,
            number=number,
            name=plan.shard_name(split, number),
            first=part.bounds[number],
            last=part.bounds[number + 1],
            layout=part.layout,
            store=plan.options.store,
            labels=labels,
        )
        for split, part in plan.splits.items()
        for number in range(part.shards)
    ]


def _run(
    partial: Path, plan: Plan, options: ConvertOptions, progress: ProgressCallback, stop: Callable[[], bool]
) -> list[ShardResult]:
    """Carry out what is not done; gives the results of all shards in the order of the plan."""
    tasks = _tasks(partial, plan)
    results = {task.name: result for task in tasks if (result := finished(task)) is not None}
    found = plan.images + len(plan.rejected)
    allowed = options.allowed(found)

    def check_budget() -> None:
        rejected = [*plan.rejected, *(item for result in results.values() for item in result.rejected)]
        if len(rejected) > allowed:
            raise _over_budget(partial, rejected, found, options)

    kept_images = sum(result.images + len(result.rejected) for result in results.values())
    kept_rejected = len(plan.rejected) + sum(len(result.rejected) for result in results.values())

    def report(images: int, size: int, rejected: int) -> None:
        counts = (("rejected", kept_rejected + rejected),)
        progress(Progress(min(plan.images, kept_images + images), plan.images, "images", size, counts))

    check_budget()
    todo = [task for task in tasks if task.name not in results]
    try:
        for result in executors.run(todo, options.workers, options.scheduler, report, stop):
            results[result.name] = result
            check_budget()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise PlanError(f"{partial}: a shard could not be written", got=str(error)) from error
        stored = sum(r.info.size_bytes + r.info.index_size_bytes for r in results.values() if r.info is not None)
        missing = max(plan.bytes - stored - shutil.disk_usage(partial).free, 1 << 20)
        raise _disk_full(partial, missing) from error
    if len(results) < len(tasks):
        raise Interrupted(
            f"stopped after {len(results)} of {len(tasks)} shards", remedy="run the same command again to go on"
        )
    return [results[task.name] for task in tasks]


def _over_budget(partial: Path, rejected: list[Rejected], found: int, options: ConvertOptions) -> BudgetError:
    write_rejected(partial / REJECTED, rejected)
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(r.reason for r in rejected).most_common(4))
    return BudgetError(
        f"{len(rejected)} of {found} images rejected ({reasons}); the first: {rejected[0].file_name}",
        expected=f"at most {options.max_rejected} (--max-rejected)",
        remedy=f"see {partial / REJECTED}; mend the source, or allow more and run again: finished shards are kept",
    )


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Write ``rejected.jsonl``, sorted."""
    lines = [
        json.dumps(asdict(item), sort_keys=True, ensure_ascii=False)
        for item in sorted(rejected, key=lambda item: (item.split, item.file_name, item.reason))
    ]
    write_atomically(path, "".join(line + "\n" for line in lines).encode())


def _commit(partial: Path, plan: Plan, infos: Sequence[SourceInfo], results: Sequence[ShardResult]) -> Manifest:
    """Write the lists and, last, the manifest."""
    rejected = [*plan.rejected, *(item for result in results for item in result.rejected)]
    if not any(result.images for result in results):
        raise _over_budget(partial, rejected, plan.images + len(plan.rejected), ConvertOptions(max_rejected="0"))
    write_rejected(partial / REJECTED, rejected)
    splits: dict[str, SplitInfo] = {}
    seen = np.empty(0, np.uint64)
    for split in plan.splits:
        mine = [result for result in results if result.split == split]
        splits[split], seen = split_info(partial, plan, split, mine, rejected, seen)
    words = dict(catalog.synsets())
    manifest = Manifest(
        classes=plan.classes,
        class_words=tuple(words.get(name, "") for name in plan.classes),
        label_space=plan.label_space,
        label_convention=plan.label_convention,
        seed=plan.options.seed,
        options=plan.options.content(),
        sources=tuple(sorted((asdict(info) for info in infos), key=lambda info: json.dumps(info, sort_keys=True))),
        made_with={name: version(name) for name in ("imnet-prep", "opencv-python-headless", "pillow")},
        plan=plan.digest,
        splits=splits,
        rejected=file_entry(partial, REJECTED),
    )
    write_atomically(partial / MANIFEST, manifest.to_bytes())
    return manifest


def file_entry(folder: Path, name: str) -> dict[str, Any]:
    """Give name, size and digest of a file, as the manifest records them."""
    path = folder / name
    return {"file": name, "size_bytes": path.stat().st_size, "sha256": file_digest(path)}


def split_info(
    partial: Path,
    plan: Plan,
    split: str,
    results: Sequence[ShardResult],
    rejected: Sequence[Rejected],
    seen: NDArray[np.uint64],
) -> tuple[SplitInfo, NDArray[np.uint64]]:
    """Join the shards of a split; ``seen`` are the first 8 bytes of the source digests of the splits before."""
    stored = [result for result in results if result.info is not None]
    counts = np.zeros(len(plan.classes), np.int64)
    digests: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    changes: Counter[str] = Counter()

    def lines() -> Iterator[str]:
        for number, result in enumerate(stored):
            values = [json.loads(line) for line in lines_path(partial, result.name).read_bytes().splitlines()]
            labels = np.array([value["label"] for value in values], np.int64)
            np.add.at(counts, labels[labels >= 0], 1)
            digests.append(np.array([int(value["source_sha256"][:16], 16) for value in values], np.uint64))
            for value in values:
                changes.update(value.get("changes", ()))
                yield json.dumps({**value, "shard": number}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    path = partial / split / RECORDS
    write_records(path, lines())
    sync(path)
    images = sum(result.images for result in results)
    unique = np.unique(np.concatenate(digests))
    fresh = int(np.count_nonzero(~np.isin(unique, seen)))
    mine = Counter(item.reason.value for item in rejected if item.split == split)
    layout = plan.splits[split].layout
    info = SplitInfo(
        found=images + sum(mine.values()),
        images=images,
        rejected=dict(mine),
        changes=dict(changes),
        duplicates=images - fresh,
        class_counts=tuple(int(count) for count in counts),
        header_size=layout.header_size,
        page_size=layout.page_size,
        records=file_entry(partial, f"{split}/{RECORDS}"),
        shards=tuple(result.info for result in stored if result.info is not None),
    )
    return info, np.union1d(seen, unique)


def publish(partial: Path, out: Path) -> None:
    """Give the whole folder its name; an older one goes only now."""
    shutil.rmtree(partial / WORK)
    sync(partial)
    old = out.with_name(out.name + ".replaced")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def stored_bytes(manifest: Manifest) -> int:
    """Add up data files and indexes."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return sum(shard.size_bytes + shard.index_size_bytes for shard in shards)
