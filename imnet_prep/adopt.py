"""MindRecord files that others made, given a manifest: nothing in them is changed.

Every record is read and decoded once. Class names come from the folders in ``file_name`` (ImageNetToMR stores whole
paths), from a list that is given, or are the labels themselves.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog
from imnet_prep.adopt_classes import NameFound, Naming, choose_naming
from imnet_prep.adopt_rows import AdoptTask, read_rows
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest, sync, write_atomically
from imnet_prep.records.index import rebuild_index
from imnet_prep.records.manifest import MANIFEST, RECORDS, Manifest, RecordLine, SplitInfo, write_records
from imnet_prep.records.mindrecord import Header, index_path, read_header, read_index
from imnet_prep.types import SPLITS, Progress, ProgressCallback, ShardInfo, record_id
from imnet_prep.verify_rows import BASE, END, names_agree
from imnet_prep.workers import process_count, run_processes

CHUNK_ROWS = 512
_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z._-]*")  # manifests/records.schema.json
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test|testing)(?![a-z])", re.IGNORECASE)
_OTHERS = frozenset({".db", ".json", ".jsonl", ".gz", ".txt", ".md", ".csv", ".html", ".png"})


@dataclass(frozen=True, slots=True)
class AdoptOptions:
    """How files are adopted.

    Attributes:
        split: Where neither a file's folder nor its name says it; None takes such files as ``train``.
        label_space: ``imagenet1k``, or the path of a file of class names in label order; None takes names from the
            records.
        keep_undecodable: Give a manifest though some images do not decode; ``verify`` goes on naming them.
        workers: Worker processes; one a usable core where None.
        force: Replace a manifest that is there.
    """

    split: str | None = None
    label_space: str | None = None
    keep_undecodable: bool = False
    workers: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in SPLITS:
            raise RecordsError("unknown --split", expected=f"one of {', '.join(SPLITS)}", got=self.split)


@dataclass(frozen=True, slots=True)
class AdoptResult:
    """What was adopted, and what a person should know."""

    manifest: Manifest
    path: Path
    undecodable: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Give the object that ``--json`` prints."""
        return {
            "images": {name: split.images for name, split in self.manifest.splits.items()},
            "shards": sum(len(split.shards) for split in self.manifest.splits.values()),
            "classes": len(self.manifest.classes),
            "columns": self.manifest.columns,
            "undecodable": self.undecodable,
            "label_convention": self.manifest.label_convention,
            "notes": list(self.notes),
            "manifest": str(self.path / MANIFEST),
        }


@dataclass(frozen=True, slots=True)
class _File:
    split: str
    path: Path
    header: Header
    rows: int


def adopt(folder: Path, options: AdoptOptions, progress: ProgressCallback) -> AdoptResult:
    """Give a folder of MindRecord files a manifest; they may lie in it or in its ``train``, ``val`` and ``test``.

    Args:
        folder: The folder.
        options: How.
        progress: Told of records read.

    Raises:
        RecordsError: No such folder, no MindRecord file in it, files that do not belong together, no column of images
            or labels, or it has a manifest already.
        IntegrityError: Records do not decode, or labels and class names contradict each other.
    """
    if not folder.is_dir():
        raise RecordsError(f"{folder}: no such folder", expected="a folder of MindRecord files")
    if (folder / MANIFEST).exists() and not options.force:
        raise RecordsError(f"{folder}: has a {MANIFEST} already", remedy="--force replaces it")
    notes: list[str] = []
    files = _find(folder, options, notes)
    columns = _check_together(files)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adopt-") as work:
        tasks = list(_tasks(files, columns, Path(work)))
        names, undecodable = _read(tasks, options, progress)
        if undecodable and not options.keep_undecodable:
            raise _do_not_decode(folder, undecodable)
        naming = choose_naming(names, options.label_space)
        splits: dict[str, SplitInfo] = {}
        alike: dict[str, str] = {}
        before: list[NDArray[np.uint64]] = []
        for split in SPLITS:
            mine = [file for file in files if file.split == split]
            if mine:
                chunks = [task for task in tasks if task.split == split]
                splits[split], alike[split] = _split_info(folder, split, mine, chunks, naming, before)
    images = sum(split.images for split in splits.values())
    size = sum(shard.size_bytes for split in splits.values() for shard in split.shards)
    source = {"kind": "adopted", "name": "", "size_bytes": size, "md5": "", "sha256": "", "official": False}
    manifest = Manifest(
        classes=naming.classes,
        class_words=tuple(catalog.class_words(name) for name in naming.classes),
        label_space=naming.label_space,
        label_convention=naming.convention,
        seed=0,
        options={"names": alike} if "file_name" in columns else {},
        sources=({**source, "images": images},),
        made_with={name: version(name) for name in ("imnet-prep", "opencv-python-headless", "pillow")},
        plan="",
        splits=splits,
        columns=columns,
    )
    write_atomically(folder / MANIFEST, manifest.to_bytes())
    return AdoptResult(manifest, folder, len(undecodable), (*notes, *naming.notes))


def _do_not_decode(folder: Path, undecodable: Sequence[str]) -> IntegrityError:
    return IntegrityError(
        f"{folder}: {len(undecodable)} records do not decode",
        got="; ".join(undecodable[:3]) + ("; ..." if len(undecodable) > 3 else ""),
        remedy="write the files again without them, or take them along with --keep-undecodable",
    )


# --- the files -------------------------------------------------------------------------------------------------------


def _find(folder: Path, options: AdoptOptions, notes: list[str]) -> list[_File]:
    found: list[_File] = []
    for place in (folder, *(folder / split for split in SPLITS)):
        for path in sorted(place.iterdir() if place.is_dir() else [], key=_natural):
            if not path.is_file() or path.suffix in _OTHERS or path.name.startswith("."):
                continue
            try:
                header = read_header(path)
            except RecordsError:
                if index_path(path).exists() or ".mindrecord" in path.name:
                    raise
                continue
            split = place.name if place != folder else _split_of(path, folder, options)
            if (file := _open(path, split, header, notes)) is not None:
                found.append(file)
    if not found:
        raise RecordsError(f"{folder}: no MindRecord file in it", expected="files written by MindSpore's FileWriter")
    for file in found:
        if missing := [name for name in file.header.addresses if not (file.path.parent / name).is_file()]:
            raise RecordsError(f"{file.path}: belongs to files that are not there", expected=", ".join(missing[:5]))
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort ``x.mindrecord10`` behind ``x.mindrecord9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _split_of(path: Path, folder: Path, options: AdoptOptions) -> str:
    for name in (path.name, folder.resolve().name):
        words = {word.lower()[:3] for word in _SPLIT_WORD.findall(name)}
        if len(words) == 1:
            return {"tra": "train", "val": "val", "tes": "test"}[words.pop()]
    return options.split or "train"


def _open(path: Path, split: str, header: Header, notes: list[str]) -> _File | None:
    """Take a file with its index, which is made where there is none; None for one without a row."""
    if not _NAME.fullmatch(path.name):
        expected = "letters, digits, '.', '_' and '-'"
        raise RecordsError(f"{path}: cannot be in a manifest under this name", expected=expected)
    if path.name not in header.addresses:
        raise RecordsError(
            f"{path}: was renamed; MindSpore does not open it", expected=f"the name {header.addresses[0]}"
        )
    if not header.pages:
        notes.append(f"{path.name}: has no row, left out")
        return None
    if not index_path(path).is_file():
        rebuild_index(path)
        notes.append(f"{path.name}: its index was missing and is made again")
    return _File(split, path, header, len(read_index(path, header)))


def _check_together(files: Sequence[_File]) -> dict[str, str]:
    """Make sure that MindSpore reads them together, and that there is what training needs; gives the columns."""
    first = files[0]
    for file in files:
        for what in ("fields", "blob_fields"):
            if getattr(file.header, what) != getattr(first.header, what):
                raise RecordsError(
                    f"{file.path}: has other columns than {first.path.name}",
                    expected=str(first.header.fields),
                    got=str(file.header.fields),
                )
        same_split = next(other for other in files if other.split == file.split)
        sizes = [(other.header.header_size, other.header.page_size) for other in (same_split, file)]
        if sizes[0] != sizes[1]:
            raise RecordsError(f"{file.path}: has other page sizes", expected=str(sizes[0]), got=str(sizes[1]))
    columns = dict(first.header.fields)
    if not first.header.blob_fields:
        raise RecordsError(f"{first.path}: no column of images", expected="a bytes column", got=str(columns))
    if not columns.get("label", "").startswith("int"):
        raise RecordsError(f"{first.path}: no column of labels", expected="an int column `label`", got=str(columns))
    return columns


# --- the records -----------------------------------------------------------------------------------------------------


def _tasks(files: Sequence[_File], columns: dict[str, str], work: Path) -> Iterator[AdoptTask]:
    numbers: Counter[str] = Counter()
    for file in files:
        number = numbers[file.split]
        numbers[file.split] += 1
        for first in range(0, file.rows, CHUNK_ROWS):
            lines = work / f"{file.split}-{number:05d}-{first:010d}.jsonl"
            count = min(CHUNK_ROWS, file.rows - first)
            yield AdoptTask(file.path, file.split, number, first, count, "file_name" in columns, lines)


def _read(
    tasks: Sequence[AdoptTask], options: AdoptOptions, progress: ProgressCallback
) -> tuple[list[NameFound], list[str]]:
    """Read every record; its line goes to the task's file. Gives the names by label, and what does not decode."""
    total = sum(task.count for task in tasks)
    names: set[NameFound] = set()
    undecodable: list[tuple[str, str]] = []

    def report(images: int, size: int, bad: int) -> None:
        progress(Progress(min(images, total), total, "images", size, (("undecodable", bad),)))

    width = min(process_count(options.workers), len(tasks))
    for result in run_processes(read_rows, tasks, width, report):
        names.update(result.names)
        undecodable += [(result.lines.name, text) for text in result.undecodable]
    return sorted(names), [text for _, text in sorted(undecodable)]


def _split_info(
    folder: Path,
    split: str,
    files: Sequence[_File],
    tasks: Sequence[AdoptTask],
    naming: Naming,
    before: list[NDArray[np.uint64]],
) -> tuple[SplitInfo, str]:
    """Write the record list of a split and count it; ``before`` grows by its digests.

    Returns:
        The split, and how stored names go with the list's (:class:`~imnet_prep.verify_rows.RowsTask`).
    """
    total = sum(file.rows for file in files)
    counts = np.zeros(len(naming.classes), np.int64)
    ids, digests = np.empty(total, np.uint64), np.empty(total, np.uint64)
    changes: Counter[str] = Counter()
    alike = END

    def lines() -> Iterator[str]:
        nonlocal alike
        place = 0
        for task in tasks:
            for text in task.lines.read_text(encoding="utf-8").splitlines():
                values = json.loads(text)
                stored = values["file_name"]
                values["file_name"] = naming.file_name(task.path.name, values)
                if not names_agree(stored, values["file_name"], END):
                    alike = BASE
                if values["label"] >= 0:
                    counts[values["label"]] += 1
                changes.update(values["changes"])
                ids[place] = record_id(split, values["file_name"])
                digests[place] = int(values["sha256"][:16], 16)
                place += 1
                yield RecordLine(**{**values, "changes": tuple(values["changes"])}).to_json()

    path = folder / split / RECORDS
    path.parent.mkdir(exist_ok=True)
    write_records(path, lines())
    sync(path)
    if len(np.unique(ids)) != total:
        path.unlink()
        raise RecordsError(f"{folder}: two records of split {split} have the same class and name")
    known = np.unique(np.concatenate(before)) if before else np.empty(0, np.uint64)
    before.append(digests)
    fresh = int(np.count_nonzero(~np.isin(np.unique(digests), known)))
    info = SplitInfo(
        found=total,
        images=total,
        rejected={},
        changes=dict(changes),
        duplicates=total - fresh,
        class_counts=tuple(counts.tolist()),
        header_size=files[0].header.header_size,
        page_size=files[0].header.page_size,
        records={"file": f"{split}/{RECORDS}", "size_bytes": path.stat().st_size, "sha256": file_digest(path)},
        shards=tuple(_shard_info(folder, file) for file in files),
    )
    return info, alike


def _shard_info(folder: Path, file: _File) -> ShardInfo:
    index = index_path(file.path)
    return ShardInfo(
        file=file.path.relative_to(folder).as_posix(),
        rows=file.rows,
        size_bytes=file.path.stat().st_size,
        sha256=file_digest(file.path),
        index_size_bytes=index.stat().st_size,
        index_sha256=file_digest(index),
    )
