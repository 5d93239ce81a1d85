"""The plan of a conversion: the shard and row of every image, determined by the seed before any work.

The plan is a SQLite file with its rows in the order of the shards. A million images take no memory, and a worker, here
or on another machine, reads only its own part. An image's place is its rank by a keyed hash of its name. It depends on
the seed and the names, never on the order of the sources, their folders, or the workers.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from imnet_prep import catalog
from imnet_prep.build.hold_out import hold_out
from imnet_prep.build.options import PlanOptions, read_names
from imnet_prep.errors import PlanError, SourceError
from imnet_prep.files import sqlite_failure
from imnet_prep.records.publish import remove
from imnet_prep.records.shards import Layout, choose_layout
from imnet_prep.sources import Found, read
from imnet_prep.types import SPLITS, ImageRef, Progress, ProgressCallback, Reason, Rejected, record_id

PLAN_VERSION = 3  # part of each plan's digest; raise it when the same plan would give other bytes
SHARD_BYTES = 64 << 20  # a shard's usual size: quickly repeated after a crash, and enough shards to keep all cores busy
SHARD_IMAGES = 8192  # the same for small images, whose number determines the time
MAX_SHARDS = 128  # a reader keeps one file handle per shard open
BATCH_ROWS = 10_000
ROW_BYTES = 400  # a record's scalar fields, its line of the index and its line of records.jsonl.gz, about
_WITHOUT_JOURNAL = (  # an unfinished plan is discarded
    "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE;"
    "PRAGMA staging.journal_mode = OFF; PRAGMA staging.synchronous = OFF; BEGIN"
)
_COLUMNS = (
    "split INTEGER, record INTEGER, rank INTEGER, class TEXT, file_name TEXT, path INTEGER, offset INTEGER, "
    "size INTEGER, url TEXT, status INTEGER, line TEXT, deflated INTEGER, crc32 INTEGER, meta TEXT"
)
_SELECT = (
    "SELECT split, class, file_name, path.path, offset, size, url, status, line, deflated, crc32, meta, record "
    "FROM {0} JOIN path ON {0}.path = path.id"
)
CONVENTIONS = {  # what the labels mean, by label space
    "found": "the classes that are there, sorted by name, from 0",
    "imagenet1k": "ILSVRC2012: the 1,000 WordNet ids sorted, from 0 (not ILSVRC2012_ID order)",
    "file": "the order of the class list that was given, from 0",
}


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """One split of a plan.

    Attributes:
        images: Images planned.
        bytes: Their bytes as found.
        stored_bytes: The approximate size of the split on the disk.
        first: Place of its first image in the plan.
        bounds: The rank within the split at which each shard begins, and the number of images.
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
    """A plan, whose rows are in ``database``.

    Attributes:
        database: The SQLite file.
        options: The options that it was made with.
        classes: Names in label order.
        label_space: ``found``, ``imagenet1k`` or ``file``.
        splits: By split name; splits without an image are left out.
        rejected: Images rejected before any was read.
        digest: SHA-256 (hex) over the options, the classes and each image's split, name, size, URL and meta.
    """

    database: Path
    options: PlanOptions
    classes: tuple[str, ...]
    label_space: str
    splits: dict[str, SplitPlan]
    rejected: tuple[Rejected, ...] = field(repr=False)
    digest: str

    @property
    def images(self) -> int:
        """Images planned in all splits."""
        return sum(split.images for split in self.splits.values())

    @property
    def bytes(self) -> int:
        """Their bytes as found."""
        return sum(split.bytes for split in self.splits.values())


# --- reading a plan --------------------------------------------------------------------------------------------------


def load_plan(database: Path, options: PlanOptions) -> Plan | None:
    """Read a plan that was made with the same options; return None for one that is missing or not whole."""
    try:
        with closing(_read_only(database)) as connection:
            connection.execute(_SELECT.format("image") + " LIMIT 0")  # earlier versions had fewer columns
            head = json.loads(connection.execute("SELECT json FROM head").fetchone()[0])
            rejected = tuple(
                Rejected.from_json(json.loads(row[0]))
                for row in connection.execute("SELECT item FROM rejected ORDER BY rowid")
            )
        splits = {
            name: SplitPlan(**{**part, "bounds": tuple(part["bounds"]), "layout": Layout(**part["layout"])})
            for name, part in head["splits"].items()
        }
    except (sqlite3.Error, ValueError, TypeError, KeyError, PlanError):
        return None
    return Plan(database, options, tuple(head["classes"]), head["label_space"], splits, rejected, head["digest"])


def shard_refs(database: Path, first: int, last: int) -> Iterator[ImageRef]:
    """Yield the images of a part of a plan, in row order.

    Args:
        database: The plan's SQLite file.
        first: Place of the first image in the plan (:attr:`SplitPlan.first` plus a bound).
        last: Place after the last.
    """
    query = _SELECT.format("image") + " WHERE place >= ? AND place < ? ORDER BY place"
    with closing(_read_only(database)) as connection:
        yield from map(_ref_of, connection.execute(query, (first, last)))


def _read_only(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(os.fsencode(database.absolute()))}?mode=ro&immutable=1", uri=True)


def _ref_of(row: tuple[Any, ...]) -> ImageRef:
    return ImageRef(SPLITS[row[0]], row[1], row[2], os.fsdecode(row[3]), *row[4:12])


# --- making a plan ---------------------------------------------------------------------------------------------------


def make_plan(refs: Iterable[Found], database: Path, options: PlanOptions, progress: ProgressCallback) -> Plan:
    """Write the plan of a conversion. It takes no memory per image, and does not depend on the order of ``refs``.

    Args:
        refs: The images of the sources, in any order, names unique within a split; taken in one pass.
        database: Where to write the plan; replaced if it exists.
        options: What determines it.
        progress: Called with the number of images found and hashed.

    Raises:
        SourceError: No image was found, or a class has no label in the label space.
        PlanError: A class list cannot be read, or names an unknown class.
        OSError: The disk is full or fails.
    """
    staging = database.with_name(database.name + ".found")
    remove(database)
    remove(staging)
    try:
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.execute("ATTACH ? AS staging", (os.fsencode(staging),))
            connection.executescript(_WITHOUT_JOURNAL)
            rejected = _ingest(connection, refs, options, progress)
            if options.max_per_class is not None:  # the first of each class by rank, and all without a class
                connection.execute(
                    "DELETE FROM found WHERE record IN (SELECT record FROM (SELECT record, ROW_NUMBER() OVER "
                    "(PARTITION BY split, class ORDER BY rank, record) AS place FROM found WHERE class != '') "
                    "WHERE place > ?)",
                    (options.max_per_class,),
                )
            if options.duplicates == "reject":
                rejected += _reject_duplicates(connection, progress)
            # From here on the rows are in their order: place is the row number.
            connection.executescript(
                f"CREATE TABLE image(place INTEGER PRIMARY KEY, {_COLUMNS});"
                "INSERT INTO image SELECT NULL, * FROM found ORDER BY split, rank, record"
            )
            classes, label_space = _label_space(connection, options)
            splits = _split_plans(connection, options)
            if not splits and not rejected:
                raise SourceError("no images were found", remedy="check the source, --split and --keep-classes")
            rejected.sort(key=lambda item: (SPLITS.index(item.split), item.file_name, item.reason))
            digest = _digest(connection, options, classes, label_space)
            plan = Plan(database, options, classes, label_space, splits, tuple(rejected), digest)
            _save_head(connection, plan)
        return plan
    except sqlite3.Error as error:
        raise sqlite_failure(error, database) from error
    finally:
        remove(staging)


def _save_head(connection: sqlite3.Connection, plan: Plan) -> None:
    """Write the rest of the plan beside its rows, for :func:`load_plan`."""
    head = {
        "classes": plan.classes,
        "label_space": plan.label_space,
        "digest": plan.digest,
        "splits": {name: asdict(part) for name, part in plan.splits.items()},
    }
    connection.executescript("CREATE TABLE rejected(item TEXT); CREATE TABLE head(json TEXT); BEGIN")
    connection.executemany("INSERT INTO rejected VALUES(?)", ((json.dumps(asdict(item)),) for item in plan.rejected))
    connection.execute("INSERT INTO head VALUES(?)", (json.dumps(head),))
    connection.execute("COMMIT")


def _ingest(
    connection: sqlite3.Connection, refs: Iterable[Found], options: PlanOptions, progress: ProgressCallback
) -> list[Rejected]:
    """Insert the images of the classes to keep, check that record ids are unique, and return the rejected images."""
    connection.execute(f"CREATE TABLE staging.found({_COLUMNS})")
    connection.execute("CREATE TABLE path(id INTEGER PRIMARY KEY, path BLOB)")
    here, key = os.fsencode(os.getcwd()), options.seed.to_bytes(8, "little")
    keep = None if options.keep_classes is None else frozenset(read_names(options.keep_classes))
    seen: set[str] = set()
    rejected: list[Rejected] = []

    def rows() -> Iterator[tuple[object, ...]]:
        done, path, number = 0, "", 0  # the last path: consecutive images of an archive share it
        for ref in refs:
            if isinstance(ref, Rejected):
                if keep is None or ref.reason is Reason.UNLABELLED or ref.file_name.split("/")[0] in keep:
                    rejected.append(ref)
                continue
            seen.add(ref.class_name)
            if keep is None or ref.class_name in keep or not ref.class_name:
                if ref.path != path:
                    path, number = ref.path, number + 1
                    connection.execute("INSERT INTO path VALUES(?, ?)", (number, os.path.join(here, os.fsencode(path))))
                yield _row(ref, key, number)
                done += 1
                if done % BATCH_ROWS == 0:
                    progress(Progress(done, None, "found"))

    found = connection.executemany(f"INSERT INTO found VALUES(?{', ?' * _COLUMNS.count(',')})", rows()).rowcount
    progress(Progress(found, None, "found"))
    if keep is not None and (unknown := sorted(keep - seen)):
        raise PlanError(
            f"{options.keep_classes}: {len(unknown)} of {len(keep)} names are not classes of the sources",
            expected=f"names among {_listed(sorted(seen - {''}))}",
            got=_listed(unknown),
        )
    if options.val_fraction is not None:
        hold_out(connection, options.val_fraction, key, lambda split, name: _keys(split, name, key))
    try:  # names are unique, by the sources, and 64 bits of SHA-256 nearly always
        connection.execute("CREATE UNIQUE INDEX staging.by_record ON found(record)")
    except sqlite3.IntegrityError as error:
        raise PlanError("two images have the same record id", remedy="rename one, or take them in two runs") from error
    return rejected


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


def _keys(split: str, file_name: str, key: bytes) -> tuple[int, int]:
    """Return the record id and the rank of an image, signed as SQLite's integers are."""
    rank = hashlib.blake2b(f"{split}/{file_name}".encode(), digest_size=8, key=key).digest()
    return (record_id(split, file_name) ^ 1 << 63) - (1 << 63), int.from_bytes(rank, "little", signed=True)


def _row(ref: ImageRef, key: bytes, path: int) -> tuple[object, ...]:
    return (
        SPLITS.index(ref.split),
        *_keys(ref.split, ref.file_name, key),
        ref.class_name,
        ref.file_name,
        path,
        ref.offset,
        ref.size_bytes,
        ref.url,
        ref.status,
        ref.line,
        ref.deflated_bytes,
        ref.crc32,
        ref.meta,
    )


def _reject_duplicates(connection: sqlite3.Connection, progress: ProgressCallback) -> list[Rejected]:
    """Hash every image once, in stored order, and keep the first of each in the order val, test, train."""
    total = connection.execute("SELECT COUNT(*) FROM found").fetchone()[0]
    connection.execute("CREATE TABLE staging.digest(record INTEGER PRIMARY KEY, sha256 BLOB)")
    found = connection.execute(_SELECT.format("found") + " ORDER BY found.path, offset")
    for done, row in enumerate(found, 1):
        raw = read(_ref_of(row))
        if not isinstance(raw, Rejected) and raw.data:  # unreadable images are rejected later
            connection.execute("INSERT INTO digest VALUES(?, ?)", (row[-1], hashlib.sha256(raw.data).digest()))
        if done % 1000 == 0 or done == total:
            progress(Progress(done, total, "hashed"))
    twice = connection.execute(
        "SELECT record, split, file_name, first_split, first_name FROM (SELECT record, split, file_name, "
        "FIRST_VALUE(record) OVER same AS first, FIRST_VALUE(split) OVER same AS first_split, "
        "FIRST_VALUE(file_name) OVER same AS first_name FROM found JOIN digest USING (record) "
        "WINDOW same AS (PARTITION BY sha256 ORDER BY split != ?, -split, file_name)) WHERE record != first",
        (SPLITS.index("val"),),
    ).fetchall()
    connection.executemany("DELETE FROM found WHERE record = ?", [(row[0],) for row in twice])
    return [
        Rejected(SPLITS[split], name, Reason.DUPLICATE, f"same bytes as {SPLITS[first]}/{first_name}")
        for _, split, name, first, first_name in twice
    ]


def _label_space(connection: sqlite3.Connection, options: PlanOptions) -> tuple[tuple[str, ...], str]:
    """Return the class names in label order, and the kind of the label space."""
    found = sorted(row[0] for row in connection.execute("SELECT DISTINCT class FROM image WHERE class != ''"))
    if options.label_space == "found":
        return tuple(found), "found"
    if options.label_space == "imagenet1k":
        names, kind = tuple(wnid for wnid, _ in catalog.synsets()), "imagenet1k"
    else:
        names, kind = tuple(options.label_names()), "file"
    if foreign := sorted(set(found) - set(names)):
        raise SourceError(
            f"{len(foreign)} of {len(found)} classes have no label in label space {options.label_space!r}",
            expected=f"classes among its {len(names)} names",
            got=", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else ""),
            remedy="use --label-space found, or leave them out with --keep-classes",
        )
    return names, kind


def _split_plans(connection: sqlite3.Connection, options: PlanOptions) -> dict[str, SplitPlan]:
    """Choose the number of shards of each split and the layout of their files."""
    plans: dict[str, SplitPlan] = {}
    # A file without a JPEG name will be converted, and may grow (a flat PNG most of all).
    stored = "CASE WHEN lower(file_name) LIKE '%.jpg' OR lower(file_name) LIKE '%.jpeg' THEN size ELSE 4 * size END"
    query = f"SELECT split, COUNT(*), SUM(size), MAX({stored}), MIN(place) FROM image GROUP BY split ORDER BY split"
    for number, images, total, largest_found, first in connection.execute(query):
        usual = min(MAX_SHARDS, max(1, -(-total // SHARD_BYTES), -(-images // SHARD_IMAGES)))
        count = min(options.shards or usual, images)
        bounds = tuple(images * shard // count for shard in range(count + 1))
        total_stored, largest = total, largest_found
        if options.store.short_side is not None:
            # A photograph at quality 90 takes about half a byte a pixel; a side is seldom over 8 times the other.
            square = options.store.short_side**2
            total_stored, largest = min(total, images * square * 2 // 3), min(largest_found, 8 * square)
        layout = choose_layout(-(-images // count), total_stored // count, largest)
        on_disk = total_stored + count * (layout.header_size + layout.page_size // 2 + (1 << 14)) + ROW_BYTES * images
        plans[SPLITS[number]] = SplitPlan(images, total, on_disk, first, bounds, layout)
    return plans


def _digest(connection: sqlite3.Connection, options: PlanOptions, classes: Sequence[str], label_space: str) -> str:
    shape = {
        "version": PLAN_VERSION,
        "options": options.content(),
        "seed": options.seed,
        "label_space": label_space,
        "classes": list(classes),
    }
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    rows = connection.execute("SELECT split, file_name, size, url, status, meta FROM image ORDER BY place")
    for split, *row, meta in rows:
        digest.update(json.dumps([SPLITS[split], *row, *([meta] if meta else [])]).encode())
    return digest.hexdigest()
