"""The index of a data file, made again from the data file, whoever wrote it."""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imnet_prep.errors import RecordsError
from imnet_prep.files import sqlite_failure, sync
from imnet_prep.records.manifest import COLUMNS
from imnet_prep.records.mindrecord import Header, RowIndex, Shard, index_from_data, index_path, read_header
from imnet_prep.records.shards import write_index

_SQL_TYPES = {"string": "TEXT", "float32": "NUMERIC", "float64": "NUMERIC"}  # FileWriter's; all else is INTEGER
_FIELD = re.compile(r"[0-9a-zA-Z_]+")  # what MindSpore allows, so that a damaged header cannot say other things


def write_index_of(path: Path, folder: Path) -> Path:
    """Write the index of a data file into another folder, under its final name.

    For our own files it is, byte for byte, the one that was written with them; for other writers' it has their
    columns and rows.

    Args:
        path: The data file.
        folder: Where the index goes.

    Returns:
        The index.

    Raises:
        RecordsError: The data file does not give its rows.
        OSError: The disk is full or fails.
    """
    header = read_header(path)
    index = index_from_data(path, header)
    if header.fields == COLUMNS and header.index_fields == ("label",):
        rows = ((*place, _label(path, row, fields)) for row, (place, fields) in enumerate(_rows(path, header, index)))
        write_index(folder / path.name, rows)
    else:
        _write_foreign(folder / path.name, header, _rows(path, header, index))
    return index_path(folder / path.name)


def rebuild_index(path: Path) -> None:
    """Put an index made from the data file in its place.

    Raises:
        RecordsError: The data file does not give its rows.
        OSError: The disk is full or fails.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".index-") as folder:
        os.replace(write_index_of(path, Path(folder)), index_path(path))
        sync(path.parent)


def _rows(path: Path, header: Header, index: RowIndex) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Give each row's place (row, raw page, start, end, group, blob page, start, end) and its fields."""
    groups = {page.page_id: sorted((start, number) for number, start in page.groups) for page in header.pages}
    with Shard(path, index=index) as shard:
        for row in range(len(index)):
            raw, raw_start = divmod(int(index.raw_start[row]) - header.header_size, header.page_size)
            raw_end = int(index.raw_end[row]) - header.offset(raw)
            blob, blob_start = divmod(int(index.blob_start[row]) - header.header_size, header.page_size)
            blob_end = int(index.blob_end[row]) - header.offset(blob)
            place = bisect_right(groups[raw], (raw_start, 1 << 62)) - 1
            group = groups[raw][place][1] if place >= 0 else 0
            yield (row, raw, raw_start, raw_end, group, blob, blob_start, blob_end), shard.fields(row)


def _label(path: Path, row: int, fields: dict[str, Any]) -> int:
    label = fields.get("label")
    if not isinstance(label, int) or not -(1 << 31) <= label < 1 << 31:
        raise RecordsError(f"{path}: row {row} is damaged", got=f"label {label!r}")
    return label


def _write_foreign(path: Path, header: Header, rows: Iterator[tuple[tuple[int, ...], dict[str, Any]]]) -> None:
    """Write an index as FileWriter does: for each indexed field a pair of columns, INC_<n> and <field>_0."""
    fields = [name for name in header.index_fields if name in header.fields and _FIELD.fullmatch(name)]
    columns = ", ".join(
        f"INC_{number} INT, {name}_0 {_SQL_TYPES.get(header.fields[name], 'INTEGER')}"
        for number, name in enumerate(fields)
    )
    keys = ", ".join(["ROW_ID", *(f"INC_{number}" for number in range(len(fields)))])
    database = index_path(path)
    connection = sqlite3.connect(database, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("BEGIN")
        places = ", ".join(
            f"{name} INT NOT NULL"
            for name in (
                "ROW_ID", "PAGE_ID_RAW", "PAGE_OFFSET_RAW", "PAGE_OFFSET_RAW_END", "ROW_GROUP_ID",
                "PAGE_ID_BLOB", "PAGE_OFFSET_BLOB", "PAGE_OFFSET_BLOB_END",
            )
        )  # fmt: skip
        connection.execute(f"CREATE TABLE INDEXES({places}{', ' if columns else ''}{columns}, PRIMARY KEY({keys}))")
        marks = ",".join("?" * (8 + 2 * len(fields)))
        values = ((*place, *(part for name in fields for part in (0, row.get(name)))) for place, row in rows)
        connection.executemany(f"INSERT INTO INDEXES VALUES({marks})", values)
        connection.execute("CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)")
        connection.execute("INSERT INTO SHARD_NAME VALUES(?)", (path.name,))
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise sqlite_failure(error, database) from error
    finally:
        connection.close()
    database.chmod(0o644)
    sync(database)
