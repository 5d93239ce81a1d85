"""Compare the files of a records folder with its manifest and each other, without reading the records."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError
from imnet_prep.files import PlainFile
from imnet_prep.records.manifest import Manifest, SplitInfo
from imnet_prep.records.mindrecord import (
    NO_LABEL,
    Header,
    RowIndex,
    index_from_data,
    index_path,
    read_header,
    read_index,
)
from imnet_prep.types import ShardInfo


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault in a records folder, or a warning.

    Attributes:
        kind: The kind of problem. Of files: ``manifest``, ``missing``, ``unexpected``, ``size``, ``header``, ``index``,
            ``rows``, ``digest``, ``records`` (the record list), ``rejected`` (the list of rejected images), ``counts``.
            Of rows: ``record`` (cannot be read), ``image`` (does not decode, or has another size), ``digest`` (decodes,
            but is not what was stored), ``label``, ``name``. As warnings: ``duplicate``, ``near_duplicate``.
        file: Path relative to the records folder.
        detail: One line for a person.
        row: The row in the shard, if the problem is about one row. name: Its file_name.
    """

    kind: str
    file: str
    detail: str
    row: int | None = None
    name: str | None = None

    def to_line(self, before: str = "") -> str:
        """Return the problem as one line: file, row, name, kind, detail."""
        where = self.file + ("" if self.row is None else f" row {self.row}") + (f" ({self.name})" if self.name else "")
        return f"{where}: {before}{self.kind}: {self.detail}"


def listed_files(manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    """Yield name, size and digest of every shard, index and record list."""
    for split in manifest.splits.values():
        yield str(split.records["file"]), split.records["size_bytes"], split.records["sha256"]
        for shard in split.shards:
            yield shard.file, shard.size_bytes, shard.sha256
            yield _index_of(shard), shard.index_size_bytes, shard.index_sha256


def _index_of(shard: ShardInfo) -> str:
    return index_path(Path(shard.file)).as_posix()


def check_unlisted(records: Path, manifest: Manifest) -> Iterator[Problem]:
    """Find files that the manifest does not list: a program that opens every file in the folder would read them."""
    known = {name for name, _, _ in listed_files(manifest)}
    for path in sorted([*records.glob("*/*"), *records.glob("*.mindrecord*")]):
        name = path.relative_to(records).as_posix()
        if name not in known and os.path.isfile(path) and not _has_no_rows(path):
            yield Problem("unexpected", name, "is not in the manifest")


def _has_no_rows(path: Path) -> bool:
    """Return whether a file is a data file without rows, or its index; ImageNetToMR leaves such files."""
    try:
        return not read_header(path.with_suffix("") if path.suffix == ".db" else path).pages
    except RecordsError:
        return False


def check_size(records: Path, name: str, size: int) -> Problem | None:
    """Return the problem with a file that is missing, cannot be read or has another size; else None."""
    try:
        got = PlainFile(records / name).size_bytes
    except FileNotFoundError:
        return Problem("missing", name, "is not there")
    except OSError as error:
        return Problem("missing", name, f"cannot be read: {error.strerror}")
    return None if got == size else Problem("size", name, f"has {got} bytes, expected {size}")


def check_shard(records: Path, manifest: Manifest, split: SplitInfo, shard: ShardInfo) -> list[Problem]:
    """Compare sizes, header and index of a shard with the manifest and each other, without reading its rows.

    Sizes are compared first: a file of another size is not opened.
    """
    path, index = records / shard.file, _index_of(shard)
    wrong = [
        problem
        for name, size in ((shard.file, shard.size_bytes), (index, shard.index_size_bytes))
        if (problem := check_size(records, name, size))
    ]
    damaged = {problem.file for problem in wrong}
    kind, file = "header", shard.file
    try:
        if file not in damaged:
            header = read_header(path)
            wrong += _check_header(manifest, split, shard, header)
            kind, file = "index", index
            if file not in damaged:
                wrong += _check_index(shard, index, header, read_index(path, header))
    except RecordsError as error:
        wrong.append(Problem(kind, file, str(error)))
    return wrong


def _check_header(manifest: Manifest, split: SplitInfo, shard: ShardInfo, header: Header) -> Iterator[Problem]:
    for what, expected, got in (
        ("rows", shard.rows, header.rows),
        ("header_size", split.header_size, header.header_size),
        ("page_size", split.page_size, header.page_size),
        ("columns", manifest.columns, header.fields),
        ("bytes columns", {n for n, kind in manifest.columns.items() if kind == "bytes"}, set(header.blob_fields)),
        ("indexed columns", True, set(header.index_fields) <= set(manifest.columns)),
        ("file name", True, Path(shard.file).name in header.addresses),
    ):
        if expected != got:
            yield Problem("header", shard.file, f"{what}: expected {expected}, got {got}")
    end = max((header.offset(page.page_id) + page.used_bytes for page in header.pages), default=0)
    if end != shard.size_bytes:
        yield Problem("header", shard.file, f"pages end at byte {end}, the file at {shard.size_bytes}")


def _check_index(shard: ShardInfo, index: str, header: Header, rows: RowIndex) -> Iterator[Problem]:
    if len(rows) != shard.rows:
        yield Problem("rows", index, f"expected {shard.rows} rows, got {len(rows)}")
        return
    for starts, ends in ((rows.raw_start, rows.raw_end), (rows.blob_start, rows.blob_end)):
        pages = (starts - header.header_size) // header.page_size
        first = np.flatnonzero(np.diff(pages, prepend=-1))
        follows = starts == np.concatenate([[0], ends[:-1]])
        follows[first] = (starts[first] - header.header_size) % header.page_size == 0
        wrong = np.flatnonzero(~follows | (ends <= starts) | (ends > shard.size_bytes))
        if len(wrong):
            yield Problem("index", index, "does not lie where the row before it ends", int(wrong[0]))


def check_rows_of_index(records: Path, shard: ShardInfo, labels: NDArray[np.int32]) -> Iterator[Problem]:
    """Compare a shard's index with the pages of its data file and with the labels of its rows.

    Args:
        records: The folder.
        shard: The shard. A damaged header or index is left to :func:`check_shard`.
        labels: int32 (rows,), as stored; :data:`NO_LABEL` where there is none.
    """
    path, index = records / shard.file, _index_of(shard)
    try:
        header = read_header(path)
        listed = read_index(path, header)
    except RecordsError:
        return
    try:
        walked = index_from_data(path, header)
    except RecordsError as error:
        yield Problem("record", shard.file, str(error))
    else:
        if len(differ := listed.differences(walked)):
            yield Problem("index", index, "does not agree with the data file", int(differ[0]))
        elif len(listed) != len(walked):
            yield Problem("index", index, f"has {len(listed)} rows, the pages of the data file {len(walked)}")
    if listed.label is None:
        return
    got, stored = listed.label[: len(labels)], labels[: len(listed)]
    wrong = np.flatnonzero((got != stored) & (stored != NO_LABEL))
    if len(wrong):
        row = int(wrong[0])
        more = f", and {len(wrong) - 1} more such rows" if len(wrong) > 1 else ""
        yield Problem("index", index, f"the index says label {got[row]}, the row {stored[row]}{more}", row)
