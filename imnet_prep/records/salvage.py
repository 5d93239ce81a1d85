"""Recover damaged data files: write an index again, find whole images, and copy the whole rows before a cut."""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError
from imnet_prep.files import READ_BYTES, PlainFile, sync
from imnet_prep.records.manifest import COLUMNS, SplitInfo
from imnet_prep.records.mindrecord import BLOB, LENGTH, RAW, Header, RowIndex, Shard, index_from_data, read_header
from imnet_prep.records.record_list import RecordLine
from imnet_prep.records.shards import Layout, ShardWriter, write_index
from imnet_prep.types import ShardInfo

Places = dict[int, tuple[int, int]]  # by row: the first byte of its image in the data file, and the size in bytes
_SQL_TYPES = {"string": "TEXT", "float32": "NUMERIC", "float64": "NUMERIC"}  # FileWriter's; all others are INTEGER
_FIELD = re.compile(r"[0-9a-zA-Z_]+")  # what MindSpore allows; it keeps a damaged header from injecting SQL


def write_index_of(path: Path, to: Path) -> None:
    """Write the index of a data file from the data file.

    For our own files the result is, byte for byte, the index that was written with them; for files of other writers
    it has the same columns and rows.

    Args:
        path: The data file.
        to: A path with the same base name, beside which the index is written; no file need be there.

    Raises:
        RecordsError: A row of the data file cannot be read.
        OSError: The disk is full or fails.
    """
    header = read_header(path)
    names = [name for name in header.index_fields if name in header.fields and _FIELD.fullmatch(name)]
    rows = _index_rows(path, header, index_from_data(path, header), names)
    ours = header.fields == COLUMNS and header.index_fields == ("label",)
    columns = [f"{name}_0 {_SQL_TYPES.get(header.fields[name], 'INTEGER')}" for name in names]
    write_index(to, rows, None if ours else columns)


def _index_rows(path: Path, header: Header, index: RowIndex, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the index entry of each row, as :func:`write_index` takes it."""
    groups = {page.page_id: sorted((start, number) for number, start in page.groups) for page in header.pages}
    shard = Shard(path, index=index)
    for row in range(len(index)):
        raw, raw_start = divmod(int(index.raw_start[row]) - header.header_size, header.page_size)
        blob, blob_start = divmod(int(index.blob_start[row]) - header.header_size, header.page_size)
        place = bisect_right(groups[raw], (raw_start, 1 << 62)) - 1
        group = groups[raw][place][1] if place >= 0 else 0
        fields = shard.fields(row)
        values = [fields.get(name) for name in names]
        if not all(
            isinstance(value, float | str | None) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 63)
            for value in values
        ):
            raise RecordsError(f"{path}: row {row} is damaged", got=f"{', '.join(names)}: {values}"[:200])
        raw_end, blob_end = int(index.raw_end[row]) - header.offset(raw), int(index.blob_end[row]) - header.offset(blob)
        yield (row, raw, raw_start, raw_end, group, blob, blob_start, blob_end, *values)


def open_in_place(path: Path, split: SplitInfo, info: ShardInfo, *, indexed: bool) -> Shard | None:
    """Open a data file whose rows all lie where the manifest implies, whatever bytes they hold.

    Args:
        path: The data file.
        split: Its split. info: Its entry in the manifest.
        indexed: Whether its index is the manifest's; otherwise the rows are found by walking the pages.

    Returns:
        The shard, or None if the file is cut off, or its header or a length in its pages is damaged.
    """
    try:
        header = read_header(path)
        shard = Shard(path, index=None if indexed else index_from_data(path, header))
    except RecordsError:
        return None
    got = (header.rows, len(shard), header.header_size, header.page_size, path.stat().st_size)
    return shard if got == (info.rows, info.rows, split.header_size, split.page_size, info.size_bytes) else None


def find_images(path: Path, split: SplitInfo, lines: Sequence[RecordLine], shard: Shard | None) -> Places:
    """Find whole images by their digests, even if the header is damaged.

    Pages begin at known places and hold one length and image after the other. So if the file cannot be opened as a
    shard, a damaged length loses at most the rest of its page.

    Args:
        path: The data file.
        split: Its split.
        lines: Its lines of the record list.
        shard: The opened data file, whose rows are tried first; None if it cannot be opened.

    Raises:
        OSError: The file cannot be read.
    """
    waiting: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        waiting.setdefault(line.sha256, []).append(row)
    found: Places = {}
    file = PlainFile(path)
    for start, length in chain(_stored_places(shard) if shard else (), _page_places(file, split)):
        if not waiting:
            break
        for row in waiting.pop(hashlib.sha256(file.read(length, start)).hexdigest(), ()):
            found[row] = (start, length)
    return found


def _stored_places(shard: Shard) -> Iterator[tuple[int, int]]:
    for row in range(len(shard)):
        with suppress(RecordsError):
            yield shard.image_place(row)


def _page_places(file: PlainFile, split: SplitInfo) -> Iterator[tuple[int, int]]:
    """Yield the place and size of each length-prefixed part of a page."""
    size = file.size_bytes
    for page in range(split.header_size, size, split.page_size):
        start, end = page, min(page + split.page_size, size)
        while start + LENGTH.size < end:
            length = LENGTH.unpack(file.read(LENGTH.size, start))[0]
            start += LENGTH.size
            if not 0 < length <= end - start:
                break
            yield start, length
            start += length


def rewrite_shard(path: Path, to: Path, split: SplitInfo, lines: Sequence[RecordLine], places: Places) -> None:
    """Write one of our shards, data file and index, from the images of a damaged one and its lines of the record list.

    Raises:
        OSError: The disk is full or fails.
    """
    file = PlainFile(path)
    with closing(ShardWriter(to, Layout(split.header_size, split.page_size))) as writer:
        for row, (start, size) in sorted(places.items()):
            writer.add(file.read(size, start), lines[row].label, lines[row].file_name)
        writer.finish()
    sync(to)


def salvage_rows(path: Path, to: Path) -> int:
    """Copy a data file up to its last whole row, with a header that lists only the rows that are kept.

    Args:
        path: The data file, cut off anywhere behind its header.
        to: The file to write; it must have the same base name, which the header stores.

    Returns:
        The number of rows.

    Raises:
        RecordsError: The header is damaged, or no row is whole.
        OSError: The disk is full or fails.
    """
    header = read_header(path)
    index = index_from_data(path, header)
    if not len(index):
        raise RecordsError(f"{path}: no row in it is whole")
    source = PlainFile(path)
    document = json.loads(source.read(header.length, LENGTH.size))
    pages = sorted(document["page"], key=lambda page: int(page["page_id"]))
    for page in pages:
        _cut_page(page, header, index)
    while pages and not pages[-1]["page_size"]:
        pages.pop()
    text = json.dumps({**document, "page": pages}, separators=(",", ":"), ensure_ascii=False).encode()
    end = header.offset(len(pages) - 1) + int(pages[-1]["page_size"])
    with to.open("xb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        for start in range(header.header_size, end, READ_BYTES):
            file.seek(start)
            file.write(source.read(min(READ_BYTES, end - start), start))
        file.truncate(end)
    sync(to)
    return len(index)


def _cut_page(page: dict[str, Any], header: Header, index: RowIndex) -> None:
    """Make a page of the header end with the last of its rows that is kept."""
    start, kind = header.offset(int(page["page_id"])), page["page_type"]
    starts, ends = {RAW: (index.raw_start, index.raw_end), BLOB: (index.blob_start, index.blob_end)}[kind]
    kept: NDArray[np.int64] = np.flatnonzero((starts >= start) & (starts < start + header.page_size))
    used = int(ends[kept[-1]]) - start if len(kept) else 0
    page["page_size"] = used
    page["row_group_ids"] = [group for group in page["row_group_ids"] if int(group["offset"]) < max(1, used)]
    if kind == BLOB:
        page["end_row_id"] = int(kept[-1]) + 1 if len(kept) else int(page["start_row_id"])
