"""One shard of a plan, from the bytes of its images to its files in place: the unit of work and of resuming.

A task is small and self-contained, so that any process on any machine that sees the folder can carry it out, twice if
need be: the result is the same bytes, and it is moved into place as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from imnet_prep.files import sync, write_atomically
from imnet_prep.manifest import RecordLine
from imnet_prep.mindrecord import LENGTH, index_path
from imnet_prep.plan import shard_refs
from imnet_prep.shards import Layout, ShardWriter, read_back
from imnet_prep.sources import read
from imnet_prep.types import ImageRef, Reason, Rejected, Sample, ShardInfo
from imnet_prep.validate import ValidateOptions, validate

REPORT_EVERY = 16  # images between two reports to the bar
Advance = Callable[[int, int, int], None]  # images, bytes, rejected since the last call


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to write.

    Attributes:
        folder: The ``.partial`` folder; the plan lies in its ``.work``.
        split: The split. number: Which of its shards, from 0.
        name: Path of the data file relative to ``folder``.
        first: Rank of its first image in the split. last: Rank after its last.
        layout: Sizes of the split's files.
        store: What an image must be, and how it is stored.
        labels: Label by class name.
    """

    folder: Path
    split: str
    number: int
    name: str
    first: int
    last: int
    layout: Layout
    store: ValidateOptions
    labels: dict[str, int]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A finished shard; ``info`` is None where every image of it was rejected, and there is no file."""

    name: str
    split: str
    images: int
    info: ShardInfo | None
    rejected: tuple[Rejected, ...]


def lines_path(folder: Path, name: str) -> Path:
    """Where the record lines of a finished shard wait for the commit."""
    return folder / ".work" / "done" / (Path(name).name + ".jsonl")


def _note_path(folder: Path, name: str) -> Path:
    return folder / ".work" / "done" / (Path(name).name + ".json")


def finished(task: ShardTask) -> ShardResult | None:
    """Give the result of a shard that is in place, or None."""
    try:
        note = json.loads(_note_path(task.folder, task.name).read_bytes())
        info = ShardInfo(**note["info"]) if note["info"] is not None else None
        rejected = tuple(Rejected(**{**item, "reason": Reason(item["reason"])}) for item in note["rejected"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if info is not None:
        data = task.folder / info.file
        sizes = {data: info.size_bytes, index_path(data): info.index_size_bytes}
        if any(not path.is_file() or path.stat().st_size != size for path, size in sizes.items()):
            return None
    return ShardResult(task.name, task.split, note["images"], info, rejected)


def run_task(task: ShardTask, advance: Advance) -> ShardResult:
    """Write one shard, read it back, and move it to its place.

    Raises:
        OSError: The disk is full or fails.
        IntegrityError: Reading back gave something else.
    """
    work = task.folder / ".work"
    temporary = work / "tmp" / uuid.uuid4().hex
    temporary.mkdir(parents=True)
    try:
        path = temporary / Path(task.name).name
        lines, rejected = _write(task, path, advance)
        info = read_back(path, task.name, [line.sha256 for line in lines]) if lines else None
        text = "".join(line.to_json() + "\n" for line in lines)
        write_atomically(lines_path(task.folder, task.name), text.encode())
        if info is not None:
            for source in (path, index_path(path)):  # another folder, the same base name: MindRecord allows that
                os.replace(source, task.folder / task.split / source.name)
            sync(task.folder / task.split)
        result = ShardResult(task.name, task.split, len(lines), info, tuple(rejected))
        note = asdict(result)
        write_atomically(_note_path(task.folder, task.name), json.dumps(note, sort_keys=True).encode())
        return result
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(task: ShardTask, path: Path, advance: Advance) -> tuple[list[RecordLine], list[Rejected]]:
    store = replace(task.store, max_bytes=min(task.store.max_bytes, task.layout.page_size - LENGTH.size))
    lines: list[RecordLine] = []
    rejected: list[Rejected] = []
    writer = ShardWriter(path, task.layout)
    try:
        pending = [0, 0, 0]
        for ref in shard_refs(task.folder / ".work" / "plan.sqlite", task.split, task.first, task.last):
            outcome = _check(ref, store)
            if isinstance(outcome, Rejected):
                rejected.append(outcome)
            else:
                label = task.labels[ref.class_name] if ref.class_name else -1
                writer.add(outcome.image, label, ref.file_name)
                lines.append(_line(outcome, label, len(lines)))
            pending = [pending[0] + 1, pending[1] + ref.size_bytes, pending[2] + isinstance(outcome, Rejected)]
            if pending[0] == REPORT_EVERY:
                advance(*pending)
                pending = [0, 0, 0]
        advance(*pending)
        if lines:
            writer.finish()
    finally:
        writer.close()
    return lines, rejected


def _check(ref: ImageRef, store: ValidateOptions) -> Sample | Rejected:
    raw = read(ref)
    return raw if isinstance(raw, Rejected) else validate(raw, store)


def _line(sample: Sample, label: int, row: int) -> RecordLine:
    return RecordLine(
        shard=0,  # known at the commit: a shard without a row has no file
        row=row,
        file_name=sample.ref.file_name,
        label=label,
        width=sample.width,
        height=sample.height,
        sha256=sample.sha256,
        source_sha256=sample.source_sha256,
        changes=tuple(change.value for change in sample.changes),
        url=sample.ref.url,
        status=sample.ref.status,
    )
