"""The plan of a conversion: which image goes to which shard and row, fixed by the seed before any work.

The plan is a SQLite file, so that a million images cost no memory and a worker (here or on another machine) reads only
its own part. An image's place is its rank by a keyed hash of its name: it depends on the seed and on the names, never
on the order of the sources, on where they lie, or on who does the work.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imnet_prep import catalog
from imnet_prep.errors import PlanError, SourceError
from imnet_prep.shards import Layout, choose_layout
from imnet_prep.types import SPLITS, ImageRef, Progress, ProgressCallback, Reason, Rejected, record_id
from imnet_prep.validate import ValidateOptions

SHARD_BYTES = 256 << 20  # a shard's usual size: small enough to redo after a crash, large enough for sequential reads
MAX_SHARDS = 128  # open file handles = readers x shards
BATCH_ROWS = 10_000
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
        shards: Number of shards of a split, or None for one a 256 MiB, at most 128.
        label_space: ``found``, ``imagenet1k``, or the path of a file of class names in label order.
        keep_classes: The path of a file of class names to keep, or None for all.
        max_per_class: Images kept of a class in a split, chosen by the seed, or None for all.
        store: What an image must be, and how it is stored.
        duplicates: ``keep``, or ``reject`` all but the first (val before train) of those with the same bytes.
    """

    seed: int = 0
    shards: int | None = None
    label_space: str = "found"
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
        """Give the options as the manifest records them: no paths, only what they hold."""
        return {
            "duplicates": self.duplicates,
            "keep_classes": None if self.keep_classes is None else sorted(read_names(self.keep_classes)),
            "max_per_class": self.max_per_class,
            "max_pixels": self.store.max_pixels,
            "quality": self.store.quality if self.store.short_side is not None else None,
            "shards": self.shards,
            "short_side": self.store.short_side,
        }


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """One split of a plan: its images and bytes as found, the bounds of its shards and their sizes."""

    images: int
    bytes: int
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
        digest: SHA-256 (hex) over the options, the classes and each image's split, name and size.
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
        """Give a shard's path relative to the records folder."""
        return f"{split}/{split}-{number:05d}-of-{self.splits[split].shards:05d}.mindrecord"


def read_names(path: Path) -> tuple[str, ...]:
    """Read a list of class names, one a line; blank lines and what follows a tab are left out.

    Raises:
        PlanError: The file cannot be read, is empty, or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read as a list of class names", got=str(error)) from error
    names = tuple(name for line in lines if (name := line.split("\t")[0].strip()))
    if not names or len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise PlanError(f"{path}: not a list of class names", expected="each name once", got=", ".join(twice) or "none")
    return names


def make_plan(
    refs: Iterable[ImageRef | Rejected], database: Path, options: PlanOptions, progress: ProgressCallback
) -> Plan:
    """Make the plan of a conversion.

    Args:
        refs: What the sources hold, in any order, names unique within a split; taken in one pass.
        database: Where to write the plan; replaced if there.
        options: What shapes it.
        progress: Told how many images were found.

    Raises:
        SourceError: No image was found, or a class has no label in the label space.
        PlanError: A class list cannot be read.
    """
    database.unlink(missing_ok=True)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        rejected = _ingest(connection, refs, options, progress)
        _index_records(connection)
        if options.max_per_class is not None:
            _limit_classes(connection, options.max_per_class)
        if options.duplicates == "reject":
            rejected += _reject_duplicates(connection, progress)
        connection.execute("CREATE INDEX by_rank ON image(split, rank, record)")
        classes, label_space = _label_space(connection, options)
        splits = _split_plans(connection, options)
        digest = _digest(connection, options, classes)
        connection.commit()
    rejected.sort(key=lambda item: (SPLITS.index(item.split), item.file_name, item.reason))
    if not splits and not rejected:
        raise SourceError("no images were found", remedy="check the source, --split and --keep-classes")
    return Plan(database, options, classes, label_space, splits, tuple(rejected), digest)


def _ingest(
    connection: sqlite3.Connection,
    refs: Iterable[ImageRef | Rejected],
    options: PlanOptions,
    progress: ProgressCallback,
) -> list[Rejected]:
    connection.execute(
        "CREATE TABLE image(id INTEGER PRIMARY KEY, split TEXT, record INTEGER, rank INTEGER, class TEXT, "
        "file_name TEXT, path INTEGER, offset INTEGER, size INTEGER, url TEXT, status INTEGER)"
    )
    connection.execute("CREATE TABLE path(id INTEGER PRIMARY KEY, path TEXT)")
    keep = None if options.keep_classes is None else frozenset(read_names(options.keep_classes))
    rejected: list[Rejected] = []
    paths = _Paths(connection)
    done = 0

    def rows() -> Iterator[tuple[object, ...]]:
        for ref in refs:
            if isinstance(ref, Rejected):
                rejected.append(ref)
            elif keep is None or ref.class_name in keep or not ref.class_name:
                yield _row(ref, options.seed, paths)

    source = rows()
    while batch := list(islice(source, BATCH_ROWS)):
        connection.executemany("INSERT INTO image VALUES(NULL,?,?,?,?,?,?,?,?,?,?)", batch)
        done += len(batch)
        progress(Progress(done, None, "found"))
    return rejected


class _Paths:
    """Numbers for paths; only the last is kept: an archive stands behind many images in a row, a file behind one."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._last: tuple[Path | None, int] = (None, 0)

    def number(self, path: Path) -> int:
        if path != self._last[0]:
            text = str(path.absolute())
            cursor = self._connection.execute("INSERT INTO path VALUES(NULL, ?)", (text,))
            self._last = (path, cursor.lastrowid or 0)
        return self._last[1]


def _row(ref: ImageRef, seed: int, paths: _Paths) -> tuple[object, ...]:
    name = f"{ref.split}/{ref.file_name}".encode()
    rank = hashlib.blake2b(name, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return (
        ref.split,
        _signed(record_id(ref.split, ref.file_name)),
        int.from_bytes(rank, "little", signed=True),
        ref.class_name,
        ref.file_name,
        paths.number(ref.path),
        ref.offset,
        ref.size_bytes,
        ref.url,
        ref.status,
    )


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _index_records(connection: sqlite3.Connection) -> None:
    """Make sure that record ids are unique: names are (the sources see to that), and 64 bits of SHA-256 nearly so."""
    try:
        connection.execute("CREATE UNIQUE INDEX by_record ON image(record)")
    except sqlite3.IntegrityError as error:
        raise PlanError("two images have the same record id", remedy="rename one, or take them in two runs") from error


def _limit_classes(connection: sqlite3.Connection, limit: int) -> None:
    connection.execute(
        "DELETE FROM image WHERE id IN (SELECT id FROM (SELECT id, ROW_NUMBER() OVER "
        "(PARTITION BY split, class ORDER BY rank, record) AS place FROM image) WHERE place > ?)",
        (limit,),
    )


def _reject_duplicates(connection: sqlite3.Connection, progress: ProgressCallback) -> list[Rejected]:
    """Hash every image once, in the order in which they lie, and keep the first of each: val, then test, then train."""
    from imnet_prep.sources import read

    total = connection.execute("SELECT COUNT(*) FROM image").fetchone()[0]
    connection.execute("CREATE TABLE digest(id INTEGER PRIMARY KEY, sha256 BLOB)")
    for done, row in enumerate(connection.execute(f"{_SELECT} ORDER BY image.path, offset"), 1):
        raw = read(_ref(row))
        if not isinstance(raw, Rejected) and raw.data:  # what cannot be read is accounted for later
            digest = hashlib.sha256(raw.data).digest()
            connection.execute("INSERT INTO digest SELECT id, ? FROM image WHERE record = ?", (digest, row[-1]))
        if done % 1000 == 0 or done == total:
            progress(Progress(done, total, "hashed"))
    found = connection.execute(
        "SELECT id, split, file_name, FIRST_VALUE(split || '/' || file_name) OVER same "
        "FROM image JOIN digest USING (id) "
        "WINDOW same AS (PARTITION BY sha256 ORDER BY split = 'train', split DESC, file_name)"
    ).fetchall()
    twice = [row for row in found if f"{row[1]}/{row[2]}" != row[3]]
    connection.executemany("DELETE FROM image WHERE id = ?", [(row[0],) for row in twice])
    connection.execute("DROP TABLE digest")
    return [Rejected(split, name, Reason.DUPLICATE, f"same bytes as {first}") for _, split, name, first in twice]


def _label_space(connection: sqlite3.Connection, options: PlanOptions) -> tuple[tuple[str, ...], str]:
    found = [row[0] for row in connection.execute("SELECT DISTINCT class FROM image WHERE class != '' ORDER BY class")]
    if options.label_space == "found":
        return tuple(sorted(found)), "found"
    if options.label_space == "imagenet1k":
        names, kind = tuple(wnid for wnid, _ in catalog.synsets()), "imagenet1k"
    elif "/" not in options.label_space and not Path(options.label_space).exists():
        choices = ", ".join(LABEL_SPACES)
        raise PlanError(f"unknown label space {options.label_space!r}", expected=f"{choices}, or a file of class names")
    else:
        names, kind = read_names(Path(options.label_space)), "file"
    foreign = sorted(set(found) - set(names))
    if foreign:
        raise SourceError(
            f"{len(foreign)} of {len(found)} classes have no label in label space {options.label_space!r}",
            expected=f"classes among its {len(names)} names",
            got=", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else ""),
            remedy="use --label-space found, or leave them out with --keep-classes",
        )
    return names, kind


def _split_plans(connection: sqlite3.Connection, options: PlanOptions) -> dict[str, SplitPlan]:
    plans: dict[str, SplitPlan] = {}
    # What is not named as a JPEG will be converted, and may grow (a flat PNG most of all).
    stored = "CASE WHEN lower(file_name) LIKE '%.jpg' OR lower(file_name) LIKE '%.jpeg' THEN size ELSE 4 * size END"
    query = f"SELECT split, COUNT(*), SUM(size), MAX({stored}) FROM image GROUP BY split"
    found = {row[0]: row[1:] for row in connection.execute(query)}
    for split in SPLITS:
        if split in found:
            images, total, largest = found[split]
            count = options.shards or min(MAX_SHARDS, -(-total // SHARD_BYTES))
            count = max(1, min(count, images))
            bounds = tuple(images * number // count for number in range(count + 1))
            plans[split] = SplitPlan(images, total, bounds, choose_layout(-(-images // count), total // count, largest))
    return plans


def _digest(connection: sqlite3.Connection, options: PlanOptions, classes: Sequence[str]) -> str:
    shape = {"options": options.content(), "seed": options.seed, "classes": list(classes)}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for row in connection.execute("SELECT split, file_name, size FROM image ORDER BY split, rank, record"):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


_SELECT = (
    "SELECT split, class, file_name, path.path, offset, size, url, status, record "
    "FROM image JOIN path ON image.path = path.id"
)


def _ref(row: tuple[Any, ...]) -> ImageRef:
    return ImageRef(row[0], row[1], row[2], Path(row[3]), row[4], row[5], row[6], row[7])


def shard_refs(database: Path, split: str, first: int, last: int) -> list[ImageRef]:
    """Read the images of one shard from a plan, in row order.

    Args:
        database: The plan's SQLite file.
        split: The split.
        first: Rank of the first image within the split. last: Rank after the last one (:attr:`SplitPlan.bounds`).
    """
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro&immutable=1", uri=True)) as connection:
        rows = connection.execute(
            f"{_SELECT} WHERE image.id IN "
            "(SELECT id FROM image WHERE split = ? ORDER BY rank, record LIMIT ? OFFSET ?) ORDER BY rank, record",
            (split, last - first, first),
        ).fetchall()
    return [_ref(row) for row in rows]
