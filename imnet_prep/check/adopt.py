"""Write a manifest for MindRecord files of other writers, without changing the files.

Every record is read and decoded once. Class names come from the folders in ``file_name`` (ImageNetToMR stores whole
paths), from a given list, or are the labels themselves.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from imnet_prep.build.commit import Digests, describe, describe_split
from imnet_prep.check.adopt_classes import NameFound, Naming, choose_naming, name_found
from imnet_prep.check.rows import BASE, END, names_agree
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest, write_atomically
from imnet_prep.images.check import examine
from imnet_prep.images.perceptual_hash import SIDE
from imnet_prep.records.discover import find_records
from imnet_prep.records.folder import RecordsFolder, Row, map_rows
from imnet_prep.records.manifest import MANIFEST, Manifest, SplitInfo
from imnet_prep.records.mindrecord import index_path
from imnet_prep.records.publish import Change, changing
from imnet_prep.records.record_list import RECORDS, RecordLine
from imnet_prep.records.salvage import write_index_of
from imnet_prep.records.shards import Layout
from imnet_prep.types import SPLITS, ImageFault, ProgressCallback, ShardInfo, name_fault, record_id


@dataclass(frozen=True, slots=True)
class AdoptOptions:
    """Options of :func:`adopt`.

    Attributes:
        split: The split of files for which neither the folder nor the name tells it; None means ``train``.
        label_space: ``imagenet1k``, or the path of a file of class names in label order; None takes the names from the
            records.
        keep_undecodable: Write a manifest even if some images do not decode; ``verify`` still reports them.
        workers: Number of worker processes; by default one per usable core.
        force: Replace an existing manifest.
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
    """The manifest of the adopted files, and notes for the user."""

    manifest: Manifest
    path: Path
    undecodable: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
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


def adopt(folder: Path, options: AdoptOptions, progress: ProgressCallback) -> AdoptResult:
    """Write a manifest for the MindRecord files in a folder and in its ``train``, ``val`` and ``test`` folders.

    Missing indexes, record lists and the manifest appear together at the end, or the folder does not change.

    Args:
        folder: The folder.
        options: The options.
        progress: Called with the number of records read.

    Raises:
        RecordsError: There is no such folder, it has no MindRecord files, the files do not belong together or have no
            column of images or labels, the folder has a manifest already, another command is changing it, or it cannot
            be written.
        IntegrityError: Records do not decode, or labels and class names contradict each other.
    """
    manifest_path = folder / MANIFEST
    had = os.path.lexists(manifest_path)
    with changing(folder) as change:
        own = change.resumed and not had  # the manifest is from an interrupted adoption: repeat it
        if os.path.lexists(manifest_path) and not (options.force or own):
            raise RecordsError(f"{folder}: has a {MANIFEST} already", remedy="--force replaces it")
        records, bare, notes = find_records(folder, options.split or "train")
        for path in bare:
            write_index_of(path, change.stage(path))
        manifest, undecodable, naming = _read_and_describe(change, records, options, progress)
        write_atomically(change.stage(manifest_path), manifest.to_bytes())
        change.publish([*map(index_path, bare), *[folder / name / RECORDS for name in manifest.splits], manifest_path])
    return AdoptResult(manifest, folder, len(undecodable), (*notes, *naming.notes))


def _read_and_describe(
    change: Change, records: RecordsFolder, options: AdoptOptions, progress: ProgressCallback
) -> tuple[Manifest, list[str], Naming]:
    """Read all records, write their lists, and return the manifest, the undecodable records, and the names."""
    names: set[NameFound] = set()
    undecodable: list[str] = []
    with (change.work / "lines.jsonl").open("w+", encoding="utf-8") as texts:
        with closing(map_rows(records, read_row, options.workers, progress)) as rows:
            for split, line, why in rows:
                texts.write(json.dumps(line) + "\n")
                names.add(name_found(split, line["label"], line["file_name"]))
                if why:
                    undecodable.append(why)
        if undecodable and not options.keep_undecodable:
            raise IntegrityError(
                f"{change.folder}: {len(undecodable)} records do not decode",
                got="; ".join(undecodable[:3]) + ("; ..." if len(undecodable) > 3 else ""),
                remedy="write the files again without them, or keep them with --keep-undecodable",
            )
        naming = choose_naming(sorted(names), options.label_space)
        texts.seek(0)
        splits: dict[str, SplitInfo] = {}
        alike: dict[str, str] = {}
        before: Digests = []
        for name, info in records.manifest.splits.items():
            splits[name], alike[name] = _describe_split(change, name, info, texts, naming, before)
    source = {
        "kind": "adopted", "name": "", "md5": "", "sha256": "", "official": False, "images": records.records,
        "size_bytes": sum(info.size_bytes for _, _, info in records.shards),
    }  # fmt: skip
    columns = records.manifest.columns
    manifest = describe(
        splits,
        naming.classes,
        label_space=naming.label_space,
        label_convention=naming.convention,
        seed=0,
        options={"names": alike} if "file_name" in columns else {},
        sources=(source,),
        plan="",
        columns=columns,
    )
    return manifest, undecodable, naming


def read_row(row: Row) -> tuple[str, dict[str, Any], str]:
    """Read, hash and decode a record.

    Returns:
        Its split, the values of its line with ``file_name`` as stored, and why it does not decode (or nothing).

    Raises:
        RecordsError: It cannot be read, or has no valid label or name.
    """
    fields, image = row.fields, row.image
    place = f"{row.opened.path}: row {row.row}"
    label = fields.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not -1 <= label < 1 << 24:
        raise RecordsError(f"{place}: no label", expected="0 or more", got=repr(label))
    named = "file_name" in row.opened.header.fields
    name = fields.get("file_name") if named else ""
    if named and (fault := name_fault(name)):
        raise RecordsError(f"{place}: no file_name: {fault}", got=repr(name))
    digest = hashlib.sha256(image).hexdigest()
    line = {
        "shard": row.shard, "row": row.row, "file_name": name, "label": label,
        "width": 0, "height": 0, "sha256": digest, "source_sha256": digest, "changes": (),
    }  # fmt: skip
    why = ""
    try:
        seen = examine(image, SIDE)
        line |= {"width": seen.width, "height": seen.height, "changes": [change.value for change in seen.changes]}
    except ImageFault as fault:
        why = f"{fault.reason}: {fault.detail}"
    except MemoryError:
        why = "not enough memory to decode it"
    return row.split, line, why and f"{Path(row.file).name} row {row.row} ({name or 'no name'}): {why}"


def _describe_split(
    change: Change, name: str, split: SplitInfo, texts: Iterable[str], naming: Naming, before: Digests
) -> tuple[SplitInfo, str]:
    """Write the record list of a split from the next lines, and describe the split; append its digests to ``before``.

    Returns:
        The split, and how to compare stored names with listed ones (:func:`~imnet_prep.check.rows.names_agree`).
    """
    ids = np.empty(split.images, np.uint64)
    alike = END

    def lines() -> Iterator[str]:
        nonlocal alike
        for place, text in enumerate(islice(texts, split.images)):
            values = json.loads(text)
            listed = naming.file_name(name, Path(split.shards[values["shard"]].file).name, values)
            if fault := name_fault(listed):
                raise RecordsError(f"{change.folder}: a record would be called {listed!r}: {fault}")
            if not names_agree(values["file_name"], listed, END):
                alike = BASE
            ids[place] = record_id(name, listed)
            yield RecordLine(**{**values, "file_name": listed, "changes": tuple(values["changes"])}).to_json()

    info = describe_split(
        change.stage(change.folder / name / RECORDS),
        name,
        lines(),
        [_with_digests(change, shard) for shard in split.shards],
        Layout(split.header_size, split.page_size),
        len(naming.classes),
        {},
        before,
    )
    if len(np.unique(ids)) != len(ids):
        raise RecordsError(f"{change.folder}: two records of split {name} have the same class and name")
    return info, alike


def _with_digests(change: Change, shard: ShardInfo) -> ShardInfo:
    path = change.folder / shard.file
    made = index_path(change.stage(path))
    index = made if made.exists() else index_path(path)
    return replace(
        shard,
        sha256=file_digest(path),
        index_size_bytes=index.stat().st_size,
        index_sha256=file_digest(index),
    )
