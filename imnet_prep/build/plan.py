"""The plan of a conversion: which image goes to which shard and row, fixed by the seed before any work.

The plan is a SQLite file whose rows lie in the order of the shards, so that a million images cost no memory and a
worker (here or on another machine) reads only its own part. An image's place is its rank by a keyed hash of its name:
it depends on the seed and on the names, never on the order of the sources, on where they lie, or on who does the work.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imnet_prep.errors import PlanError
from imnet_prep.images.check import ValidateOptions
from imnet_prep.records.shards import Layout
from imnet_prep.types import SPLITS, ImageRef, Rejected

PLAN_VERSION = 3  # part of each plan's digest: to be raised when the same plan would give other bytes
LABEL_SPACES = ("found", "imagenet1k")
DUPLICATES = ("keep", "reject")
_CONVENTIONS = {
    "found": "the classes that are there, sorted by name, from 0",
    "imagenet1k": "ILSVRC2012: the 1,000 WordNet ids sorted, from 0 (not ILSVRC2012_ID order)",
    "file": "the order of the class list that was given, from 0",
}


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What shapes the content of the shards, and so the digest of the plan.

    Attributes:
        seed: Of the order, 0 or more.
        shards: Number of shards of a split, or None for one a 64 MiB or 8,192 images, at most 128.
        label_space: ``found``, ``imagenet1k``, the path of a file of class names in label order, or these names.
        keep_classes: The path of a file of class names to keep, or None for all.
        max_per_class: Images kept of a class in a split, chosen by the seed, or None for all.
        store: What an image must be, and how it is stored.
        duplicates: ``keep``, or ``reject`` all but the first (val before train) of those with the same bytes.
    """

    seed: int = 0
    shards: int | None = None
    label_space: str | tuple[str, ...] = "found"
    keep_classes: Path | None = None
    max_per_class: int | None = None
    store: ValidateOptions = field(default_factory=ValidateOptions)
    duplicates: str = "keep"

    def __post_init__(self) -> None:
        checks = (
            ("--seed", self.seed, 0 <= self.seed < 1 << 63, "0 or more"),
            ("--shards", self.shards, self.shards is None or 1 <= self.shards <= 1000, "1 to 1000"),
            ("--max-per-class", self.max_per_class, self.max_per_class is None or self.max_per_class >= 1, "1 or more"),
            ("--duplicates", self.duplicates, self.duplicates in DUPLICATES, " or ".join(DUPLICATES)),
        )
        for name, value, good, expected in checks:
            if not good:
                raise PlanError(f"{name} is out of range", expected=expected, got=str(value))

    def content(self) -> dict[str, Any]:
        """Return the options as the manifest records them: no paths, only what they hold."""
        return {
            "duplicates": self.duplicates,
            "keep_classes": None if self.keep_classes is None else sorted(read_names(self.keep_classes)),
            "max_per_class": self.max_per_class,
            "max_pixels": self.store.max_pixels,
            "quality": self.store.quality if self.store.short_side is not None else None,
            "shards": self.shards,
            "short_side": self.store.short_side,
        }

    def label_names(self) -> list[str] | str:
        """Return what ``label_space`` holds: names in label order, or its own name.

        Raises:
            PlanError: It is neither a known name nor a file, or the file cannot be read.
        """
        if isinstance(self.label_space, tuple):
            return list(self.label_space)
        if self.label_space in LABEL_SPACES:
            return self.label_space
        if "/" not in self.label_space and not Path(self.label_space).exists():
            choices = f"{', '.join(LABEL_SPACES)}, or a file of class names"
            raise PlanError(f"unknown label space {self.label_space!r}", expected=choices)
        return list(read_names(Path(self.label_space)))


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """One split of a plan.

    Attributes:
        images: Images planned.
        bytes: Their bytes as found.
        stored_bytes: About how many bytes the split will take on the disk.
        first: Place of its first image in the plan.
        bounds: Ranks within the split at which its shards begin, and after the last one where it ends.
        layout: Sizes of its data files.
    """

    images: int
    bytes: int
    stored_bytes: int
    first: int
    bounds: tuple[int, ...]
    layout: Layout

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.bounds) - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan, whose rows lie in ``database``.

    Attributes:
        database: The SQLite file.
        options: What shaped it.
        classes: Names in label order.
        label_space: ``found``, ``imagenet1k`` or ``file``.
        splits: By split name; a split without a plannable image is not there.
        rejected: Images kept out before any was read.
        digest: SHA-256 (hex) over the options, the classes and each image's split, name, size and URL.
    """

    database: Path
    options: PlanOptions
    classes: tuple[str, ...]
    label_space: str
    splits: dict[str, SplitPlan]
    rejected: tuple[Rejected, ...] = field(repr=False)
    digest: str

    @property
    def label_convention(self) -> str:
        """What the labels mean, in words."""
        return _CONVENTIONS[self.label_space]

    @property
    def images(self) -> int:
        """Images planned in all splits."""
        return sum(split.images for split in self.splits.values())

    @property
    def bytes(self) -> int:
        """Their bytes as found."""
        return sum(split.bytes for split in self.splits.values())

    def shard_name(self, split: str, number: int) -> str:
        """Return a shard's path relative to the records folder."""
        return f"{split}/{split}-{number:05d}-of-{self.splits[split].shards:05d}.mindrecord"


def read_names(path: Path) -> tuple[str, ...]:
    """Read a list of class names, one a line; blank lines and what follows a tab are left out.

    Raises:
        PlanError: The file cannot be read, is empty, or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a name may hold any other separator
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read as a list of class names", got=str(error)) from error
    names = tuple(name for line in lines if (name := line.split("\t")[0].strip()))
    if not names or len(set(names)) != len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)[:10]
        raise PlanError(f"{path}: not a list of class names", expected="each name once", got=", ".join(twice) or "none")
    return names


def load_plan(database: Path, options: PlanOptions) -> Plan | None:
    """Read a plan that was made with the same options; None where there is none, or it is not whole."""
    try:
        with closing(_read_only(database)) as connection:
            head = json.loads(connection.execute("SELECT json FROM head").fetchone()[0])
            items = [json.loads(row[0]) for row in connection.execute("SELECT item FROM rejected ORDER BY rowid")]
        splits = {
            name: SplitPlan(**{**part, "bounds": tuple(part["bounds"]), "layout": Layout(**part["layout"])})
            for name, part in head["splits"].items()
        }
        rejected = tuple(map(Rejected.from_json, items))
    except (sqlite3.Error, ValueError, TypeError, KeyError, PlanError):
        return None
    return Plan(database, options, tuple(head["classes"]), head["label_space"], splits, rejected, head["digest"])


def _read_only(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(os.fsencode(database.absolute()))}?mode=ro&immutable=1", uri=True)


SELECT = (
    "SELECT split, class, file_name, path.path, offset, size, url, status, line, record FROM {0} JOIN path "
    "ON {0}.path = path.id"
)


def ref_of(row: tuple[Any, ...]) -> ImageRef:
    return ImageRef(SPLITS[row[0]], row[1], row[2], os.fsdecode(row[3]), *row[4:9])


def shard_refs(database: Path, first: int, last: int) -> Iterator[ImageRef]:
    """Read images from a plan, in row order.

    Args:
        database: The plan's SQLite file.
        first: Place of the first image in the plan (:attr:`SplitPlan.first` plus a bound).
        last: Place after the last.
    """
    query = SELECT.format("image") + " WHERE place >= ? AND place < ? ORDER BY place"
    with closing(_read_only(database)) as connection:
        yield from map(ref_of, connection.execute(query, (first, last)))
