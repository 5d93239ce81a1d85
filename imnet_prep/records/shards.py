"""Write samples to a MindRecord file and its index, byte for byte reproducibly.

The format (see :mod:`imnet_prep.records.mindrecord`) is written here because MindSpore's ``FileWriter`` costs 400 MB
and a second per process, writes different bytes for each chunk size, does not fsync, and detects a full disk late. The
data file is, byte for byte, what ``FileWriter`` writes for the same rows in one call; a test checks this.
"""

import hashlib
import json
import os
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Self

import msgpack
import numpy as np

from imnet_prep.errors import IntegrityError, PlanError, RecordsError
from imnet_prep.files import READ_BYTES, PlainFile, file_digest, sqlite_failure
from imnet_prep.records.manifest import COLUMNS
from imnet_prep.records.mindrecord import (
    BLOB,
    LENGTH,
    MAX_HEADER_BYTES,
    MAX_PAGE_BYTES,
    RAW,
    index_from_data,
    index_path,
    read_header,
    read_index,
)
from imnet_prep.types import ShardInfo

SQLITE_VERSION_OFFSET = 96  # where SQLite stores the version that last wrote the file: it must not differ by machine
SQLITE_VERSION = 3_040_000
MIN_HEADER_BYTES, MIN_PAGE_BYTES = 1 << 14, 1 << 15  # MindSpore's limits
_MODULUS = 1 << 64  # of sums
RAW_BYTES = 80  # approximate size of a row's scalar fields
_PLACES = (
    "ROW_ID", "PAGE_ID_RAW", "PAGE_OFFSET_RAW", "PAGE_OFFSET_RAW_END", "ROW_GROUP_ID",
    "PAGE_ID_BLOB", "PAGE_OFFSET_BLOB", "PAGE_OFFSET_BLOB_END",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes that all shards of a split share; MindSpore requires this of files that are read together.

    Attributes:
        header_size: Bytes reserved for the header, 16 KiB to 128 MiB, a power of two.
        page_size: Size of a page in bytes, 32 KiB to 256 MiB, a power of two; a row must fit in a page.
    """

    header_size: int
    page_size: int

    def __post_init__(self) -> None:
        for name, size, low, high in (
            ("header_size", self.header_size, MIN_HEADER_BYTES, MAX_HEADER_BYTES),
            ("page_size", self.page_size, MIN_PAGE_BYTES, MAX_PAGE_BYTES),
        ):
            if not low <= size <= high or size & (size - 1):
                raise PlanError(f"{name} of a shard", expected=f"a power of two from {low} to {high}", got=str(size))

    def grown(self, level: int) -> Self:
        """Return both sizes doubled ``level`` times, each up to its limit."""
        return replace(
            self,
            header_size=min(self.header_size << level, MAX_HEADER_BYTES),
            page_size=min(self.page_size << level, MAX_PAGE_BYTES),
        )


class LayoutTooSmall(Exception):
    """A row or the header does not fit.

    ``doublings`` is how often the layout must be doubled at least. It is exact for a row; for a header it is 1, as
    larger pages also need fewer entries in the header.
    """

    def __init__(self, name: str, size_bytes: int, limit_bytes: int, doublings: int | None = None) -> None:
        super().__init__(f"{name}: {size_bytes} bytes do not fit in {limit_bytes}")
        self.doublings = (-(-size_bytes // limit_bytes) - 1).bit_length() if doublings is None else doublings


def _power_of_two(value: float, *, nearest: bool = False) -> int:
    exponent = np.log2(max(1.0, value))
    return 1 << int(round(exponent) if nearest else np.ceil(exponent))


def choose_layout(rows: int, total_bytes: int, largest_bytes: int) -> Layout:
    """Choose sizes that waste little space at any scale.

    A blob page wastes half a row on average, and the last page half of itself, so a page size near the square root of
    (mean row size times shard size) wastes least. The largest image must fit, twice over where that costs little, as
    conversion can make it grow. If something still does not fit, the split is written again with doubled sizes.

    Args:
        rows: Number of rows of the fullest shard.
        total_bytes: Size of its images.
        largest_bytes: Size of the largest image of the split.
    """
    mean = total_bytes / max(1, rows)
    least = _power_of_two((2 * (mean + LENGTH.size) * total_bytes) ** 0.5, nearest=True)
    fits = _power_of_two(max(largest_bytes + 4096, min(2 * largest_bytes + 4096, total_bytes / 16)))
    page = min(max(least, fits, MIN_PAGE_BYTES), MAX_PAGE_BYTES)
    stored = total_bytes + LENGTH.size * rows
    pages = 4 + 2 * stored / max(page / 4, page - largest_bytes) + 2 * RAW_BYTES * rows / page
    header = _power_of_two(max(MIN_HEADER_BYTES, 256 * pages))  # a page takes about 200 bytes of JSON
    return Layout(min(header, MAX_HEADER_BYTES), page)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, to compare with what is read back.

    Attributes:
        rows: Number of records.
        sums: Of the header and of each page (:func:`_word_sum`).
    """

    rows: int
    sums: tuple[int, ...]


class ShardWriter:
    """Write a data file row by row, then its header and index.

    Images are written at once, while they are in the processor's cache. In memory it holds the scalar fields and the
    place of every row (about 80 bytes), which are written after the images.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        """Create the data file.

        Args:
            path: The data file; must not exist. The file stores its base name, so it must never be renamed.
            layout: The sizes of the split.
        """
        self.path = path
        self.layout = layout
        self._file = path.open("xb")
        self._used = self._sum = 0  # bytes of the page so far, and their sum
        self._group = bytearray()  # scalar fields of the rows of the blob page; a row group never spans raw pages
        self._groups: list[tuple[int, bytes]] = []  # number of rows and scalar fields of the groups before
        self._raw_sizes = array("I")  # of each row
        self._blob = array("I")  # page, start and end of each row
        self._labels = array("i")
        self._pages: list[dict[str, Any]] = []
        self._sums: list[int] = []

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, image: bytes, label: int, file_name: str) -> None:
        """Append a row.

        Raises:
            LayoutTooSmall: The row does not fit in a page.
            OSError: The disk is full or fails.
        """
        packed = msgpack.packb({"file_name": file_name, "label": label})
        raw_bytes, blob_bytes = LENGTH.size + len(packed), LENGTH.size + len(image)
        page_size = self.layout.page_size
        if max(blob_bytes, raw_bytes) > page_size:
            raise LayoutTooSmall(file_name, max(blob_bytes, raw_bytes), page_size)
        if self._used + blob_bytes > page_size or len(self._group) + raw_bytes > page_size:
            self._end_page()
        if not self._used:
            self._file.seek(self._page_offset())
        row, start = LENGTH.pack(len(image)) + image, self._used
        self._file.write(row)
        self._sum += _word_sum(row, start)
        self._used += blob_bytes
        self._group += LENGTH.pack(len(packed)) + packed
        self._raw_sizes.append(raw_bytes)
        self._blob.extend((len(self._pages), start, self._used))
        self._labels.append(label)

    def _page_offset(self) -> int:
        """Return the first byte of the next page."""
        return self.layout.header_size + len(self._pages) * self.layout.page_size

    def _end_page(self) -> None:
        """End the current blob page."""
        if not self._used:
            return
        page_id = len(self._pages)
        self._sums.append(self._sum % _MODULUS)
        first_row = self._pages[-1]["end_row_id"] if self._pages else 0
        self._pages.append(_page(page_id, BLOB, page_id, self._used, (first_row, len(self)), [(0, 0)]))
        self._groups.append((len(self) - first_row, bytes(self._group)))
        self._group.clear()
        self._used = self._sum = 0

    def finish(self) -> Written:
        """Write the remaining rows, the header and the index; :func:`imnet_prep.files.sync` flushes the data file.

        Raises:
            LayoutTooSmall: The header does not fit.
            OSError: The disk is full or fails.
        """
        self._end_page()
        raw = self._write_raw()
        header = self._header()
        self._file.seek(0)
        self._file.write(header)
        self._file.close()
        self.path.chmod(0o644)
        blob = self._blob
        rows = (
            (row, *place, blob[3 * row], *blob[3 * row : 3 * row + 3], self._labels[row])
            for row, place in enumerate(raw)
        )
        write_index(self.path, rows)
        return Written(len(self), (_word_sum(header), *self._sums))

    def close(self) -> None:
        """Close an unfinished file."""
        self._file.close()

    def _write_raw(self) -> Iterator[tuple[int, int, int]]:
        """Write the raw pages; return page, start and end of each row."""
        places, sizes = array("I"), iter(self._raw_sizes)
        page, groups = bytearray(), list[tuple[int, int]]()
        first = len(self._pages)

        def flush() -> None:
            page_id = len(self._pages)
            self._file.seek(self._page_offset())
            self._file.write(page)
            self._sums.append(_word_sum(page))
            # FileWriter numbers the first raw page 0 and each later one by its page id.
            kind_id = 0 if page_id == first else page_id
            self._pages.append(_page(page_id, RAW, kind_id, len(page), (0, 0), groups))

        for number, (rows, data) in enumerate(self._groups):
            if page and len(page) + len(data) > self.layout.page_size:
                flush()
                page, groups = bytearray(), []
            groups.append((number, len(page)))
            start = len(page)
            for size in islice(sizes, rows):
                places.extend((len(self._pages), start, start + size))
                start += size
            page += data
        flush()
        return zip(*[iter(places)] * 3, strict=True)

    def _header(self) -> bytes:
        document = {
            "header_size": self.layout.header_size,
            "index_fields": [{"index_field": "label", "schema_id": 0}],
            "page": self._pages,
            "page_size": self.layout.page_size,
            "compression_size": 0,
            "schema": [
                {
                    "blob_fields": ["image"],
                    "desc": "imagenet",
                    "schema": {name: {"type": kind} for name, kind in COLUMNS.items()},
                }
            ],
            "shard_addresses": [self.path.name],
            "shard_id": 0,
            "statistics": None,
            "version": "3.0",
        }
        text = json.dumps(document, separators=(",", ":")).encode()
        if LENGTH.size + len(text) > self.layout.header_size:
            raise LayoutTooSmall(self.path.name, LENGTH.size + len(text), self.layout.header_size, 1)
        return LENGTH.pack(len(text)) + text


def _page(
    page_id: int, kind: str, kind_id: int, used: int, rows: tuple[int, int], groups: list[tuple[int, int]]
) -> dict[str, Any]:
    return {
        "end_row_id": rows[1],
        "page_id": page_id,
        "page_size": used,
        "page_type": kind,
        "page_type_id": kind_id,
        "row_group_ids": [{"id": number, "offset": offset} for number, offset in groups],
        "shard_id": 0,
        "start_row_id": rows[0],
    }


def write_index(path: Path, rows: Iterable[tuple[Any, ...]], fields: Sequence[str] | None = None) -> None:
    """Write ``<path>.db``; for our own files the bytes are the same on every machine.

    Args:
        path: The data file.
        rows: (row, raw page, raw start, raw end, group, blob page, blob start, blob end, *fields) in row order; starts
            and ends are byte offsets in their page.
        fields: The columns of the indexed fields, as SQL, for a file of another writer; None for our own.

    Raises:
        OSError: The disk is full or fails.
    """
    database = index_path(path)
    # Before each field FileWriter stores the number of its schema, and there is only one.
    columns = fields if fields is not None else ["label_0 INTEGER"]
    indexed = [part for number, field in enumerate(columns) for part in (f"INC_{number} INT", field)]
    keys = ["ROW_ID", *(f"INC_{number}" for number in range(len(columns)))]
    parts = ", ".join([*(f"{name} INT NOT NULL" for name in _PLACES), *indexed, f"PRIMARY KEY({', '.join(keys)})"])
    marks = ",".join(["?"] * len(_PLACES) + ["0,?"] * len(columns))
    try:
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            connection.executescript(
                "PRAGMA page_size = 4096; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN"
            )
            connection.execute(f"CREATE TABLE INDEXES({parts})")
            connection.executemany(f"INSERT INTO INDEXES VALUES({marks})", rows)
            connection.execute("CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)")
            connection.execute("INSERT INTO SHARD_NAME VALUES(?)", (path.name,))
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise sqlite_failure(error, database) from error
    with database.open("r+b") as file:
        if fields is None:
            file.seek(SQLITE_VERSION_OFFSET)
            file.write(SQLITE_VERSION.to_bytes(4, "big"))
            file.flush()
        database.chmod(0o644)
        os.fsync(file.fileno())


def _word_sum(data: bytes | bytearray, start: int = 0) -> int:
    """Add the bytes of a page from byte ``start`` on, as the page's little-endian 64-bit words, modulo 2^64.

    So the sums of the parts of a page add up to that of the page, and zeros behind it change nothing.
    """
    before = min(-start % 8, len(data))  # bytes that belong to a word begun before
    words = (len(data) - before) // 8
    end = before + 8 * words
    total = int(np.frombuffer(data, "<u8", words, before).sum(dtype=np.uint64)) if words else 0
    total += int.from_bytes(data[:before], "little") << 8 * (start % 8)
    return (total + int.from_bytes(data[end:], "little")) % _MODULUS


def read_back(path: Path, relative: str, written: Written) -> ShardInfo:
    """Read a finished shard, compare it with what was written, and hash it on the way.

    Args:
        path: The data file.
        relative: Its name in the manifest.
        written: The result of the writer.

    Raises:
        IntegrityError: The disk does not hold what was written.
    """
    database = index_path(path)
    try:
        header = read_header(path)
        index, walked = read_index(path, header), index_from_data(path, header)
    except RecordsError as error:
        raise _not_as_written(path, str(error)) from error
    file, digest = PlainFile(path), hashlib.sha256()
    sums: list[int] = []
    for start, end in pairwise([0, *(header.offset(number) for number in range(len(header.pages) + 1))]):
        sums.append(0)
        for offset in range(start, end, READ_BYTES):
            data = file.read(min(READ_BYTES, end - offset), offset)
            digest.update(data)
            sums[-1] = (sums[-1] + _word_sum(data)) % _MODULUS
    if tuple(sums) != written.sums:
        wrong = [number for number, (a, b) in enumerate(zip(sums, written.sums, strict=False)) if a != b]
        raise _not_as_written(path, f"other bytes in page {wrong[0] - 1}" if wrong else f"{len(header.pages)} pages")
    if not written.rows == len(index) == len(walked) or len(index.differences(walked)):
        raise _not_as_written(path, f"{len(index)} rows in the index, {len(walked)} in the pages")
    return ShardInfo(
        file=relative,
        rows=written.rows,
        size_bytes=file.size_bytes,
        sha256=digest.hexdigest(),
        index_size_bytes=database.stat().st_size,
        index_sha256=file_digest(database),
    )


def _not_as_written(path: Path, got: str) -> IntegrityError:
    return IntegrityError(
        f"{path.name}: what is read back is not what was written",
        got=got,
        remedy="check the disk and memory of this machine, then run the same command again",
    )
