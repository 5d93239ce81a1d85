"""The table of a split's records: where each lies, its label, id and digest, in flat arrays (34 bytes a record)."""

from __future__ import annotations

import binascii
import gzip
import hashlib
import json
import os
import re
import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import ImnetError, PipelineError, RecordsError
from imnet_prep.records.manifest import RECORDS, Manifest, SplitInfo
from imnet_prep.records.mindrecord import LENGTH, Shard, connect_index, index_path, read_header

# A line of records.jsonl.gz as the writer forms it (sorted keys, no blanks); any other form goes through json.
_LINE = re.compile(
    rb'^\{(?:"changes":\[[^\]]*\],)?"file_name":"([^"\\]*)","height":\d+,"label":(-?\d+),"row":(\d+),'
    rb'"sha256":"([0-9a-f]{64})","shard":(\d+)[,}]',
    re.MULTILINE,
)
CHUNK_BYTES = 1 << 20
NO_LABEL = -2  # in place of a label that the index does not carry; -1 is the test split's
IMAGE_FIELDS = ("image", "data")  # ours and ImageNetToMR's; hand-written ones


@dataclass(frozen=True, slots=True)
class RowTable:
    """Every record of a split, in stored order.

    Attributes:
        split: Its name.
        files: The data files.
        blob_fields: Fields in a blob, in order, and ``image_field`` the one that holds the image.
        shard: int32 (N,), position in ``files``.
        row: int32 (N,), row in the shard.
        start: int64 (N,), first byte of the row's blob in its file.
        size: int64 (N,), bytes of the row's blob.
        label: int32 (N,).
        ids: uint64 (N,), see :func:`imnet_prep.types.record_id`.
        digest: uint64 (N,), the first 8 bytes of the SHA-256 of the image.
    """

    split: str
    files: tuple[Path, ...]
    blob_fields: tuple[str, ...]
    image_field: int
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int32]
    ids: NDArray[np.uint64]
    digest: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.ids)


def load_rows(records: Path, manifest: Manifest, split: str) -> RowTable:
    """Read the table of a split and check that manifest, index and record list agree.

    Raises:
        RecordsError: No such split; a shard is missing, of another size, or its index is damaged; the record list is
            damaged or says something else than the index.
    """
    info = manifest.split(records, split)
    files = tuple(records / shard.file for shard in info.shards)
    fields: tuple[str, ...] = ()
    parts = []
    for number, shard in enumerate(info.shards):
        found, start, size, label = _read_shard(files[number], shard.rows, shard.size_bytes)
        if number and found != fields:
            raise RecordsError(
                f"{files[number]}: other columns than the first shard", expected=str(fields), got=str(found)
            )
        fields = found
        rows = np.arange(shard.rows, dtype=np.int32)
        parts.append((np.full(shard.rows, number, dtype=np.int32), rows, start, size, label))
    shard_of, row, start, size, label = (np.concatenate(column) for column in zip(*parts, strict=True))
    ids, digest = _read_list(records, info, split, shard_of, row, label)
    image_field = next((fields.index(name) for name in IMAGE_FIELDS if name in fields), 0)
    return RowTable(split, files, fields, image_field, shard_of, row, start, size, label, ids, digest)


def _read_shard(
    path: Path, rows: int, size_bytes: int
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Blob fields, and start, size and label of each row, of one shard."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RecordsError(
            f"{path}: the shard is missing", got=str(error), remedy="restore the file or convert again"
        ) from error
    if size != size_bytes:
        raise RecordsError(
            f"{path}: the shard has another size than the manifest says",
            expected=f"{size_bytes} bytes",
            got=f"{size}",
            remedy="restore the file; `imnet-prep verify` lists what is damaged",
        )
    header = read_header(path)
    if not header.blob_fields:
        raise RecordsError(f"{path}: no bytes column", expected="a column `image`", got=str(sorted(header.fields)))
    table = _read_places(path)
    start = header.header_size + table[:, 0] * header.page_size + table[:, 1]
    length = table[:, 2] - table[:, 1]
    if len(table) != rows or (table[:, :3] < 0).any() or (length < LENGTH.size).any() or (start + length > size).any():
        raise RecordsError(
            f"{index_path(path)}: the index is damaged",
            expected=f"{rows} rows that lie inside the shard",
            got=f"{len(table)} rows",
            remedy="run `imnet-prep repair-index`",
        )
    return header.blob_fields, start, length, table[:, 3].astype(np.int32)


def _read_places(path: Path) -> NDArray[np.int64]:
    """int64 (rows, 4): page, offset and end of each row's blob, and its label (:data:`NO_LABEL` where not indexed)."""
    try:
        connection = connect_index(path)
        try:
            columns = [str(entry[1]) for entry in connection.execute("PRAGMA table_info(INDEXES)")]
            label = next((name for name in columns if re.fullmatch(r"label_\d+", name)), str(NO_LABEL))
            query = f"SELECT PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END, {label} FROM INDEXES ORDER BY ROW_ID"
            found = connection.execute(query)
            # One number at a time: a list of a million tuples would cost 300 bytes a row.
            return np.fromiter(chain.from_iterable(found), dtype=np.int64).reshape(-1, 4)
        finally:
            connection.close()
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise RecordsError(
            f"{index_path(path)}: the index is damaged", got=str(error), remedy="run `imnet-prep repair-index`"
        ) from error


def _read_list(
    records: Path,
    info: SplitInfo,
    split: str,
    shard: NDArray[np.int32],
    row: NDArray[np.int32],
    label: NDArray[np.int32],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Ids and digests from ``records.jsonl.gz``, in stored order, checked against shard, row and label.

    Labels that no index carries are filled in.
    """
    path = records / info.records["file"]
    ids = np.empty(len(label), dtype=np.uint64)
    digest = np.empty(len(label), dtype=np.uint64)
    count = 0
    prefix = f"{split}/".encode()
    expected = np.stack([shard, row], axis=1)
    for chunk in _line_chunks(path):
        names, digests, places = _parse_lines(path, chunk, count)
        end = count + len(names)
        if end <= len(label) and label[count] == NO_LABEL:
            label[count:end] = places[:, 2]
        same = end <= len(label) and np.array_equal(places[:, :2], expected[count:end])
        if not same or not np.array_equal(places[:, 2], label[count:end]):
            raise RecordsError(f"{path}: lists other records than the shards' indexes hold")
        hashed = b"".join([hashlib.sha256(prefix + name).digest()[:8] for name in names])
        ids[count:end] = np.frombuffer(hashed, dtype="<u8")
        digest[count:end] = np.frombuffer(binascii.unhexlify(b"".join([text[:16] for text in digests])), dtype="<u8")
        count = end
    if count != len(label):
        raise RecordsError(f"{path}: the record list is short", expected=f"{len(label)} lines", got=f"{count}")
    if len(np.unique(ids)) != len(ids):
        raise RecordsError(f"{path}: two records have the same name, so the same id")
    return ids, digest


def _line_chunks(path: Path) -> Iterator[bytes]:
    """Whole lines, about a megabyte at a time."""
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk + file.readline()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RecordsError(
            f"{path}: the record list cannot be read", got=str(error), remedy="restore it or convert again"
        ) from error


def _parse_lines(path: Path, chunk: bytes, before: int) -> tuple[list[bytes], list[bytes], NDArray[np.int32]]:
    """File names (UTF-8), SHA-256 (hex) and int32 (lines, 3) shard, row and label."""
    found: list[tuple[bytes, bytes, bytes, bytes, bytes]] = _LINE.findall(chunk)
    lines = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
    if len(found) != lines:
        found = [_parse_line(path, line, before + number) for number, line in enumerate(chunk.splitlines())]
    names, label, row, sha256, shard = zip(*found, strict=True)
    places = np.array([shard, row, label], dtype=np.bytes_).astype(np.int32).T
    return list(names), list(sha256), places


def _parse_line(path: Path, line: bytes, number: int) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """A line in any layout, by way of JSON."""
    try:
        values: dict[str, Any] = json.loads(line)
        label, row, shard = (b"%d" % int(values[key]) for key in ("label", "row", "shard"))
        name, sha256 = str(values["file_name"]).encode(), bytes.fromhex(values["sha256"]).hex().encode()
    except (ValueError, KeyError, TypeError) as error:
        raise RecordsError(f"{path}: line {number + 1} is damaged", got=str(error)) from error
    return name, label, row, sha256, shard


class RowReader:
    """Reads images by position in the table; positioned reads, so threads share it. Files open at first use."""

    def __init__(self, table: RowTable) -> None:
        self.table = table
        self._descriptors: dict[int, int] = {}

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def close(self) -> None:
        """Close the files; no read may be under way."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        found = self._descriptors.get(shard)
        if found is None:
            path = self.table.files[shard]
            try:
                opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise RecordsError(f"{path}: the shard cannot be opened", got=str(error)) from error
            found = self._descriptors.setdefault(shard, opened)
            if found != opened:  # another thread was first
                os.close(opened)
        return found

    def will_need(self, positions: NDArray[np.int64]) -> None:
        """Tell the kernel which rows come next, so that it can read them in the best order."""
        if not hasattr(os, "posix_fadvise"):  # not everywhere; it changes only the speed
            return
        table = self.table
        for position in positions.tolist():
            descriptor = self._descriptor(int(table.shard[position]))
            os.posix_fadvise(descriptor, int(table.start[position]), int(table.size[position]), os.POSIX_FADV_WILLNEED)

    def image(self, position: int) -> bytes:
        """Read one image.

        Raises:
            PipelineError: The row cannot be read or is cut off; :meth:`where` names it.
        """
        table = self.table
        start, size = int(table.start[position]), int(table.size[position])
        try:
            data = os.pread(self._descriptor(int(table.shard[position])), size, start)
        except (OSError, ImnetError) as error:
            raise PipelineError("the record cannot be read", got=str(error)) from error
        offset = 0
        for field in range(len(table.blob_fields)):
            if offset + LENGTH.size > len(data):
                break
            length = LENGTH.unpack_from(data, offset)[0]
            offset += LENGTH.size
            if offset + length > len(data):
                break
            if field == table.image_field:
                return data[offset : offset + length]
            offset += length
        raise PipelineError(
            "the record is cut off or its length is damaged",
            expected=f"{size} bytes from byte {start}",
            got=f"{len(data)} bytes",
            remedy="`imnet-prep verify --level hash` names the damaged files",
        )

    def matches(self, position: int, image: bytes) -> bool:
        """Say whether the image is the one that was stored, by its SHA-256."""
        return bool(hashlib.sha256(image).digest()[:8] == self.table.digest[position].tobytes())

    def where(self, position: int) -> str:
        """Name a record for a message: shard, row and file name."""
        table = self.table
        path, row = table.files[int(table.shard[position])], int(table.row[position])
        return f"{path}: row {row} ({self.file_name(position)})"

    def file_name(self, position: int) -> str:
        """Look up a record's name in its shard, or where that is damaged in the record list; slow, for messages."""
        table = self.table
        try:
            with Shard(table.files[int(table.shard[position])]) as shard:
                return str(shard.fields(int(table.row[position]))["file_name"])
        except (OSError, ImnetError, KeyError):
            return self._listed_name(position)

    def _listed_name(self, position: int) -> str:
        before = 0
        try:
            for chunk in _line_chunks(self.table.files[0].with_name(RECORDS)):
                lines = chunk.splitlines()
                if position < before + len(lines):
                    return str(json.loads(lines[position - before])["file_name"])
                before += len(lines)
        except (ImnetError, ValueError, KeyError, TypeError):
            pass
        return "file_name unreadable"
