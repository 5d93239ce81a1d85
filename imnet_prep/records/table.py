"""Load a split's records as flat arrays, 52 bytes per record: place, label, size, id and digest."""

import binascii
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import PipelineError, RecordsError
from imnet_prep.files import READ_BYTES, PlainFile, max_open_files
from imnet_prep.records.check import check_size
from imnet_prep.records.manifest import Manifest
from imnet_prep.records.mindrecord import LENGTH, Shard, index_path, read_header, read_index
from imnet_prep.records.record_list import RECORDS, opened_list
from imnet_prep.types import ShardInfo

# A line of records.jsonl.gz as the writer forms it (sorted keys, no blanks, nothing nested in meta); any other form is
# parsed as JSON.
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_LINE = re.compile(
    rb'^\{(?:"changes":\[[^\]]*\],)?"file_name":"([^"\\]*)","height":(\d{1,9}),"label":(-?\d{1,9}),'
    rb'(?:"meta":\{(?:' + _STRING + rb":(?:" + _STRING + rb'|[^"{}\[\],]+),?)+\},)?"row":(\d{1,9}),'
    rb'"sha256":"([0-9a-f]{16})[0-9a-f]{48}","shard":(\d{1,9}),"source_sha256":"[^"]*",(?:"status":\d+,)?'
    rb'(?:"url":"[^"\\]*",)?"width":(\d{1,9})[,}]',
    re.MULTILINE,
)
_Line = tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes]  # the groups of _LINE, in its order


@dataclass(frozen=True, slots=True)
class RowTable:
    """All records of a split, in stored order.

    Attributes:
        split: The name of the split.
        files: The data files.
        image_field: int32 (files,), position of the image among a row's blobs, from 0.
        start: int64 (N,), first byte of the row's blobs in its file.
        size: int64 (N,), size of the row's blobs in bytes; 0 until :func:`place_rows` has read the index of its file.
        ids: uint64 (N,), see :func:`imnet_prep.types.record_id`.
        digest: uint64 (N,), the first 8 bytes of the SHA-256 of the image.
        shard: int32 (N,), position in ``files``.
        row: int32 (N,), row in the shard.
        label: int32 (N,).
        width: int32 (N,), in pixels, from the record list; 0 where it is not listed. height: Likewise.
    """

    split: str
    files: tuple[Path, ...]
    image_field: NDArray[np.int32]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    ids: NDArray[np.uint64]
    digest: NDArray[np.uint64]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    label: NDArray[np.int32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)


def load_rows(records: Path, manifest: Manifest, split: str) -> RowTable:
    """Read the table of a split and check that manifest, indexes and record list agree.

    Raises:
        RecordsError: There is no such split; a shard is missing, has another size, or its index is damaged; the record
            list is damaged or contradicts the index.
    """
    shards = manifest.split(records, split).shards
    for shard in shards:
        _check_size(records, shard)  # before memory is taken for as many rows as the manifest says
    table = load_list(records, manifest, split)
    for number, shard in enumerate(shards):
        place_rows(table, number, shard)
    return table


def load_list(records: Path, manifest: Manifest, split: str) -> RowTable:
    """Read the record list of a split as a table without the places of the rows, which :func:`place_rows` adds.

    Raises:
        RecordsError: There is no such split; the list is damaged, or lists other rows than the shards have.
    """
    info = manifest.split(records, split)
    rows = [shard.rows for shard in info.shards]
    shard_of = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
    row = np.concatenate([np.arange(count, dtype=np.int32) for count in rows])
    numbers, ids, digest = _read_list(records / info.records["file"], split, np.stack([shard_of, row]))
    start, size = np.zeros((2, len(ids)), np.int64)
    files = tuple(records / shard.file for shard in info.shards)
    return RowTable(split, files, np.zeros(len(files), np.int32), start, size, ids, digest, *numbers)


def place_rows(table: RowTable, number: int, shard: ShardInfo) -> None:
    """Add the places of the rows of a shard to a table.

    Args:
        table: Of the shard's split.
        number: The shard's position in ``table.files``.
        shard: What the manifest says of it.

    Raises:
        RecordsError: Its header or index is damaged, or its labels are not those of the record list.
    """
    path = table.files[number]
    header = read_header(path)
    index = read_index(path, header)
    outside = (index.blob_end - index.blob_start < LENGTH.size) | (index.blob_end > shard.size_bytes)
    if len(index) != shard.rows or outside.any():
        raise RecordsError(
            f"{index_path(path)}: the index is damaged",
            expected=f"{shard.rows} rows that lie inside the shard",
            got=f"{len(index)} rows",
            remedy="run `imnet-prep repair-index`",
        )
    first = int(np.searchsorted(table.shard, number))
    rows = slice(first, first + shard.rows)
    if index.label is not None and (table.label[rows] != index.label).any():
        raise RecordsError(f"{path}: {RECORDS} lists other records than the index")
    table.start[rows], table.size[rows] = index.blob_start, index.blob_end - index.blob_start
    table.image_field[number] = header.blob_fields.index(header.image_field)


def _check_size(records: Path, shard: ShardInfo) -> None:
    if problem := check_size(records, shard.file, shard.size_bytes):
        raise RecordsError(
            f"{records / shard.file}: the shard {problem.detail}",
            remedy="restore the file or convert again; `imnet-prep verify` lists what is damaged",
        )


def _read_list(
    path: Path, split: str, expected: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.uint64], NDArray[np.uint64]]:
    """Read the record list, and check it against the manifest.

    Args:
        path: The record list.
        split: The name of the split.
        expected: int32 (2, N): shard and row.

    Returns:
        int32 (5, N): shard, row, label, width, height; uint64 (N,), ids; uint64 (N,), digests.
    """
    rows = expected.shape[1]
    numbers = np.empty((5, rows), dtype=np.int32)
    ids, digest = np.empty((2, rows), dtype=np.uint64)
    prefix, count = f"{split}/".encode(), 0
    with opened_list(path) as file:
        while chunk := file.read(READ_BYTES):
            lines = _parse_lines(path, chunk + file.readline(READ_BYTES), count)
            flat = list(chain.from_iterable(lines))  # faster than zip(*lines)
            name, height, label, row, sha256, shard, width = (flat[group::7] for group in range(7))
            text = b" ".join(shard + row + label + width + height)
            listed = np.fromstring(text, dtype=np.int32, sep=" ").reshape(5, -1)
            part = slice(count, count := count + len(name))
            if count > rows or (listed[:2] != expected[:, part]).any():
                raise RecordsError(f"{path}: lists other records than the shards hold")
            numbers[:, part] = listed
            hashed = b"".join([hashlib.sha256(prefix + one).digest() for one in name])
            ids[part] = np.frombuffer(hashed, dtype="<u8")[::4]
            digest[part] = np.frombuffer(binascii.unhexlify(b"".join(sha256)), dtype="<u8")
    if count != rows:
        raise RecordsError(f"{path}: the record list is short", expected=f"{rows} lines", got=f"{count}")
    if len(np.unique(ids)) != rows:
        raise RecordsError(f"{path}: two records have the same name, so the same id")
    return numbers, ids, digest


def _parse_lines(path: Path, chunk: bytes, before: int) -> list[_Line]:
    found: list[_Line] = _LINE.findall(chunk)
    if len(found) == chunk.count(b"\n") + (not chunk.endswith(b"\n")):
        return found
    return [_parse_line(path, line, before + number) for number, line in enumerate(chunk.splitlines(), start=1)]


def _parse_line(path: Path, line: bytes, number: int) -> _Line:
    """Parse a line in any layout, as JSON."""
    try:
        values = {"width": 0, "height": 0, **json.loads(line)}
        name, sha256 = str(values["file_name"]).encode(), bytes.fromhex(values["sha256"]).hex().encode()
        numbers = [int(values[key]) for key in ("height", "label", "row", "shard", "width")]
        if len(sha256) != 64 or not all(
            low <= one < 1 << 31 for low, one in zip((0, -1, 0, 0, 0), numbers, strict=True)
        ):
            raise ValueError(f"a number or a digest out of range: {numbers}, {len(sha256)} digits")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordsError(f"{path}: line {number} is damaged", got=str(error)) from error
    height, label, row, shard, width = (b"%d" % one for one in numbers)
    return name, height, label, row, sha256[:16], shard, width


class RowReader:
    """Read images by position in the table. Threads may share a reader; it keeps a bounded number of files open."""

    def __init__(self, table: RowTable) -> None:
        self.table = table
        self._file = lru_cache(maxsize=max_open_files())(lambda shard: PlainFile(table.files[shard]))

    def open(self, shard: int) -> PlainFile:
        """Return a data file, open, whose rows have their places in the table.

        Raises:
            OSError: It cannot be opened.
        """
        return self._file(shard)

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self._file.cache_clear()

    def follow(self, rows: Callable[[], NDArray[np.int64]], then: Callable[[], NDArray[np.int64]] | None) -> None:
        """Prepare for rows that will be read in order, and for those after them. Files that are here need nothing."""

    def will_need(self, positions: NDArray[np.int64]) -> None:
        """Tell the system which rows come next, so that it can read them in the best order."""
        table = self.table
        columns = table.shard, table.start, table.size
        for shard, start, size in zip(*(column[positions].tolist() for column in columns), strict=True):
            with suppress(OSError):  # the read itself reports it
                self._file(shard).will_need(size, start)

    def image(self, position: int) -> bytes:
        """Read one image.

        Raises:
            PipelineError: The row cannot be read or is cut off; :meth:`where` names it.
        """
        table, shard = self.table, int(self.table.shard[position])
        try:
            file = self.open(shard)
            start, size = int(table.start[position]), int(table.size[position])
            data = file.read(size, start)
        except OSError as error:
            raise PipelineError("the record cannot be read", got=str(error)) from error
        first = end = 0
        for _ in range(table.image_field[shard] + 1):
            first = end + LENGTH.size
            end = first + int.from_bytes(data[end:first], "little")
        if end > len(data):
            raise PipelineError(
                "the record is cut off or its length is damaged",
                expected=f"{size} bytes from byte {start}",
                got=f"{len(data)} bytes",
                remedy="`imnet-prep verify --level hash` names the damaged files",
            )
        return data[first:end]

    def matches(self, position: int, image: bytes) -> bool:
        """Tell whether an image is the one that was stored, by its SHA-256."""
        return bool(hashlib.sha256(image).digest()[:8] == self.table.digest[position].tobytes())

    def file_name(self, position: int) -> str:
        """Return the stored name of a record, or the listed one if the row is damaged."""
        path, row = self.table.files[int(self.table.shard[position])], int(self.table.row[position])
        try:
            with Shard(path) as shard:
                return str(shard.fields(row)["file_name"])
        except (RecordsError, KeyError):
            with suppress(RecordsError), opened_list(path.with_name(RECORDS)) as lines:
                return str(json.loads(next(islice(lines, position, None), b""))["file_name"])
        return "file_name unreadable"

    def where(self, position: int) -> str:
        """Describe a record for a message: its shard, row and name."""
        path, row = self.table.files[int(self.table.shard[position])], int(self.table.row[position])
        return f"{path}: row {row} ({self.file_name(position)})"
