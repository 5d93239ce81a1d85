"""What is left of a damaged data file: the images that are whole, or the whole rows before a cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError
from imnet_prep.files import PlainFile, sync
from imnet_prep.records.manifest import SplitInfo
from imnet_prep.records.mindrecord import BLOB, LENGTH, RAW, Header, RowIndex, Shard, index_from_data, read_header
from imnet_prep.records.record_list import RecordLine
from imnet_prep.records.shards import Layout, ShardWriter
from imnet_prep.types import ShardInfo

COPY_BYTES = 1 << 20
Places = dict[int, tuple[int, int]]  # by row, its image's first byte in the data file and its size in bytes


def open_ordered(path: Path, split: SplitInfo, info: ShardInfo, *, indexed: bool) -> Shard | None:
    """Open a data file in which every row lies where the manifest lets expect it, whatever its bytes are.

    Args:
        path: The data file.
        split: Its split. info: Its entry in the manifest.
        indexed: Its index is the manifest's; else the rows are found by the pages.

    Returns:
        The shard, or None where it was cut, or its header or the lengths in its pages are damaged.
    """
    try:
        header = read_header(path)
        shard = Shard(path, index=None if indexed else index_from_data(path, header))
    except RecordsError:
        return None
    got = (header.rows, len(shard), header.header_size, header.page_size, path.stat().st_size)
    return shard if got == (info.rows, info.rows, split.header_size, split.page_size, info.size_bytes) else None


def find_images(path: Path, split: SplitInfo, lines: Sequence[RecordLine], shard: Shard | None) -> Places:
    """Find whole images by their digests, whatever the header says.

    Pages begin at known places and hold one length and image after the other, so without the shard a damaged length
    costs at most the rest of its page.

    Args:
        path: The data file.
        split: Its split.
        lines: Its lines of the record list.
        shard: Says where to look first; None where it does not open.

    Raises:
        OSError: It cannot be read.
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
    """Yield place and size of each part of a page that is preceded by its length."""
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


def write_again(path: Path, to: Path, split: SplitInfo, lines: Sequence[RecordLine], places: Places) -> None:
    """Write a shard of ours, data file and index, from images in a damaged one and their lines of the record list.

    Raises:
        OSError: The disk is full or fails.
    """
    file, writer = PlainFile(path), ShardWriter(to, Layout(split.header_size, split.page_size))
    try:
        for row, (start, size) in sorted(places.items()):
            writer.add(file.read(size, start), lines[row].label, lines[row].file_name)
        writer.finish()
    finally:
        writer.close()
    sync(to)


def clip_to_whole_rows(path: Path, to: Path) -> int:
    """Copy a data file up to its last whole row; its header then lists what is there.

    Args:
        path: The data file, cut anywhere behind its header.
        to: The file to write; it must have the same base name, which is in the header.

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
        _clip_page(page, header, index)
    while pages and not pages[-1]["page_size"]:
        pages.pop()
    text = json.dumps({**document, "page": pages}, separators=(",", ":"), ensure_ascii=False).encode()
    end = header.offset(len(pages) - 1) + int(pages[-1]["page_size"])
    with to.open("xb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        for start in range(header.header_size, end, COPY_BYTES):
            file.seek(start)
            file.write(source.read(min(COPY_BYTES, end - start), start))
        file.truncate(end)
    sync(to)
    return len(index)


def _clip_page(page: dict[str, Any], header: Header, index: RowIndex) -> None:
    """Let a page of the header end with the last row that is kept of it."""
    start = header.offset(int(page["page_id"]))
    ends = {RAW: index.raw_end, BLOB: index.blob_end}[page["page_type"]]
    starts = {RAW: index.raw_start, BLOB: index.blob_start}[page["page_type"]]
    mine: NDArray[np.int64] = np.flatnonzero((starts >= start) & (starts < start + header.page_size))
    used = int(ends[mine[-1]]) - start if len(mine) else 0
    page["page_size"] = used
    page["row_group_ids"] = [group for group in page["row_group_ids"] if int(group["offset"]) < max(1, used)]
    if page["page_type"] == BLOB:
        page["end_row_id"] = int(mine[-1]) + 1 if len(mine) else int(page["start_row_id"])
