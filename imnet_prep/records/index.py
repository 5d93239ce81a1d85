"""The index of a data file, made again from the data file, whoever wrote it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imnet_prep.errors import RecordsError
from imnet_prep.records.manifest import COLUMNS
from imnet_prep.records.mindrecord import Header, RowIndex, Shard, index_from_data, read_header
from imnet_prep.records.shards import write_index

_SQL_TYPES = {"string": "TEXT", "float32": "NUMERIC", "float64": "NUMERIC"}  # FileWriter's; all else is INTEGER
_FIELD = re.compile(r"[0-9a-zA-Z_]+")  # what MindSpore allows, so that a damaged header cannot say other things


def write_index_of(path: Path, to: Path) -> None:
    """Write the index of a data file beside another place of it.

    For our own files it is, byte for byte, the one that was written with them; for other writers' it has their
    columns and rows.

    Args:
        path: The data file.
        to: A path with the same base name, which is in the index; nothing need be there.

    Raises:
        RecordsError: The data file does not give its rows.
        OSError: The disk is full or fails.
    """
    header = read_header(path)
    names = [name for name in header.index_fields if name in header.fields and _FIELD.fullmatch(name)]
    rows = _rows(path, header, index_from_data(path, header), names)
    ours = header.fields == COLUMNS and header.index_fields == ("label",)
    columns = [f"{name}_0 {_SQL_TYPES.get(header.fields[name], 'INTEGER')}" for name in names]
    write_index(to, rows, None if ours else columns)


def _rows(path: Path, header: Header, index: RowIndex, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield what the index says of each row, as :func:`write_index` takes it."""
    groups = {page.page_id: sorted((start, number) for number, start in page.groups) for page in header.pages}
    shard = Shard(path, index=index)
    for row in range(len(index)):
        raw, raw_start = divmod(int(index.raw_start[row]) - header.header_size, header.page_size)
        raw_end = int(index.raw_end[row]) - header.offset(raw)
        blob, blob_start = divmod(int(index.blob_start[row]) - header.header_size, header.page_size)
        blob_end = int(index.blob_end[row]) - header.offset(blob)
        place = bisect_right(groups[raw], (raw_start, 1 << 62)) - 1
        group = groups[raw][place][1] if place >= 0 else 0
        fields = shard.fields(row)
        values = [fields.get(name) for name in names]
        if not all(
            isinstance(value, float | str | None) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 63)
            for value in values
        ):
            raise RecordsError(f"{path}: row {row} is damaged", got=f"{', '.join(names)}: {values}"[:200])
        yield (row, raw, raw_start, raw_end, group, blob, blob_start, blob_end, *values)
