"""Samples to one MindRecord file and its index, byte for byte reproducible.

MindSpore's own ``FileWriter`` costs 400 MB and a second for each process, writes other bytes for another chunk size,
has no fsync and finds a full disk late, so the format (see :mod:`imnet_prep.records.mindrecord`) is written here. The
data file is, byte for byte, what ``FileWriter`` makes of the same rows in one call (a test holds that).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from imnet_prep.errors import IntegrityError, PlanError, RecordsError
from imnet_prep.files import file_digest, sqlite_failure
from imnet_prep.records.manifest import COLUMNS
from imnet_prep.records.mindrecord import BLOB, LENGTH, RAW, index_from_data, index_path, read_header, read_index
from imnet_prep.types import ShardInfo

SQLITE_VERSION_OFFSET = 96  # where SQLite notes the version that wrote the file last: it must not differ by machine
SQLITE_VERSION = 3_040_000
MIN_HEADER_BYTES, MAX_HEADER_BYTES = 1 << 14, 1 << 27  # MindSpore's own limits
MIN_PAGE_BYTES, MAX_PAGE_BYTES = 1 << 15, 1 << 28
RAW_BYTES = 80  # a row's scalar fields, about
_PLACES = (
    "ROW_ID", "PAGE_ID_RAW", "PAGE_OFFSET_RAW", "PAGE_OFFSET_RAW_END", "ROW_GROUP_ID",
    "PAGE_ID_BLOB", "PAGE_OFFSET_BLOB", "PAGE_OFFSET_BLOB_END",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes that every shard of a split shares (files read together must agree in them).

    Attributes:
        header_size: Bytes reserved for the header, 16 KiB to 128 MiB, a power of two.
        page_size: Bytes of a page, 32 KiB to 256 MiB, a power of two; a row must fit.
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

    def grown(self, level: int) -> Layout:
        """Return both sizes doubled ``level`` times, each up to its limit."""
        return Layout(min(self.header_size << level, MAX_HEADER_BYTES), min(self.page_size << level, MAX_PAGE_BYTES))


class LayoutTooSmall(Exception):
    """A row or the header does not fit.

    ``doublings`` is how often the layout must at least be doubled: exact for a row. A header may fit after one, as
    there are fewer pages then.
    """

    def __init__(self, name: str, size_bytes: int, limit_bytes: int, doublings: int | None = None) -> None:
        super().__init__(f"{name}: {size_bytes} bytes do not fit in {limit_bytes}")
        self.doublings = (-(-size_bytes // limit_bytes) - 1).bit_length() if doublings is None else doublings


def _power_of_two(value: float, *, nearest: bool = False) -> int:
    exponent = np.log2(max(1.0, value))
    return 1 << int(round(exponent) if nearest else np.ceil(exponent))


def choose_layout(rows: int, total_bytes: int, largest_bytes: int) -> Layout:
    """Choose sizes that waste little at any scale.

    A blob page loses half a row on average, and the last one half of itself, so the square root of mean row times
    shard wastes least; the largest image must fit, twice over where that costs little, as converting can make it grow.
    What does not fit after all makes the split's shards be written again with twice the sizes.

    Args:
        rows: Rows of the fullest shard.
        total_bytes: Bytes of its images.
        largest_bytes: Bytes of the largest image of the split.
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
    """What was given to the disk, to compare with what it gives back.

    Attributes:
        rows: Records.
        sums: Of the header and of each page, their bytes as little-endian 64-bit words added up modulo 2^64.
    """

    rows: int
    sums: tuple[int, ...]


class ShardWriter:
    """Writes one data file row by row, then its header and index.

    One page is held in memory, and of each row its scalar fields and its place (about 80 bytes in all), as they come
    after the images.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        """Create the data file.

        Args:
            path: The data file; must not exist. Its base name goes into the file, so it must never be renamed.
            layout: The sizes of the split.
        """
        self.path = path
        self.layout = layout
        self._file = path.open("xb", buffering=0)
        self._page = bytearray()  # grows to what a page needs, and is then used again
        self._used = 0
        self._raw = bytearray()  # scalar fields of all rows, one after the other
        self._raw_ends = array("Q")  # in _raw
        self._group_start = 0  # in _raw; a row group is a blob page's rows, and never spans raw pages
        self._group_ends = array("I")  # in rows
        self._blob = array("I")  # page, start and end of each row
        self._labels = array("i")
        self._pages: list[dict[str, Any]] = []
        self._sums: list[int] = []

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, image: bytes, label: int, file_name: str) -> None:
        """Append a row.

        Raises:
            LayoutTooSmall: It does not fit in a page.
            OSError: The disk is full or fails.
        """
        packed = msgpack.packb({"file_name": file_name, "label": label})
        raw_bytes, blob_bytes = LENGTH.size + len(packed), LENGTH.size + len(image)
        page_size = self.layout.page_size
        if max(blob_bytes, raw_bytes) > page_size:
            raise LayoutTooSmall(file_name, max(blob_bytes, raw_bytes), page_size)
        if self._used + blob_bytes > page_size or len(self._raw) - self._group_start + raw_bytes > page_size:
            self._flush()
        start, self._used = self._used, self._used + blob_bytes
        if self._used > len(self._page):
            self._page.extend(bytes(min(page_size, 2 * self._used) - len(self._page)))
        LENGTH.pack_into(self._page, start, len(image))
        self._page[start + LENGTH.size : self._used] = image
        self._raw += LENGTH.pack(len(packed))
        self._raw += packed
        self._raw_ends.append(len(self._raw))
        self._blob.extend((len(self._pages), start, self._used))
        self._labels.append(label)

    def _flush(self) -> None:
        """Write the blob page in hand."""
        if not self._used:
            return
        page_id = len(self._pages)
        with memoryview(self._page) as whole, whole[: self._used] as page:
            self._write_page(page_id, page)
        rows = self._group_ends[-1] if self._group_ends else 0, len(self)
        self._pages.append(_page(page_id, BLOB, page_id, self._used, rows, [(0, 0)]))
        self._group_ends.append(len(self))
        self._group_start = len(self._raw)
        self._used = 0

    def _write_page(self, page_id: int, data: bytearray | memoryview) -> None:
        _write_all(self._file, data, self.layout.header_size + page_id * self.layout.page_size)
        self._sums.append(_word_sum(data))

    def finish(self) -> Written:
        """Write what is left, the header and the index; :func:`imnet_prep.files.sync` then brings it to the disk.

        Raises:
            LayoutTooSmall: The header does not fit.
            OSError: The disk is full or fails.
        """
        self._flush()
        raw = self._write_raw()
        header = self._header()
        _write_all(self._file, header, 0)
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
        """Let go of an unfinished file."""
        self._file.close()

    def _write_raw(self) -> Iterator[tuple[int, int, int]]:
        """Write the raw pages; gives page, start and end of each row."""
        places = array("I")
        page, groups = bytearray(), list[tuple[int, int]]()
        first = len(self._pages)

        def flush() -> None:
            page_id = len(self._pages)
            self._write_page(page_id, page)
            # FileWriter numbers the first raw page 0 and each later one by its page id.
            kind_id = 0 if page_id == first else page_id
            self._pages.append(_page(page_id, RAW, kind_id, len(page), (0, 0), groups))

        row = at = 0
        for number, end_row in enumerate(self._group_ends):
            end = self._raw_ends[end_row - 1]
            if page and len(page) + end - at > self.layout.page_size:
                flush()
                page, groups = bytearray(), []
            groups.append((number, len(page)))
            shift = len(page) - at
            while row < end_row:
                start = self._raw_ends[row - 1] if row else 0
                places.extend((len(self._pages), start + shift, self._raw_ends[row] + shift))
                row += 1
            page += self._raw[at:end]
            at = end
        flush()
        return zip(*[iter(places)] * 3, strict=True)

    def _header(self) -> bytes:
        schema = {"blob_fields": ["image"], "desc": "imagenet", "schema": {n: {"type": t} for n, t in COLUMNS.items()}}
        document = {
            "header_size": self.layout.header_size,
            "index_fields": [{"index_field": "label", "schema_id": 0}],
            "page": self._pages,
            "page_size": self.layout.page_size,
            "compression_size": 0,
            "schema": [schema],
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


def _write_all(file: io.FileIO, data: bytes | bytearray | memoryview, offset: int) -> None:
    file.seek(offset)
    done = 0
    with memoryview(data) as view:
        while done < len(view):
            with view[done:] as rest:  # released at once: what is behind it may be about to grow
                done += file.write(rest)


def write_index(path: Path, rows: Iterable[tuple[Any, ...]], fields: Sequence[str] | None = None) -> None:
    """Write ``<path>.db``, for a file of ours the same bytes on every machine.

    Args:
        path: The data file.
        rows: (row, raw page, raw start, raw end, group, blob page, blob start, blob end, *fields) in row order; starts
            and ends are bytes within their page.
        fields: Columns of the indexed fields, as SQL, of a file that others wrote; None for ours.

    Raises:
        OSError: The disk is full or fails.
    """
    database = index_path(path)
    # FileWriter puts before each field the row's number within its schema, and there is one schema.
    columns = fields if fields is not None else ["label_0 INTEGER"]
    indexed = [part for number, field in enumerate(columns) for part in (f"INC_{number} INT", field)]
    keys = ["ROW_ID", *(f"INC_{number}" for number in range(len(columns)))]
    parts = ", ".join([*(f"{name} INT NOT NULL" for name in _PLACES), *indexed, f"PRIMARY KEY({', '.join(keys)})"])
    marks = ",".join(["?"] * len(_PLACES) + ["0,?"] * len(columns))
    connection = sqlite3.connect(database, isolation_level=None)
    try:
        connection.executescript("PRAGMA page_size = 4096; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")
        connection.execute(f"CREATE TABLE INDEXES({parts})")
        connection.executemany(f"INSERT INTO INDEXES VALUES({marks})", rows)
        connection.execute("CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)")
        connection.execute("INSERT INTO SHARD_NAME VALUES(?)", (path.name,))
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise sqlite_failure(error, database) from error
    finally:
        connection.close()
    with database.open("r+b", buffering=0) as file:
        if fields is None:
            _write_all(file, SQLITE_VERSION.to_bytes(4, "big"), SQLITE_VERSION_OFFSET)
        database.chmod(0o644)
        os.fsync(file.fileno())


def _word_sum(data: bytes | bytearray | memoryview) -> int:
    """Add up the bytes as little-endian 64-bit words modulo 2^64; zeros after them change nothing."""
    whole = len(data) & ~7
    words = np.frombuffer(data, "<u8", whole // 8).sum(dtype=np.uint64)
    return (int(words) + int.from_bytes(data[whole:], "little")) % (1 << 64)


def read_back(path: Path, relative: str, written: Written) -> ShardInfo:
    """Read a finished shard again, by the reader and not by the writer's memory, and hash it on the way.

    Args:
        path: The data file.
        relative: Its name in the manifest.
        written: What the writer gave.

    Raises:
        IntegrityError: What is on the disk is not what was written.
    """
    database = index_path(path)
    try:
        header = read_header(path)
        index, walked = read_index(path, header), index_from_data(path, header)
    except RecordsError as error:
        raise _not_as_written(path, str(error)) from error
    digest, sizes = hashlib.sha256(), (header.header_size, *(header.page_size for _ in header.pages))
    with path.open("rb", buffering=0) as file:
        sums = tuple([_hash_region(file, size, digest) for size in sizes])
    if sums != written.sums:
        wrong = [number for number, (a, b) in enumerate(zip(sums, written.sums, strict=False)) if a != b]
        raise _not_as_written(path, f"other bytes in page {wrong[0] - 1}" if wrong else f"{len(header.pages)} pages")
    if not written.rows == len(index) == len(walked) or len(index.differences(walked)):
        raise _not_as_written(path, f"{len(index)} rows in the index, {len(walked)} in the pages")
    return ShardInfo(
        file=relative,
        rows=written.rows,
        size_bytes=path.stat().st_size,
        sha256=digest.hexdigest(),
        index_size_bytes=database.stat().st_size,
        index_sha256=file_digest(database),
    )


def _hash_region(file: io.FileIO, size: int, digest: hashlib._Hash) -> int:
    """Hash the next ``size`` bytes (fewer at the end of the file) and give their word sum."""
    total, buffer = 0, memoryview(bytearray(min(size, 1 << 20)))
    while size > 0 and (got := _fill(file, buffer[: min(size, len(buffer))])):
        digest.update(buffer[:got])
        total += _word_sum(buffer[:got])
        size -= got
    return total % (1 << 64)


def _fill(file: io.FileIO, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends: a short read would shift the words."""
    filled = 0
    while filled < len(buffer) and (got := file.readinto(buffer[filled:])):
        filled += got
    return filled


def _not_as_written(path: Path, got: str) -> IntegrityError:
    return IntegrityError(
        f"{path.name}: reading back does not give what was written",
        got=got,
        remedy="check the disk and memory of this machine, then run the same command again",
    )
