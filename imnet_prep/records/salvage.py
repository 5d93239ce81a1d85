"""The whole rows at the beginning of a data file that was cut, whoever wrote it, as a data file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError
from imnet_prep.files import sync
from imnet_prep.records.mindrecord import BLOB, LENGTH, RAW, Header, RowIndex, index_from_data, read_header

COPY_BYTES = 1 << 20


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
    with path.open("rb") as file:
        document = json.loads(file.read(LENGTH.size + header.length)[LENGTH.size :])
    pages = sorted(document["page"], key=lambda page: int(page["page_id"]))
    for page in pages:
        _clip_page(page, header, index)
    while pages and not pages[-1]["page_size"]:
        pages.pop()
    text = json.dumps({**document, "page": pages}, separators=(",", ":"), ensure_ascii=False).encode()
    end = header.offset(len(pages) - 1) + int(pages[-1]["page_size"])
    with path.open("rb") as source, to.open("xb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        file.truncate(header.header_size)
        source.seek(header.header_size)
        file.seek(header.header_size)
        left = end - header.header_size
        while left and (data := source.read(min(left, COPY_BYTES))):
            file.write(data)
            left -= len(data)
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
