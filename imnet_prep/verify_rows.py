"""A run of rows of one shard, looked at one by one: the part of ``verify --level decode`` that worker processes do."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.duplicates import SIDE, signature
from imnet_prep.errors import RecordsError
from imnet_prep.jpeg import ImageFault
from imnet_prep.problems import Problem
from imnet_prep.records.mindrecord import (
    RowIndex,
    Shard,
    index_from_data,
    index_path,
    read_header,
    read_index,
    read_index_field,
)
from imnet_prep.types import record_id
from imnet_prep.validate import examine
from imnet_prep.workers import Advance

IMAGE_FIELDS = ("image", "data")  # ours and ImageNetToMR's; hand-written ones
REPORT_EVERY = 32
EQUAL, END, BASE = "equal", "end", "base"
_SEPARATORS = re.compile(r"[/\\]+")


@dataclass(frozen=True, slots=True)
class RowsTask:
    """Rows to look at.

    Attributes:
        path: The data file. file: Its name in the manifest. split: Its split. shard: Its place in the manifest.
        first: Row to begin with. count: Number of rows. position: Of the first row among all records of the folder.
        lines: Their lines of the record list, or None where it cannot be read.
        classes: Names in label order.
        names: How the stored file_name goes with the record list's: ``equal``, or of adopted files ``end`` (it ends
            with it) or ``base`` (only the base names are equal).
        digests: Compare with the record list's digests.
    """

    path: Path
    file: str
    split: str
    shard: int
    first: int
    count: int
    position: int
    lines: tuple[bytes, ...] | None
    classes: tuple[str, ...]
    names: str
    digests: bool


@dataclass(frozen=True, slots=True)
class RowsResult:
    """What was found.

    Attributes:
        position: As in the task.
        problems: In row order.
        labels: int32 (count,), -2 where there is none to read.
        prints: uint64 (count, 4): record id, first 8 bytes of the image's SHA-256, and its 128 perceptual bits; zeros
            where there is no image.
    """

    position: int
    split: str
    problems: tuple[Problem, ...]
    labels: NDArray[np.int32]
    prints: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Opened:
    shard: Shard
    labels: list[Any] | None  # as the index has them
    image_field: str
    problems: tuple[Problem, ...]


def _open(path: Path, file: str) -> _Opened:
    """Open a shard, or take the one that is open, unless it was written meanwhile."""
    state = [(at.st_size, at.st_mtime_ns) for at in (path.stat(), *_stat(index_path(path)))]
    return _open_as(path, file, tuple(state))


def _stat(path: Path) -> tuple[os.stat_result, ...]:
    return (path.stat(),) if path.exists() else ()


@lru_cache(maxsize=1)
def _open_as(path: Path, file: str, _state: tuple[tuple[int, int], ...]) -> _Opened:
    """Open a shard by its index, or by its pages where there is no index that reads; compare the two.

    Raises:
        RecordsError: It cannot be read either way.
    """
    header = read_header(path)
    problems: list[Problem] = []
    walked: RowIndex | None = None
    try:
        walked = index_from_data(path, header)
    except RecordsError as error:
        problems.append(Problem("record", file, str(error)))
    labels: list[Any] | None = None
    try:
        index = read_index(path, header)
        labels = read_index_field(path, header, "label")
    except RecordsError:
        if walked is None:
            raise
        index = walked
    if walked is not None and index is not walked:
        problems += _differing(file, index, walked)
    if not header.blob_fields:
        raise RecordsError(f"{path}: no bytes column", expected="a column `image`", got=str(sorted(header.fields)))
    field = next((name for name in IMAGE_FIELDS if name in header.blob_fields), header.blob_fields[0])
    return _Opened(Shard(path, index=index), labels, field, tuple(problems))


def _differing(file: str, index: RowIndex, walked: RowIndex) -> Iterator[Problem]:
    rows = min(len(index), len(walked))
    pairs = [(getattr(index, name)[:rows], getattr(walked, name)[:rows]) for name in RowIndex.__slots__]
    differ = np.flatnonzero(np.any([one != other for one, other in pairs], axis=0)) if rows else np.empty(0, int)
    if len(differ):
        yield Problem("index", index_path(Path(file)).as_posix(), "does not agree with the data file", int(differ[0]))
    elif len(index) != len(walked):
        detail = f"has {len(index)} rows, the pages of the data file {len(walked)}"
        yield Problem("index", index_path(Path(file)).as_posix(), detail)


def names_agree(stored: str, listed: str, how: str) -> bool:
    """Compare a stored file_name with the record list's; see :class:`RowsTask`."""
    if how == EQUAL:
        return stored == listed
    parts, end = _SEPARATORS.split(stored), listed.split("/")
    wanted = end if how == END else end[-1:]
    return parts[-len(wanted) :] == wanted


def check_rows(task: RowsTask, advance: Advance) -> RowsResult:
    """Look at each row: fields, label, name, image; and compare them with the record list, where there is one.

    Never raises on any bytes.
    """
    labels = np.full(task.count, -2, np.int32)
    prints = np.zeros((task.count, 4), np.uint64)
    problems: list[Problem] = []
    try:
        opened = _open(task.path, task.file)
    except (RecordsError, OSError) as error:
        advance(task.count, 0, 1)
        found = (Problem("record", task.file, f"no row can be read: {error}"),) if task.first == 0 else ()
        return RowsResult(task.position, task.split, found, labels, prints)
    if task.first == 0:
        problems += opened.problems
    label_of = {name: label for label, name in enumerate(task.classes)}
    there = min(task.count, len(opened.shard) - task.first)
    pending = [0, 0, 0]
    for place in range(there):
        row = _Row(task, opened, place, label_of)
        problems += row.check()
        labels[place] = row.label
        prints[place] = row.prints
        pending = [pending[0] + 1, pending[1] + row.size_bytes, pending[2] + bool(row.problems)]
        if pending[0] == REPORT_EVERY:
            advance(*pending)
            pending = [0, 0, 0]
    advance(pending[0] + task.count - max(0, there), pending[1], pending[2])
    return RowsResult(task.position, task.split, tuple(problems), labels, prints)


class _Row:
    """One row while it is looked at."""

    def __init__(self, task: RowsTask, opened: _Opened, place: int, label_of: dict[str, int]) -> None:
        self.task, self.opened, self.label_of = task, opened, label_of
        self.row = task.first + place
        self.label, self.size_bytes = -2, 0
        self.name: str | None = None
        self.prints: tuple[int, ...] = (0, 0, 0, 0)
        self.problems: list[Problem] = []
        self.line: dict[str, Any] | None = None
        if task.lines is not None:
            self.line = self._parse(task.lines[place]) if place < len(task.lines) else None

    def _parse(self, text: bytes) -> dict[str, Any] | None:
        try:
            line = json.loads(text)
            if (line["shard"], line["row"]) != (self.task.shard, self.row):
                self._add("records", f"the record list has shard {line['shard']} row {line['row']} here")
                return None
            self.name = str(line["file_name"])
            return {name: line[name] for name in ("label", "width", "height", "sha256")}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._add("records", f"its line in the record list is damaged: {error}")
            return None

    def _add(self, kind: str, detail: str) -> None:
        self.problems.append(Problem(kind, self.task.file, " ".join(detail.split()), self.row, self.name))

    def check(self) -> list[Problem]:
        """Look at everything; gives the problems."""
        try:
            fields = self.opened.shard.fields(self.row)
        except RecordsError as error:
            self._add("record", str(error))
        else:
            self._check_fields(fields)
        try:
            image = self.opened.shard.image(self.row, self.opened.image_field)
        except (RecordsError, KeyError) as error:
            self._add("record", str(error))
        else:
            self._check_image(image)
        return self.problems

    def _check_fields(self, fields: dict[str, Any]) -> None:
        stored, label = fields.get("file_name"), fields.get("label")
        if "file_name" in self.opened.shard.header.fields:
            self._check_name(stored)
        name = self.name or ""
        if not isinstance(label, int) or isinstance(label, bool) or not -1 <= label < len(self.task.classes):
            self._add("label", f"label {label!r} is not one of 0 to {len(self.task.classes) - 1}")
            return
        self.label = label
        class_name, slash, _ = name.rpartition("/")
        if self.line is not None and label != self.line["label"]:
            self._add("label", f"expected {self.line['label']}, got {label}")
        elif label == -1 and (slash or self.task.split != "test"):
            self._add("label", "no label")
        elif slash and label >= 0 and self.task.classes[label] != class_name and self.task.names == EQUAL:
            self._add("label", f"label {label} is {self.task.classes[label]}, the name says {class_name}")
        labels = self.opened.labels
        if labels is not None and (self.row >= len(labels) or labels[self.row] != label):
            got = labels[self.row] if self.row < len(labels) else None
            self._add("index", f"the index says label {got!r}, the row {label}")

    def _check_name(self, stored: object) -> None:
        listed = self.name
        if not isinstance(stored, str) or not stored.isprintable() or not stored:
            self._add("name", f"not a file name: {stored!r}")
        elif listed is None:
            self.name = stored
        elif not names_agree(stored, listed, self.task.names):
            self._add("name", f"expected {listed!r}, got {stored!r}")
        class_name, slash, _ = (self.name or "").rpartition("/")
        if slash and class_name not in self.label_of and self.task.names == EQUAL:
            self._add("name", f"its class {class_name!r} is not in the manifest")

    def _check_image(self, image: bytes) -> None:
        self.size_bytes = len(image)
        digest = hashlib.sha256(image).digest()
        changed = self.line is not None and self.task.digests and digest.hex() != self.line["sha256"]
        try:
            seen = examine(image, SIDE)
        except ImageFault as fault:
            self._add("image", f"{fault.reason}: {fault.detail}" + ("; the bytes changed" if changed else ""))
            return
        except MemoryError:
            self._add("image", "not enough memory to decode it")
            return
        if changed:
            self._add("digest", f"decodes, but is not what was stored: SHA-256 {digest.hex()[:12]}")
        if self.line is not None and (seen.width, seen.height) != (self.line["width"], self.line["height"]):
            expected = f"{self.line['width']} x {self.line['height']}"
            self._add("image", f"expected {expected} pixels, got {seen.width} x {seen.height}")
        bits = signature(seen.grey, seen.width, seen.height).tolist()
        identity = record_id(self.task.split, self.name) if self.name else 0
        self.prints = (identity, int.from_bytes(digest[:8], "little"), *bits)
