"""Samples to one MindRecord file and its index, byte for byte reproducible.

MindSpore's own ``FileWriter`` costs 400 MB and a second for each process, writes other bytes for another chunk size,
has no fsync and finds a full disk late, so the format (see :mod:`imnet_prep.mindrecord`) is written here. The data file
is, byte for byte, what ``FileWriter`` makes of the same rows in one call (a test holds that); ``MindDataset`` reads it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from imnet_prep.errors import IntegrityError, PlanError
from imnet_prep.files import file_digest
from imnet_prep.manifest import COLUMNS
from imnet_prep.mindrecord import BLOB, LENGTH, RAW, RowIndex, Shard, index_from_data, index_path, read_header
from imnet_prep.types import ShardInfo

SQLITE_VERSION_OFFSET = 96  # where SQLite notes the version that wrote the file last: it must not differ by machine
SQLITE_VERSION = 3_040_000
_INDEXES = (
    "CREATE TABLE INDEXES(ROW_ID INT NOT NULL, PAGE_ID_RAW INT NOT NULL, PAGE_OFFSET_RAW INT NOT NULL, "
    "PAGE_OFFSET_RAW_END INT NOT NULL, ROW_GROUP_ID INT NOT NULL, PAGE_ID_BLOB INT NOT NULL, "
    "PAGE_OFFSET_BLOB INT NOT NULL, PAGE_OFFSET_BLOB_END INT NOT NULL, INC_0 INT, label_0 INTEGER, "
    "PRIMARY KEY(ROW_ID, INC_0))"
)


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
            ("header_size", self.header_size, 1 << 14, 1 << 27),
            ("page_size", self.page_size, 1 << 15, 1 << 28),
        ):
            if not low <= size <= high or size & (size - 1):
                raise PlanError(f"{name} of a shard", expected=f"a power of two from {low} to {high}", got=str(size))


def _power_of_two(value: float) -> int:
    return 1 << max(0, int(np.ceil(np.log2(max(1.0, value)))))


def choose_layout(rows: int, total_bytes: int, largest_bytes: int) -> Layout:
    """Choose sizes that waste little at any scale.

    A blob page loses half a row on average, so a page should hold many rows; it must hold twice the largest source
    image, as converting one can make it larger; and it should be a small part of a small shard.

    Args:
        rows: Rows of the fullest shard.
        total_bytes: Bytes of its images.
        largest_bytes: Bytes of the largest source image of the split.
    """
    mean = total_bytes / max(1, rows)
    least = 1 << 20 if total_bytes > 16 << 20 else 1 << 18
    page = _power_of_two(max(least, 2 * largest_bytes + 4096, min(64 * mean, total_bytes / 64)))
    page = min(page, 1 << 28)
    pages = 8 + 2 * total_bytes / max(page / 4, page - largest_bytes)
    header = _power_of_two(max(1 << 16, 2 * 256 * pages))
    return Layout(min(header, 1 << 27), page)


class ShardWriter:
    """Writes one data file row by row, then its header and index.

    One page is held in memory, and the scalar fields of all rows (about 50 bytes each), as they come after the images.
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
        self._page = bytearray()
        self._page_rows = 0
        self._group: list[bytes] = []  # raw rows of the blob page in hand; a row group never spans raw pages
        self._groups: list[list[bytes]] = []
        self._group_bytes = 0
        self._blob: list[tuple[int, int, int]] = []  # page, start, end of each row
        self._labels: list[int] = []
        self._pages: list[dict[str, Any]] = []

    def add(self, image: bytes, label: int, file_name: str) -> None:
        """Append a row.

        Raises:
            PlanError: It does not fit in a page.
            OSError: The disk is full or fails.
        """
        packed = msgpack.packb({"file_name": file_name, "label": label})
        raw = LENGTH.pack(len(packed)) + packed
        blob_bytes = LENGTH.size + len(image)
        if max(blob_bytes, len(raw)) > self.layout.page_size:
            raise PlanError(f"{file_name}: does not fit in a page", expected=f"{self.layout.page_size} bytes at most")
        full = len(self._page) + blob_bytes > self.layout.page_size
        if full or self._group_bytes + len(raw) > self.layout.page_size:
            self._flush()
        start = len(self._page)
        self._page += LENGTH.pack(len(image))
        self._page += image
        self._blob.append((len(self._pages), start, len(self._page)))
        self._labels.append(label)
        self._group.append(raw)
        self._group_bytes += len(raw)

    def _flush(self) -> None:
        """Write the blob page in hand, so that its space is taken first and a full disk is found at once."""
        if not self._page:
            return
        page_id = len(self._pages)
        offset = self.layout.header_size + page_id * self.layout.page_size
        os.posix_fallocate(self._file.fileno(), offset, len(self._page))
        _write_all(self._file.fileno(), self._page, offset)
        rows = len(self._blob) - len(self._group), len(self._blob)
        self._pages.append(_page(page_id, BLOB, page_id, len(self._page), rows, [(0, 0)]))
        self._groups.append(self._group)
        self._page, self._group, self._group_bytes = bytearray(), [], 0

    def finish(self) -> None:
        """Write what is left, the header and the index, and bring all of it to the disk.

        Raises:
            OSError: The disk is full or fails.
        """
        self._flush()
        raw = self._write_raw()
        header = self._header()
        _write_all(self._file.fileno(), header, 0)
        os.fchmod(self._file.fileno(), 0o644)
        os.fsync(self._file.fileno())
        self._file.close()
        rows = (
            (row, *place, page, page, start, end, label)
            for row, (place, (page, start, end), label) in enumerate(zip(raw, self._blob, self._labels, strict=True))
        )
        write_index(self.path, rows)

    def close(self) -> None:
        """Let go of an unfinished file."""
        self._file.close()

    def _write_raw(self) -> list[tuple[int, int, int]]:
        """Write the raw pages; gives page, start and end of each row."""
        places: list[tuple[int, int, int]] = []
        page, starts = bytearray(), list[tuple[int, int]]()
        first = len(self._pages)

        def flush() -> None:
            page_id = len(self._pages)
            _write_all(self._file.fileno(), page, self.layout.header_size + page_id * self.layout.page_size)
            # FileWriter numbers the first raw page 0 and each later one by its page id.
            kind_id = 0 if page_id == first else page_id
            self._pages.append(_page(page_id, RAW, kind_id, len(page), (0, 0), starts))

        for number, group in enumerate(self._groups):
            if page and len(page) + sum(map(len, group)) > self.layout.page_size:
                flush()
                page, starts = bytearray(), []
            starts.append((number, len(page)))
            for raw in group:
                places.append((len(self._pages), len(page), len(page) + len(raw)))
                page += raw
        flush()
        return places

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
            raise PlanError(
                f"{self.path.name}: the header does not fit",
                expected=f"{self.layout.header_size} bytes at most",
                got=str(len(text)),
                remedy="use more shards",
            )
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


def _write_all(descriptor: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_index(path: Path, rows: Iterable[tuple[int, ...]]) -> None:
    """Write ``<path>.db``, the same bytes on every machine.

    Args:
        path: The data file.
        rows: (row, raw page, raw start, raw end, group, blob page, blob start, blob end, label) in row order; starts
            and ends are bytes within their page.

    Raises:
        OSError: The disk is full or fails.
    """
    database = index_path(path)
    connection = sqlite3.connect(database, isolation_level=None)
    try:
        connection.execute("PRAGMA page_size = 4096")
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        connection.execute(_INDEXES)
        # INC_0 is the row number within the one schema, as MindSpore writes it.
        connection.executemany("INSERT INTO INDEXES VALUES(?1,?2,?3,?4,?5,?6,?7,?8,0,?9)", rows)
        connection.execute("CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)")
        connection.execute("INSERT INTO SHARD_NAME VALUES(?)", (path.name,))
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        full = errno.ENOSPC if "full" in str(error) else errno.EIO
        raise OSError(full, f"the index could not be written: {error}", str(database)) from error
    finally:
        connection.close()
    with database.open("r+b", buffering=0) as file:
        _write_all(file.fileno(), SQLITE_VERSION.to_bytes(4, "big"), SQLITE_VERSION_OFFSET)
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())


def read_back(path: Path, relative: str, digests: list[str]) -> ShardInfo:
    """Read a finished shard again, by the reader and not by the writer's memory.

    Args:
        path: The data file.
        relative: Its name in the manifest.
        digests: SHA-256 (hex) of each row's image, in order.

    Raises:
        IntegrityError: What is on the disk is not what was written.
    """
    header = read_header(path)
    index: RowIndex = index_from_data(path, header)
    with Shard(path) as shard:
        same = all(np.array_equal(getattr(index, name), getattr(shard.index, name)) for name in RowIndex.__slots__)
        wrong = [row for row, digest in enumerate(digests) if row >= len(shard) or _image_digest(shard, row) != digest]
        if not same or wrong or len(shard) != len(digests):
            raise IntegrityError(
                f"{path}: reading back does not give what was written",
                expected=f"{len(digests)} rows",
                got=f"{len(shard)} rows, first wrong row {wrong[0] if wrong else 'none'}",
                remedy="check the disk and memory of this machine, then run the same command again",
            )
    database = index_path(path)
    return ShardInfo(
        file=relative,
        rows=len(digests),
        size_bytes=path.stat().st_size,
        sha256=file_digest(path),
        index_size_bytes=database.stat().st_size,
        index_sha256=file_digest(database),
    )


def _image_digest(shard: Shard, row: int) -> str:
    return hashlib.sha256(shard.image(row)).hexdigest()
