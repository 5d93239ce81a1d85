"""A reader of MindRecord files in plain Python: header, index and rows, with no MindSpore.

Source: the format as MindSpore 2.10 writes it. A data file is an 8-byte little-endian length, a JSON header of that
length, zeros up to ``header_size``, then pages of ``page_size``. For each row, a raw page holds an 8-byte length and a
msgpack map of the scalar and string fields; a blob page holds, for each bytes field, an 8-byte length and the bytes.
The index ``<file>.db`` is SQLite: table INDEXES has a line a row with its place in both pages, and the indexed fields.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import msgpack
import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 128 << 20  # MindSpore's own limits for a header and a page
MAX_PAGE_BYTES = 256 << 20
MAX_PAGES = 1 << 22
RAW, BLOB = "RAW_DATA", "BLOB_DATA"
_INDEX_COLUMNS = (
    "ROW_ID, PAGE_ID_RAW, PAGE_OFFSET_RAW, PAGE_OFFSET_RAW_END, PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END"
)


@dataclass(frozen=True, slots=True)
class Page:
    """A page as the header lists it.

    Attributes:
        page_id: Its number, from 0. kind: ``RAW_DATA`` or ``BLOB_DATA``.
        used_bytes: How many of its bytes hold rows.
        start_row: First row of a blob page. end_row: The row after its last.
        groups: Of a raw page, (row group, byte where its rows begin).
    """

    page_id: int
    kind: str
    used_bytes: int
    start_row: int
    end_row: int
    groups: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Header:
    """What the data file says of itself.

    Attributes:
        length: Bytes of JSON, without the 8-byte length before it.
        header_size: Bytes reserved for the header; the first page begins here.
        page_size: Bytes of a page.
        fields: Type by field name.
        blob_fields: The fields that lie in blob pages, in order.
        index_fields: The fields that the index carries.
        addresses: File names that the header lists.
        pages: In the order of their ids.
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
    def rows(self) -> int:
        """Number of rows, from the blob pages (0 where there is no blob field)."""
        return max((page.end_row for page in self.pages if page.kind == BLOB), default=0)

    def offset(self, page_id: int) -> int:
        """First byte of a page in the data file."""
        return self.header_size + page_id * self.page_size


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Where each row lies: absolute byte offsets in the data file, int64 (rows,), ends exclusive."""

    raw_start: NDArray[np.int64]
    raw_end: NDArray[np.int64]
    blob_start: NDArray[np.int64]
    blob_end: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.raw_start)


def read_header(path: Path) -> Header:
    """Read and check the header of a data file.

    Raises:
        RecordsError: The file is missing, too short, or its header is not one.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(LENGTH.size)
            length = LENGTH.unpack(prefix)[0] if len(prefix) == LENGTH.size else 0
            text = file.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise RecordsError(
            f"{path}: cannot be read", got=str(error), remedy="restore the file or convert again"
        ) from error
    if not text or len(text) != length:
        raise _not_mindrecord(path, f"a header length of {length} bytes in a file of {path.stat().st_size}")
    try:
        return _parse_header(json.loads(text), length)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise _not_mindrecord(path, f"{type(error).__name__}: {error}") from error


def _not_mindrecord(path: Path, got: str) -> RecordsError:
    return RecordsError(f"{path}: the MindRecord header is damaged", expected="a MindRecord data file", got=got)


def _parse_header(data: dict[str, Any], length: int) -> Header:
    schema = data["schema"][0]
    fields = {name: str(spec["type"]) for name, spec in schema["schema"].items()}
    header = Header(
        length=length,
        header_size=int(data["header_size"]),
        page_size=int(data["page_size"]),
        fields=fields,
        blob_fields=tuple(schema.get("blob_fields") or ()),
        index_fields=tuple(entry["index_field"] for entry in data.get("index_fields") or ()),
        addresses=tuple(data["shard_addresses"]),
        pages=tuple(
            Page(
                int(page["page_id"]),
                str(page["page_type"]),
                int(page["page_size"]),
                int(page["start_row_id"]),
                int(page["end_row_id"]),
                tuple((int(group["id"]), int(group["offset"])) for group in page.get("row_group_ids") or ()),
            )
            # A file that got no rows (ImageNetToMR leaves some where there are few images) has null here.
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
    """The index that belongs to a data file."""
    return path.with_name(path.name + ".db")


def connect_index(path: Path) -> sqlite3.Connection:
    """Open the index of a data file, read-only and without leaving a file beside it.

    Raises:
        RecordsError: There is no index.
    """
    database = index_path(path)
    if not database.is_file():
        raise RecordsError(f"{database}: the index is missing", remedy="run `imnet-prep repair-index` on the folder")
    return sqlite3.connect(f"file:{quote(str(database.resolve()))}?mode=ro&immutable=1", uri=True)


def read_index(path: Path, header: Header) -> RowIndex:
    """Read where the rows of a data file lie, from its ``.db``.

    Raises:
        RecordsError: The index is missing or damaged, or does not count its rows from 0 on.
    """
    try:
        connection = connect_index(path)
        try:
            found = connection.execute(f"SELECT {_INDEX_COLUMNS} FROM INDEXES ORDER BY ROW_ID")
            # One number at a time: a list of a million tuples would cost 500 bytes a row.
            table = np.fromiter((value for row in found for value in row), dtype=np.int64).reshape(-1, 7)
        finally:
            connection.close()
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise RecordsError(
            f"{index_path(path)}: the index is damaged", got=str(error), remedy="run `imnet-prep repair-index`"
        ) from error
    if not np.array_equal(table[:, 0], np.arange(len(table))):
        raise RecordsError(f"{index_path(path)}: the index is damaged", expected="row numbers from 0 on, without gaps")
    places = table[:, 1:]
    wrong = (places < 0) | (places > np.tile([MAX_PAGES, header.page_size, header.page_size], 2))
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        raise RecordsError(
            f"{index_path(path)}: the index is damaged", expected="pages and bytes in them", got=f"row {row}"
        )
    raw, blob = (header.header_size + table[:, column] * header.page_size for column in (1, 4))
    return RowIndex(raw + table[:, 2], raw + table[:, 3], blob + table[:, 5], blob + table[:, 6])


def read_index_field(path: Path, header: Header, field: str) -> list[Any] | None:
    """Read an indexed field of every row, in row order.

    Returns:
        The values, or None where the index does not carry the field.

    Raises:
        RecordsError: The index is missing or damaged.
    """
    if field not in header.index_fields:
        return None
    try:
        connection = connect_index(path)
        try:
            columns = [str(entry[1]) for entry in connection.execute("PRAGMA table_info(INDEXES)")]
            name = next((name for name in columns if re.fullmatch(rf"{re.escape(field)}_\d+", name)), None)
            if name is None:
                return None
            return [row[0] for row in connection.execute(f'SELECT "{name}" FROM INDEXES ORDER BY ROW_ID')]
        finally:
            connection.close()
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise RecordsError(
            f"{index_path(path)}: the index is damaged", got=str(error), remedy="run `imnet-prep repair-index`"
        ) from error


def index_from_data(path: Path, header: Header) -> RowIndex:
    """Find where the rows lie by walking the pages of the data file, without its index.

    Returns:
        As many rows as are whole in both the raw and the blob pages.

    Raises:
        RecordsError: A length in a page leads outside it.
    """
    with path.open("rb") as file:
        raw = _walk(file.fileno(), path, header, RAW, 1)
        blob = _walk(file.fileno(), path, header, BLOB, max(1, len(header.blob_fields)))
    rows = min(len(raw), len(blob))
    return RowIndex(raw[:rows, 0], raw[:rows, 1], blob[:rows, 0], blob[:rows, 1])


def _walk(descriptor: int, path: Path, header: Header, kind: str, parts: int) -> NDArray[np.int64]:
    """(rows, 2) starts and ends; ``parts`` length-prefixed parts make a row."""
    size = os.fstat(descriptor).st_size
    found: list[tuple[int, int]] = []
    for page in header.pages:
        if page.kind != kind:
            continue
        position = header.offset(page.page_id)
        page_end = position + page.used_bytes
        while position < page_end:
            start = position
            for _ in range(parts):
                prefix = os.pread(descriptor, LENGTH.size, position)
                if len(prefix) < LENGTH.size:
                    return np.array(found, dtype=np.int64).reshape(-1, 2)
                position += LENGTH.size + LENGTH.unpack(prefix)[0]
                if position > page_end:
                    raise RecordsError(
                        f"{path}: page {page.page_id} is damaged",
                        expected=f"rows that end by {page_end}",
                        got=str(position),
                    )
            if position > size:
                return np.array(found, dtype=np.int64).reshape(-1, 2)
            found.append((start, position))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


class Shard:
    """One data file, open for reading rows by number. Safe to share between threads (reads are positioned)."""

    def __init__(self, path: Path, *, index: RowIndex | None = None) -> None:
        """Open a shard.

        Args:
            path: The data file.
            index: Where its rows lie; read from its ``.db`` where None.

        Raises:
            RecordsError: The file or its index is missing or damaged.
        """
        self.path = path
        self.header = read_header(path)
        self.index = read_index(path, self.header) if index is None else index
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the data file; closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()

    def _read(self, row: int, start: int, end: int) -> bytes:
        size = min(max(0, end - start), self.header.page_size)  # a damaged index must not ask for terabytes
        try:
            data = os.pread(self._descriptor, size, max(0, start))
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
        data = self._read(row, int(self.index.raw_start[row]), int(self.index.raw_end[row]))
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
        data = self._read(row, int(self.index.blob_start[row]), int(self.index.blob_end[row]))
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

    def image(self, row: int, field: str = "image") -> bytes:
        """Read one bytes field of a row; see :meth:`blobs`."""
        return self.blobs(row)[field]
