"""Read and write the lists beside the shards: ``records.jsonl.gz`` (records) and ``rejected.jsonl`` (rejections).

Source: ``docs/records.md`` describes the formats.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from imnet_prep.errors import RecordsError
from imnet_prep.files import open_plain
from imnet_prep.types import Rejected, name_fault

RECORDS = "records.jsonl.gz"
REJECTED = "rejected.jsonl"
_DIGEST = re.compile("[0-9a-f]{64}")
_FAULTS = (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError, zlib.error)


@dataclass(frozen=True, slots=True)
class RecordLine:
    """A line of ``records.jsonl.gz``.

    Attributes:
        shard: Position of the shard in the manifest's list, from 0.
        row: Row in the shard, from 0.
        file_name: ``<class>/<name>``.
        label: The stored label.
        width: Pixels. height: Pixels.
        sha256: Of the stored bytes. source_sha256: Of the bytes as found.
        changes: What was changed or noticed (:class:`~imnet_prep.types.Change`).
        url: The URL it was downloaded from, or empty. status: The HTTP status of the download, or None.
        meta: What else its source says of it: a JSON object, or None.
    """

    shard: int
    row: int
    file_name: str
    label: int
    width: int
    height: int
    sha256: str
    source_sha256: str
    changes: tuple[str, ...] = ()
    url: str = ""
    status: int | None = None
    meta: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Return the line without its newline; empty values are left out."""
        values = {name: value for name in self.__slots__ if (value := getattr(self, name)) not in ("", None, ())}
        return json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse a line; keys of later versions are ignored.

        Raises:
            ValueError: The line is invalid.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            known = {name: values[name] for name in cls.__slots__ if name in values}
            line = cls(**{**known, "changes": tuple(values.get("changes", ()))})
            texts = (line.file_name, line.source_sha256, line.url, *line.changes)
            if not all(
                type(value) is int and -2 < value < 1 << 31
                for value in (line.shard, line.row, line.label, line.width, line.height)
            ):
                raise ValueError("a number has another type or is out of range")
            if not all(isinstance(value, str) for value in texts) or name_fault(line.file_name):
                raise ValueError("a text has another type, or the name is invalid")
            if not (_DIGEST.fullmatch(line.sha256) and _DIGEST.fullmatch(line.source_sha256)):
                raise ValueError("a digest is invalid")
            if (line.url and name_fault(line.url)) or type(line.status) not in (int, type(None)):
                raise ValueError("the download is invalid")
            if type(line.meta) not in (dict, type(None)):
                raise ValueError("the meta is no object")
            json.dumps(line.meta, ensure_ascii=False).encode()  # raises for half a surrogate pair
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a record line: {error}") from error
        return line


@contextmanager
def opened_list(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a record list to read its lines as bytes.

    Raises:
        RecordsError: The list cannot be opened, or turns out to be damaged while it is read.
    """
    try:
        with open_plain(path) as raw, gzip.GzipFile(fileobj=raw) as lines:
            yield lines
    except _FAULTS as error:
        raise RecordsError(
            f"{path}: the record list cannot be read",
            got=getattr(error, "strerror", None) or str(error),
            remedy="restore it or convert again",
        ) from error


def read_lines(path: Path) -> Iterator[RecordLine]:
    """Yield the lines of a record list, in shard and row order.

    Raises:
        RecordsError: The list cannot be read, or a line is invalid.
    """
    with opened_list(path) as lines:
        for number, text in enumerate(lines, 1):
            try:
                yield RecordLine.from_json(text)
            except ValueError as error:
                raise RecordsError(f"{path}: line {number} is damaged", got=str(error)) from error


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write ``records.jsonl.gz`` and flush it to the disk.

    Its time stamp is 0 and it stores no file name, so equal lines give equal bytes.

    Raises:
        OSError: The disk is full or fails.
    """
    with path.open("wb") as raw:
        with (
            gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text,
        ):
            for line in lines:
                text.write(line + "\n")
        raw.flush()
        os.fsync(raw.fileno())


def rejected_bytes(rejected: Iterable[Rejected]) -> bytes:
    """Return the bytes of ``rejected.jsonl``: one line per image, sorted by split, name and reason."""
    lines = [
        json.dumps({k: v for k, v in asdict(item).items() if v or k != "thumbnail"}, sort_keys=True, ensure_ascii=False)
        for item in sorted(rejected, key=lambda item: (item.split, item.file_name, item.reason))
    ]
    return "".join(line + "\n" for line in lines).encode()


def read_rejected(path: Path) -> Iterator[Rejected]:
    """Yield the entries of ``rejected.jsonl``.

    Raises:
        RecordsError: The list cannot be read, or a line is damaged.
    """
    number = 0
    try:
        with open_plain(path) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - named in the message
                yield Rejected.from_json(json.loads(line))
    except _FAULTS as error:
        raise RecordsError(
            f"{path}: the list of rejected images cannot be read",
            got=f"line {number}: {getattr(error, 'strerror', None) or error}",
            remedy="restore the file; `imnet-prep verify` names what else is damaged",
        ) from error
