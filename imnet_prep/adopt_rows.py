"""Some rows of a file that others made, read and decoded: the part of ``adopt`` that worker processes do."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from imnet_prep.adopt_classes import NameFound
from imnet_prep.duplicates import SIDE
from imnet_prep.errors import RecordsError
from imnet_prep.jpeg import ImageFault
from imnet_prep.records.mindrecord import Shard
from imnet_prep.validate import examine
from imnet_prep.verify_rows import IMAGE_FIELDS
from imnet_prep.workers import Advance

_SEPARATORS = re.compile(r"[/\\]+")


@dataclass(frozen=True, slots=True)
class AdoptTask:
    """Rows to read.

    Attributes:
        path: The data file. split: Its split. shard: Its place in the split.
        first: Row to begin with. count: Number of rows.
        named: There is a column ``file_name``.
        lines: Where their lines go, in row order; ``file_name`` in them is as stored.
    """

    path: Path
    split: str
    shard: int
    first: int
    count: int
    named: bool
    lines: Path


@dataclass(frozen=True, slots=True)
class AdoptRows:
    """What was read: which folder and base name's beginning go with which label, and what does not decode."""

    lines: Path
    names: frozenset[NameFound]
    undecodable: tuple[str, ...]


@lru_cache(maxsize=1)
def _open(path: Path) -> Shard:
    return Shard(path)


def read_rows(task: AdoptTask, advance: Advance) -> AdoptRows:
    """Read, hash and decode some rows, and write a line for each.

    Raises:
        RecordsError: A row cannot be read, or has no label.
    """
    shard = _open(task.path)
    names: set[NameFound] = set()
    undecodable: list[str] = []
    with task.lines.open("w", encoding="utf-8") as text:
        for row in range(task.first, task.first + task.count):
            line, why = _read_row(shard, task, row)
            if why:
                undecodable.append(f"{task.path.name} row {row} ({line['file_name'] or 'no name'}): {why}")
            parts = _SEPARATORS.split(line["file_name"])
            names.add(
                NameFound(task.split, line["label"], parts[-2] if len(parts) > 1 else "", parts[-1].split("_")[0])
            )
            text.write(json.dumps(line) + "\n")
            advance(1, 0, bool(why))
    return AdoptRows(task.lines, frozenset(names), tuple(undecodable))


def _read_row(shard: Shard, task: AdoptTask, row: int) -> tuple[dict[str, Any], str]:
    fields, blobs = shard.fields(row), shard.blobs(row)
    image = blobs[next((name for name in IMAGE_FIELDS if name in blobs), next(iter(blobs)))]
    label, name = fields.get("label"), fields.get("file_name", "")
    if not isinstance(label, int) or isinstance(label, bool) or not -1 <= label < 1 << 24:
        raise RecordsError(f"{task.path}: row {row}: no label", expected="0 or more", got=repr(label))
    if task.named and (not isinstance(name, str) or not name or not name.isprintable()):
        raise RecordsError(f"{task.path}: row {row}: no file_name", expected="printable text", got=repr(name))
    width = height = 0
    changes: tuple[str, ...] = ()
    why = ""
    try:
        seen = examine(image, SIDE)
        width, height, changes = seen.width, seen.height, tuple(change.value for change in seen.changes)
    except ImageFault as fault:
        why = f"{fault.reason}: {fault.detail}"
    except MemoryError:
        why = "not enough memory to decode it"
    digest = hashlib.sha256(image).hexdigest()
    line = {
        "shard": task.shard, "row": row, "file_name": name if isinstance(name, str) else "", "label": label,
        "width": width, "height": height, "sha256": digest, "source_sha256": digest, "changes": changes,
    }  # fmt: skip
    return line, why
