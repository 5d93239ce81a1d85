"""Write one shard of a plan: the unit of work and of resuming.

A task is small and self-contained. Any process on any machine that sees the folder can carry it out, even twice: the
result is the same bytes, and it is moved into place as a whole.
"""

import hashlib
import json
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from imnet_prep.build.plan import Plan, shard_refs
from imnet_prep.errors import IntegrityError, PlanError
from imnet_prep.files import rename, sync, write_atomically
from imnet_prep.images.check import ValidateOptions, validate
from imnet_prep.images.thumbnail import thumbnail
from imnet_prep.process_pool import Advance
from imnet_prep.records.mindrecord import index_path
from imnet_prep.records.publish import BUILD_WORK
from imnet_prep.records.record_list import RecordLine
from imnet_prep.records.shards import Layout, LayoutTooSmall, ShardWriter, Written, read_back
from imnet_prep.sources import read
from imnet_prep.types import ImageRef, RawImage, Rejected, ShardInfo

PLAN_NOTE, PLAN_DATABASE = "plan.json", "plan.sqlite"
UNLABELLED = -1  # the label of the test split
REPORT_EVERY = 16  # images: each report passes through the whole command
MAX_THUMBNAILS = 16  # of a shard's rejected images: a broken source must not fill rejected.jsonl with pictures


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to write.

    Attributes:
        folder: The ``.partial`` folder; the plan is in its ``.work``.
        split: The split. name: Path of the data file relative to ``folder``.
        first: Place of its first image in the plan. last: Place after its last.
        layout: Sizes of the split's files.
        store: The limits of an image, and how it is stored.
        labels: Label by class name.
        plan: Digest of the plan: a leftover worker must not touch the folder of another one.
    """

    folder: Path
    split: str
    name: str
    first: int
    last: int
    layout: Layout
    store: ValidateOptions
    labels: dict[str, int]
    plan: str


def tasks_of(plan: Plan, folder: Path, layouts: dict[str, Layout]) -> list[ShardTask]:
    """Return the tasks of a plan, in its order.

    Args:
        plan: The plan.
        folder: The ``.partial`` folder.
        layouts: By split.
    """
    labels = {name: label for label, name in enumerate(plan.classes)}
    return [
        ShardTask(
            folder=folder,
            split=split,
            name=f"{split}/{split}-{number:05d}-of-{part.shards:05d}.mindrecord",
            first=part.first + part.bounds[number],
            last=part.first + part.bounds[number + 1],
            layout=layouts[split],
            store=plan.options.store,
            labels=labels,
            plan=plan.digest,
        )
        for split, part in plan.splits.items()
        for number in range(part.shards)
    ]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The result of a task.

    Attributes:
        name: As in the task. split: Likewise.
        images: Records stored.
        info: The files in place; None if every image was rejected, or the layout is too small.
        rejected: Images rejected.
        doublings: How often at least the layout must be doubled to fit the shard; usually 0.
    """

    name: str
    split: str
    images: int
    info: ShardInfo | None
    rejected: tuple[Rejected, ...]
    doublings: int = 0


def done_path(folder: Path, name: str, ending: str) -> Path:
    """Return the path of the note (``.json``) or record lines (``.jsonl``) of a finished shard."""
    return folder / BUILD_WORK / "done" / (Path(name).name + ending)


def finished(task: ShardTask) -> ShardResult | None:
    """Return the result of a shard that is already in place, or None."""
    try:
        note = json.loads(done_path(task.folder, task.name, ".json").read_bytes())
        if note.pop("plan") != task.plan or Layout(**note.pop("layout")) != task.layout:
            return None
        info = ShardInfo(**note["info"]) if note["info"] is not None else None
        done_path(task.folder, task.name, ".jsonl").stat()
        if info is not None:
            data = task.folder / info.file
            if (data.stat().st_size, index_path(data).stat().st_size) != (info.size_bytes, info.index_size_bytes):
                return None
        return ShardResult(**{**note, "info": info, "rejected": tuple(map(Rejected.from_json, note["rejected"]))})
    except (OSError, ValueError, KeyError, TypeError, PlanError):
        return None


def run_task(task: ShardTask, advance: Advance) -> ShardResult:
    """Write one shard, read it back, and move it to its place.

    Args:
        task: The shard.
        advance: Called with the images read, their bytes, and those rejected since the last call.

    Raises:
        OSError: The disk is full or fails, or the folder is missing.
        IntegrityError: The shard reads back differently, or a record of another folder has changed.
        PlanError: The folder belongs to another plan now.
    """
    temporary = task.folder / BUILD_WORK / "tmp" / uuid.uuid4().hex
    temporary.mkdir()
    try:
        path, lines = temporary / Path(task.name).name, temporary / "lines"
        try:
            written, rejected = _write(task, path, lines, advance)
        except LayoutTooSmall as small:
            return ShardResult(task.name, task.split, 0, None, (), small.doublings)
        info = None
        if written is not None:
            with ThreadPoolExecutor(1) as thread:  # the disk writes while the shard is read back
                synced = thread.submit(sync, path)
                info = read_back(path, task.name, written)
                synced.result()
        check_plan(task.folder, task.plan)
        rename(lines, done_path(task.folder, task.name, ".jsonl"))
        if info is not None:
            for source in (path, index_path(path)):  # MindRecord allows another folder, but not another base name
                rename(source, task.folder / task.split / source.name)
            sync(task.folder / task.split)
        result = ShardResult(task.name, task.split, info.rows if info else 0, info, tuple(rejected))
        data = json.dumps({**asdict(result), "plan": task.plan, "layout": asdict(task.layout)}, sort_keys=True).encode()
        write_atomically(done_path(task.folder, task.name, ".json"), data, stage=temporary)
        return result
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_plan(folder: Path, plan: str) -> None:
    """Check that a folder still belongs to a plan.

    Raises:
        PlanError: It belongs to another one.
    """
    begun = json.loads((folder / BUILD_WORK / PLAN_NOTE).read_bytes())["plan"]
    if begun != plan:
        raise PlanError(f"{folder}: was taken over by another plan meanwhile", expected=plan[:12], got=begun[:12])


def _write(task: ShardTask, path: Path, lines: Path, advance: Advance) -> tuple[Written | None, list[Rejected]]:
    """Write the data file, its index and its record lines; without a row return None and write no data file."""
    rejected: list[Rejected] = []
    pending = (0, 0, 0)  # images read, their bytes, and those rejected since the last report
    with closing(ShardWriter(path, task.layout)) as writer:
        with lines.open("w", encoding="utf-8", newline="\n") as text:
            for ref in shard_refs(task.folder / BUILD_WORK / PLAN_DATABASE, task.first, task.last):
                label = task.labels[ref.class_name] if ref.class_name else UNLABELLED
                stored = _store(ref, task.store, label, len(writer), with_thumbnail=len(rejected) < MAX_THUMBNAILS)
                if isinstance(stored, Rejected):
                    rejected.append(stored)
                else:
                    image, line = stored
                    text.write(line.to_json() + "\n")
                    writer.add(image, label, ref.file_name)
                pending = (pending[0] + 1, pending[1] + ref.size_bytes, pending[2] + isinstance(stored, Rejected))
                if pending[0] == REPORT_EVERY:
                    advance(*pending)
                    pending = (0, 0, 0)
            advance(*pending)
            text.flush()
            os.fsync(text.fileno())
        return (writer.finish() if len(writer) else None), rejected


def _store(
    ref: ImageRef, store: ValidateOptions, label: int, row: int, *, with_thumbnail: bool
) -> tuple[bytes, RecordLine] | Rejected:
    """Return the bytes to store and the record line of an image; the commit fills in the number of the shard."""
    raw = read(ref)
    if ref.line:
        return _known(ref, raw, label, row)
    sample = raw if isinstance(raw, Rejected) else validate(raw, store)
    if isinstance(sample, Rejected):
        if with_thumbnail and isinstance(raw, RawImage):
            return replace(sample, thumbnail=thumbnail(raw.data, store.max_pixels))
        return sample
    return sample.image, RecordLine(
        shard=0,
        row=row,
        file_name=ref.file_name,
        label=label,
        width=sample.width,
        height=sample.height,
        sha256=sample.sha256,
        source_sha256=sample.source_sha256,
        changes=tuple(change.value for change in sample.changes),
        url=ref.url,
        status=ref.status,
        meta=json.loads(ref.meta) if ref.meta else None,
    )


def _known(ref: ImageRef, raw: RawImage | Rejected, label: int, row: int) -> tuple[bytes, RecordLine]:
    """Return a record of another folder unchanged, after comparing its bytes with its digest."""
    line = RecordLine.from_json(ref.line)
    if isinstance(raw, Rejected) or hashlib.sha256(raw.data).hexdigest() != line.sha256:
        raise IntegrityError(
            f"{ref.path}: row {line.row} ({line.file_name}) is not what was stored",
            expected=f"SHA-256 {line.sha256[:12]}",
            got=raw.detail if isinstance(raw, Rejected) else "other bytes",
            remedy="restore the shard, or leave the record out",
        )
    return raw.data, replace(line, shard=0, row=row, file_name=ref.file_name, label=label)
