"""Records folders to one with another number of shards, merged, filtered or with classes renamed: no image is touched.

The images are taken from the shards as from any other source, by the same plan: an image's place is its rank by a keyed
hash of its name, so the result depends on what is in the folders and on nothing else. That every record arrived is
proved by a digest over all of them that does not depend on their order, taken from the lists before and from the files
after.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imnet_prep.commit import commit
from imnet_prep.errors import IntegrityError, Interrupted, PlanError
from imnet_prep.files import sqlite_failure, write_atomically
from imnet_prep.plan import Plan, PlanOptions, make_plan, read_names, shard_refs
from imnet_prep.proof import Proof, prove
from imnet_prep.records.manifest import MANIFEST, Manifest, RecordLine, load_manifest
from imnet_prep.records.shards import Layout, ShardWriter, Written
from imnet_prep.records_input import Input, read_renames, records_of, rejected_of
from imnet_prep.shard_task import PLAN_DATABASE, UNLABELLED, WORK, ShardResult, ShardTask, finished, run_task, tasks_of
from imnet_prep.sources import SourceInfo
from imnet_prep.types import ImageRef, Progress, ProgressCallback, Rejected, record_id
from imnet_prep.validate import ValidateOptions
from imnet_prep.workers import Advance, run_processes, worker_count
from imnet_prep.workspace import Workspace, begin, check_begun, check_out, finished_before, hold, publish

MAX_DOUBLINGS = 14


@dataclass(frozen=True, slots=True)
class ReshardOptions:
    """What is to become of the records.

    Attributes:
        shards: Number of shards of a split, or None for the usual number.
        seed: Of the order; None takes the first folder's.
        keep_classes: The path of a file of class names to keep, or None for all.
        rename_classes: The path of a file of ``old<TAB>new`` class names, or None.
        workers: Worker processes; one a usable core where None. Changes no byte.
        force: Replace a finished folder once the new one is whole.
    """

    shards: int | None = None
    seed: int | None = None
    keep_classes: Path | None = None
    rename_classes: Path | None = None
    workers: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class ReshardResult:
    """What was made; ``labels_unchanged`` where every class has the label that it had before."""

    manifest: Manifest
    path: Path
    proof: Proof
    labels_unchanged: bool
    seconds: float
    already_done: bool

    def to_json(self) -> dict[str, Any]:
        """Give the object that ``--json`` prints."""
        shards = [shard for split in self.manifest.splits.values() for shard in split.shards]
        return {
            "images": self.proof.records,
            "shards": len(shards),
            "bytes": sum(shard.size_bytes + shard.index_size_bytes for shard in shards),
            "seconds": round(self.seconds, 3),
            "proof": self.proof.digest,
            "labels_unchanged": self.labels_unchanged,
            "manifest": str(self.path / MANIFEST),
            "already_done": self.already_done,
        }


def reshard(
    folders: Sequence[Path],
    out: Path,
    options: ReshardOptions,
    progress: ProgressCallback,
    stop: Callable[[], bool] = lambda: False,
) -> ReshardResult:
    """Write the records of some folders into new shards.

    Args:
        folders: Records folders, in any order.
        out: The records folder to make.
        options: What is to become of them.
        progress: Told of records found, written and read again.
        stop: Asked between shards whether to leave after those in hand.

    Raises:
        RecordsError: A folder is missing or has no manifest.
        IntegrityError: A folder is damaged, or what was written does not prove equal.
        PlanError: ``out`` is in use or holds something else; two records have the same name.
        Interrupted: ``stop`` said so; the same command goes on.
    """
    started = time.monotonic()
    inputs = [Input(folder, load_manifest(folder)) for folder in sorted(folders)]
    space = check_out(out, folders, force=options.force)
    try:
        with hold(space):
            plan, before = _plan(space, inputs, options, progress)
            if (done := finished_before(space, plan, force=options.force)) is None:
                check_begun(space, plan, force=options.force)
                plan = begin(space, plan, {"inputs": None}, force=options.force)
                results, layouts = _run(space, plan, options, progress, stop)
                manifest = _commit(space, plan, layouts, inputs, results)
                after = prove(space.partial, manifest, options.workers, progress)
                _compare(out, before, after)
                publish(space)
            else:
                manifest, after = done, prove(space.out, done, options.workers, progress)
                _compare(out, before, after)
    except OSError as error:
        raise PlanError(f"{out}: cannot be written", got=error.strerror or str(error)) from error
    unchanged = all(_labels(item.manifest.classes).items() <= _labels(manifest.classes).items() for item in inputs)
    return ReshardResult(manifest, out, after, unchanged, time.monotonic() - started, done is not None)


def _labels(classes: Sequence[str]) -> dict[str, int]:
    return {name: label for label, name in enumerate(classes)}


def _compare(out: Path, before: Proof, after: Proof) -> None:
    if before != after:
        raise IntegrityError(
            f"{out}: what was written is not what was read",
            expected=f"{before.records} records of digest {before.digest[:16]}",
            got=f"{after.records} of {after.digest[:16]}",
            remedy="check the disk and memory of this machine, then run the same command again",
        )


# --- what is there ---------------------------------------------------------------------------------------------------


def _plan(
    space: Workspace, inputs: Sequence[Input], options: ReshardOptions, progress: ProgressCallback
) -> tuple[Plan, Proof]:
    """Make the plan, the table of record lines beside it, and the proof of what there is to be written."""
    renames = read_renames(options.rename_classes)
    names = space.work / "classes.txt"
    plan_options = _plan_options(inputs, options, renames, names)
    keep = None if options.keep_classes is None else frozenset(read_names(options.keep_classes))
    fresh, lines = space.work / "plan.new", space.work / "lines.new"
    proof = Proof()
    try:
        lines.unlink(missing_ok=True)
        with closing(sqlite3.connect(lines, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("CREATE TABLE found(record INTEGER, line TEXT)")
            connection.execute("BEGIN")

            def refs() -> Iterator[ImageRef | Rejected]:
                nonlocal proof
                for item in inputs:
                    for line, ref in records_of(item, renames):
                        if keep is None or not ref.class_name or ref.class_name in keep:
                            proof = proof.add(ref.split, ref.class_name, ref.file_name, line.sha256)
                            row = _signed_id(ref), replace(line, file_name=ref.file_name).to_json()
                            connection.execute("INSERT INTO found VALUES(?, ?)", row)
                        yield ref
                    yield from rejected_of(item, renames)

            plan = make_plan(refs(), fresh, plan_options, progress)
            connection.execute("COMMIT")
            # Into the plan itself, which is what outlives a change of mind about the rest of the work folder.
            connection.execute("ATTACH ? AS plan", (os.fsencode(fresh),))
            connection.execute("CREATE TABLE plan.line(record INTEGER PRIMARY KEY, line TEXT)")
            connection.execute("INSERT INTO plan.line SELECT record, line FROM found ORDER BY record")
    except sqlite3.Error as error:
        raise sqlite_failure(error, lines) from error
    finally:
        lines.unlink(missing_ok=True)
    return plan, proof


def _signed_id(ref: ImageRef) -> int:
    value = record_id(ref.split, ref.file_name)
    return value - (1 << 64) if value >= 1 << 63 else value


def _plan_options(
    inputs: Sequence[Input], options: ReshardOptions, renames: dict[str, str], names: Path
) -> PlanOptions:
    """Choose the label space so that labels stay where they can, and the options that shaped the images."""
    manifests = [item.manifest for item in inputs]
    first = manifests[0]
    same = all(manifest.classes == first.classes for manifest in manifests)
    splits = [split for manifest in manifests for split in manifest.splits.values()]
    counted = (
        [any(split.class_counts[label] for split in splits) for label in range(len(first.classes))] if same else []
    )
    found = same and list(first.classes) == sorted(first.classes) and all(counted)
    if unknown := sorted(set(renames) - {name for manifest in manifests for name in manifest.classes}):
        raise PlanError(f"{options.rename_classes}: classes that are not there", got=", ".join(unknown[:5]))
    if all(manifest.label_space == "imagenet1k" for manifest in manifests):
        label_space = "imagenet1k"
    elif not same or found or (first.label_space == "found" and (options.keep_classes or renames)):
        label_space = "found"
    else:
        label_space = str(names)
        renamed = dict.fromkeys(renames.get(name, name) for name in first.classes)
        names.write_text("".join(f"{name}\n" for name in renamed), encoding="utf-8")
    sides = {manifest.options.get("short_side") for manifest in manifests}
    store = ValidateOptions(short_side=sides.pop() if len(sides) == 1 else None)
    if store.short_side is not None and first.options.get("quality"):
        store = replace(store, quality=first.options["quality"])
    return PlanOptions(
        seed=first.seed if options.seed is None else options.seed,
        shards=options.shards,
        label_space=label_space,
        keep_classes=options.keep_classes,
        store=store,
    )


# --- the work --------------------------------------------------------------------------------------------------------


def _run(
    space: Workspace, plan: Plan, options: ReshardOptions, progress: ProgressCallback, stop: Callable[[], bool]
) -> tuple[list[ShardResult], dict[str, Layout]]:
    """Write the shards that are not there; where a header does not fit, once more with twice the sizes."""
    width = worker_count(options.workers, plan.bytes)
    for doublings in range(MAX_DOUBLINGS):
        layouts = {name: part.layout.grown(doublings) for name, part in plan.splits.items()}
        tasks = tasks_of(plan, space.partial, layouts)
        results = {task.name: result for task in tasks if (result := finished(task)) is not None}
        todo = [task for task in tasks if task.name not in results]
        kept = sum(result.images for result in results.values())

        def report(images: int, size: int, _bad: int, kept: int = kept) -> None:
            progress(Progress(min(plan.images, kept + images), plan.images, "images", size))

        small = False
        if todo:
            for result in run_processes(write_shard, todo, min(width, len(todo)), report, stop):
                small = small or bool(result.doublings)
                results[result.name] = result
        if small:
            continue
        if len(results) < len(tasks):
            raise Interrupted(f"stopped after {len(results)} of {len(tasks)} shards", remedy="run it again to go on")
        return [results[task.name] for task in tasks], layouts
    raise PlanError("a shard cannot be laid out", remedy="use more shards (--shards)")


def write_shard(task: ShardTask, advance: Advance) -> ShardResult:
    """Write one shard from images that lie in others; for a worker process."""
    return run_task(task, advance, _copy_rows)


def _copy_rows(task: ShardTask, path: Path, lines: Path, advance: Advance) -> tuple[Written | None, list[Rejected]]:
    """Copy each image, if its bytes are those that the record list says."""
    writer = ShardWriter(path, task.layout)
    descriptors: dict[str, int] = {}
    plan = task.folder / WORK / PLAN_DATABASE
    table = f"file:{quote(os.fsencode(plan))}?mode=ro&immutable=1"
    try:
        with (
            closing(sqlite3.connect(table, uri=True)) as found,
            lines.open("w", encoding="utf-8", newline="\n") as text,
        ):
            for ref in shard_refs(plan, task.first, task.last):
                if ref.path not in descriptors:
                    descriptors[ref.path] = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC)
                image = os.pread(descriptors[ref.path], ref.size_bytes, ref.offset)
                line = json.loads(
                    found.execute("SELECT line FROM line WHERE record = ?", (_signed_id(ref),)).fetchone()[0]
                )
                if hashlib.sha256(image).hexdigest() != line["sha256"]:
                    raise IntegrityError(
                        f"{ref.path}: row {line['row']} ({line['file_name']}) is not what was stored",
                        expected=f"SHA-256 {line['sha256'][:12]}",
                        remedy="restore the shard, or leave the record out",
                    )
                label = task.labels[ref.class_name] if ref.class_name else UNLABELLED
                record = RecordLine(**{**line, "shard": 0, "row": len(writer), "label": label,
                                       "changes": tuple(line.get("changes", ()))})  # fmt: skip
                writer.add(image, label, ref.file_name)
                text.write(record.to_json() + "\n")
                advance(1, len(image), 0)
            text.flush()
            os.fsync(text.fileno())
        return writer.finish(), []
    finally:
        writer.close()
        for descriptor in descriptors.values():
            os.close(descriptor)


def _commit(
    space: Workspace,
    plan: Plan,
    layouts: dict[str, Layout],
    inputs: Sequence[Input],
    results: Sequence[ShardResult],
) -> Manifest:
    """Write the lists and the manifest; what the inputs' manifests agree in stays as it was."""
    manifests = [item.manifest for item in inputs]
    infos = {json.dumps(source, sort_keys=True): source for manifest in manifests for source in manifest.sources}
    manifest = commit(space.partial, plan, layouts, [SourceInfo(**source) for source in infos.values()], results)
    agreed = {
        name: value
        for name, value in manifests[0].options.items()
        if name != "names"  # how adopted files spell theirs
        and all(other.options.get(name) == value for other in manifests)
    }
    options = {**manifest.options, **agreed, "shards": manifest.options["shards"]}
    if manifest.options["keep_classes"] is not None:
        options["keep_classes"] = manifest.options["keep_classes"]
    words = {name: word for m in manifests for name, word in zip(m.classes, m.class_words, strict=True)}
    manifest = replace(
        manifest,
        options=options,
        class_words=tuple(
            word or words.get(name, "") for name, word in zip(manifest.classes, manifest.class_words, strict=True)
        ),
        made_with=manifests[0].made_with
        if all(m.made_with == manifests[0].made_with for m in manifests)
        else manifest.made_with,
    )
    if manifest.classes == manifests[0].classes and len({m.label_space for m in manifests}) == 1:
        manifest = replace(
            manifest, label_space=manifests[0].label_space, label_convention=manifests[0].label_convention
        )
    write_atomically(space.partial / MANIFEST, manifest.to_bytes())
    return manifest
