"""Read MindRecord files in plain Python, without MindSpore: header, index and rows.

Source: the format as MindSpore 2.10 writes it. A data file is an 8-byte little-endian length, a JSON header of that
length, zeros up to ``header_size``, then pages of ``page_size``. For each row, a raw page holds an 8-byte length and a
msgpack map of the scalar and string fields; a blob page holds, for each bytes field, an 8-byte length and the bytes.
The index ``<file>.db`` is an SQLite database: its table INDEXES has one line per row, with the row's place in both
pages and the indexed fields.
"""

import json
import os
import re
import sqlite3
import struct
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError
from imnet_prep.files import PlainFile

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 128 << 20  # MindSpore's limits for a header and a page
MAX_PAGE_BYTES = 256 << 20
MAX_PAGES = 1 << 22
RAW, BLOB = "RAW_DATA", "BLOB_DATA"
NO_LABEL = -2  # the label of a row where none is known; -1 is the test split's
_INDEX_COLUMNS = (
    "ROW_ID, PAGE_ID_RAW, PAGE_OFFSET_RAW, PAGE_OFFSET_RAW_END, PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END"
)


@dataclass(frozen=True, slots=True)
class Page:
    """A page as the header lists it.

    Attributes:
        page_id: The number of the page, from 0.
        kind: ``RAW_DATA`` or ``BLOB_DATA``.
        used_bytes: Number of bytes that hold rows.
        end_row: The row after the last row of a blob page.
        groups: For a raw page, (row group, byte where its rows begin).
    """

    page_id: int
    kind: str
    used_bytes: int
    end_row: int
    groups: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a data file.

    Attributes:
        length: Size of the JSON in bytes, without the 8-byte length before it.
        header_size: Bytes reserved for the header; the first page begins here.
        page_size: Size of a page in bytes.
        fields: Type by field name.
        blob_fields: The fields stored in blob pages, in order.
        index_fields: The fields stored in the index.
        addresses: File names that the header lists.
        pages: The pages, in the order of their ids.
    """

    length: int
    header_size: int
    page_size: int
    fields: dict[str, str]
    blob_fields: tuple[str, ...]
    index_fields: tuple[str, ...]
    addresses: tuple[str, ...]
    pages: tuple[Page, ...]

    @property
    def image_field(self) -> str:
        """The column that holds the image: ``image`` (ours and ImageNetToMR's), ``data``, or the first bytes column.

        Raises:
            RecordsError: There is no bytes column.
        """
        if not self.blob_fields:
            raise RecordsError("no column of images", expected="a bytes column `image`", got=str(sorted(self.fields)))
        return next((name for name in ("image", "data") if name in self.blob_fields), self.blob_fields[0])

    @property
    def rows(self) -> int:
        """Number of rows, counted by the blob pages; 0 without a blob field."""
        return max((page.end_row for page in self.pages if page.kind == BLOB), default=0)

    def offset(self, page_id: int) -> int:
        """Return the offset of a page in the data file, in bytes."""
        return self.header_size + page_id * self.page_size


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Where each row lies.

    Attributes:
        raw_start: int64 (rows,), absolute byte offset in the data file. raw_end, blob_start and blob_end likewise;
            ends are exclusive.
        label: int64 (rows,), the indexed labels; None where the index has none.
    """

    raw_start: NDArray[np.int64]
    raw_end: NDArray[np.int64]
    blob_start: NDArray[np.int64]
    blob_end: NDArray[np.int64]
    label: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.raw_start)

    def differences(self, other: Self) -> NDArray[np.intp]:
        """Return the rows present in both indexes that lie in different places."""
        rows = min(len(self), len(other))
        differ = [
            getattr(self, name)[:rows] != getattr(other, name)[:rows]
            for name in ("raw_start", "raw_end", "blob_start", "blob_end")
        ]
        return np.flatnonzero(np.logical_or.reduce(differ))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn a failure to open or read a data file into a RecordsError."""
    try:
        yield
    except OSError as error:
        raise RecordsError(
            f"{path}: cannot be read", got=error.strerror or str(error), remedy="restore the file or convert again"
        ) from error


def read_header(path: Path) -> Header:
    """Read and check the header of a data file.

    Raises:
        RecordsError: The file is missing or too short, or its header is damaged.
    """
    with _reading(path):
        file = PlainFile(path)
        prefix = file.read(LENGTH.size, 0)
        length = LENGTH.unpack(prefix)[0] if len(prefix) == LENGTH.size else 0
        text = file.read(length, LENGTH.size) if 0 < length <= MAX_HEADER_BYTES else b""
    if not text or len(text) != length:
        raise _not_mindrecord(path, f"a header length of {length} bytes in a file of {file.size_bytes}")
    try:
        return _parse_header(json.loads(text), length)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise _not_mindrecord(path, f"{type(error).__name__}: {error}") from error


def _not_mindrecord(path: Path, got: str) -> RecordsError:
    return RecordsError(f"{path}: the MindRecord header is damaged", expected="a MindRecord data file", got=got)


def _parse_header(data: dict[str, Any], length: int) -> Header:
    schema = data["schema"][0]
    header = Header(
        length=length,
        header_size=int(data["header_size"]),
        page_size=int(data["page_size"]),
        fields={name: str(spec["type"]) for name, spec in schema["schema"].items()},
        blob_fields=tuple(map(str, schema.get("blob_fields") or ())),
        index_fields=tuple(str(entry["index_field"]) for entry in data.get("index_fields") or ()),
        addresses=tuple(map(str, data["shard_addresses"])),
        pages=tuple(
            Page(
                int(page["page_id"]),
                str(page["page_type"]),
                int(page["page_size"]),
                int(page["end_row_id"]),
                tuple((int(group["id"]), int(group["offset"])) for group in page.get("row_group_ids") or ()),
            )
            # null in a file without rows; ImageNetToMR leaves such files where there are few images
            for page in sorted(data["page"] or (), key=lambda page: int(page["page_id"]))
        ),
    )
    if not length + LENGTH.size <= header.header_size <= MAX_HEADER_BYTES:
        raise ValueError(f"header_size {header.header_size}")
    if not 0 < header.page_size <= MAX_PAGE_BYTES or len(header.pages) > MAX_PAGES:
        raise ValueError(f"page_size {header.page_size}, {len(header.pages)} pages")
    for number, page in enumerate(header.pages):
        if page.page_id != number or not 0 <= page.used_bytes <= header.page_size or page.kind not in (RAW, BLOB):
            raise ValueError(f"page {number} does not fit: {page.kind}, {page.used_bytes} bytes")
    return header


def index_path(path: Path) -> Path:
    """Return the path of the index that belongs to a data file."""
    return path.with_name(path.name + ".db")


def read_index(path: Path, header: Header) -> RowIndex:
    """Read from its ``.db`` where the rows of a data file lie; leave no file beside it.

    Raises:
        RecordsError: The index is missing or damaged, or its rows are not numbered from 0 without gaps.
    """
    database = index_path(path)
    remedy = "run `imnet-prep repair-index` on the folder"
    if not os.path.isfile(database):
        raise RecordsError(
            f"{database}: the index is missing",
            got="no regular file" if os.path.lexists(database) else "",
            remedy=remedy,
        )
    try:
        address = f"{database.resolve().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as connection:
            kinds = connection.execute("SELECT type FROM sqlite_master WHERE name = 'INDEXES'").fetchall()
            if kinds != [("table",)]:  # reading a view might never end
                raise ValueError(f"expected a table INDEXES, got {kinds}")
            columns = [str(entry[1]) for entry in connection.execute("PRAGMA table_info(INDEXES)")]
            label = next((name for name in columns if re.fullmatch(r"label_\d+", name)), None)
            found = connection.execute(f"SELECT {_INDEX_COLUMNS}, {label or NO_LABEL} FROM INDEXES ORDER BY ROW_ID")
            # One number at a time: a list of a million tuples would cost 500 bytes a row.
            table = np.frombuffer(array("q", chain.from_iterable(found)), np.int64).reshape(-1, 8)
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise RecordsError(f"{database}: the index is damaged", got=str(error), remedy=remedy) from error
    limits = np.tile([MAX_PAGES, header.page_size, header.page_size], 2)
    for expected, wrong in (
        ("row numbers from 0 on, without gaps", table[:, 0] != np.arange(len(table))),
        ("pages and bytes in them", ((table[:, 1:7] < 0) | (table[:, 1:7] > limits)).any(axis=1)),
    ):
        if wrong.any():
            raise RecordsError(f"{database}: the index is damaged", expected=expected, got=f"row {wrong.argmax()}")
    raw, blob = (header.header_size + table[:, column] * header.page_size for column in (1, 4))
    labels = table[:, 7].copy() if label else None  # a view would keep the table
    return RowIndex(raw + table[:, 2], raw + table[:, 3], blob + table[:, 5], blob + table[:, 6], labels)


def index_from_data(path: Path, header: Header) -> RowIndex:
    """Find where the rows lie by walking the pages of the data file, without its index.

    Returns:
        The rows that are whole in both the raw and the blob pages.

    Raises:
        RecordsError: The file cannot be read, or a length in a page leads outside it.
    """
    with _reading(path):
        file = PlainFile(path)
        raw, blob = (
            np.array(list(_walk(file, path, header, kind, parts)), dtype=np.int64).reshape(-1, 2)
            for kind, parts in ((RAW, 1), (BLOB, max(1, len(header.blob_fields))))
        )
    rows = min(len(raw), len(blob))
    return RowIndex(raw[:rows, 0], raw[:rows, 1], blob[:rows, 0], blob[:rows, 1])


def _walk(file: PlainFile, path: Path, header: Header, kind: str, parts: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each row up to a cut; a row is ``parts`` length-prefixed parts."""
    size = file.size_bytes
    for page in (page for page in header.pages if page.kind == kind):
        position = header.offset(page.page_id)
        page_end = position + page.used_bytes
        while position < page_end:
            start = position
            for _ in range(parts):
                prefix = file.read(LENGTH.size, position)
                if len(prefix) < LENGTH.size:
                    return
                position += LENGTH.size + LENGTH.unpack(prefix)[0]
                if position > page_end:
                    raise RecordsError(
                        f"{path}: page {page.page_id} is damaged",
                        expected=f"rows that end by {page_end}",
                        got=str(position),
                    )
            if position > size:
                return
            yield start, position


class Shard:
    """A data file, open for reading rows by number. Safe to share between threads: reads are positioned."""

    def __init__(self, path: Path, *, index: RowIndex | None = None) -> None:
        """Open a shard.

        Args:
            path: The data file.
            index: Where its rows lie; by default read from its ``.db``.

        Raises:
            RecordsError: The file or its index is missing or damaged.
        """
        self.path = path
        self.header = read_header(path)
        self.index = read_index(path, self.header) if index is None else index
        with _reading(path):
            self._file = PlainFile(path)

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._file  # closed when no other thread is reading

    def _read(self, row: int, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> bytes:
        if not 0 <= row < len(self.index):
            raise RecordsError(f"{self.path}: row {row} is not there", expected=f"a row below {len(self.index)}")
        start, end = int(starts[row]), int(ends[row])
        size = min(max(0, end - start), self.header.page_size)  # a damaged index must not make us read terabytes
        try:
            data = self._file.read(size, max(0, start))
        except OSError as error:
            raise RecordsError(f"{self.path}: row {row} cannot be read", got=str(error)) from error
        if len(data) != end - start or len(data) < LENGTH.size:
            raise RecordsError(
                f"{self.path}: row {row} is cut off", expected=f"bytes {start} to {end}", got=f"{len(data)} bytes"
            )
        return data

    def fields(self, row: int) -> dict[str, Any]:
        """Read the scalar and string fields of a row.

        Raises:
            RecordsError: The row is cut off or is not a msgpack map.
        """
        data = self._read(row, self.index.raw_start, self.index.raw_end)
        try:
            values = msgpack.unpackb(data[LENGTH.size :], raw=False, strict_map_key=False)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise RecordsError(
                f"{self.path}: row {row} is damaged", got=f"fields that do not decode ({error})"
            ) from error
        if LENGTH.unpack_from(data)[0] != len(data) - LENGTH.size or not isinstance(values, dict):
            raise RecordsError(f"{self.path}: row {row} is damaged", got="fields of another length or kind")
        return values

    def blobs(self, row: int) -> dict[str, bytes]:
        """Read the bytes fields of a row.

        Raises:
            RecordsError: The row is cut off or its lengths do not add up.
        """
        data = self._read(row, self.index.blob_start, self.index.blob_end)
        found: dict[str, bytes] = {}
        position = 0
        for name in self.header.blob_fields:
            length = LENGTH.unpack_from(data, position)[0] if position + LENGTH.size <= len(data) else len(data)
            position += LENGTH.size
            found[name] = data[position : position + length]
            position += length
        if position != len(data):
            raise RecordsError(f"{self.path}: row {row} is damaged", expected=f"{len(data)} bytes", got=str(position))
        return found

    def image(self, row: int) -> bytes:
        """Read the image of a row (see :attr:`Header.image_field`); raises as :meth:`blobs`."""
        return self.blobs(row)[self.header.image_field]

    def image_place(self, row: int) -> tuple[int, int]:
        """Return the first byte and the size in bytes of a row's image in the data file; raises as :meth:`blobs`."""
        start = int(self.index.blob_start[row]) + LENGTH.size
        if len(self.header.blob_fields) == 1:
            return start, int(self.index.blob_end[row]) - start
        blobs, image = self.blobs(row), self.header.image_field
        before = self.header.blob_fields[: self.header.blob_fields.index(image)]
        return start + sum(LENGTH.size + len(blobs[name]) for name in before), len(blobs[image])


def open_shard(path: Path) -> Shard:
    """Open a data file by its index, or by walking its pages if the index cannot be read.

    Raises:
        RecordsError: Neither works.
    """
    try:
        return Shard(path)
    except RecordsError:
        return Shard(path, index=index_from_data(path, read_header(path)))
