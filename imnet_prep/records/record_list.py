"""The lists beside the shards: a line a record (``records.jsonl.gz``), and a line a rejected image.

Source: the formats are described in ``docs/records.md``.
"""

from __future__ import annotations

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
from typing import Any

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
        changes: What was done or noticed (:class:`~imnet_prep.types.Change`).
        url: Where it was downloaded from, or empty. status: The HTTP status of that, or None.
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

    def to_json(self) -> str:
        """Return the line, without its newline; what is empty is left out."""
        values = {name: value for name in self.__slots__ if (value := getattr(self, name)) not in ("", None, ())}
        return json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> RecordLine:
        """Read a line; keys of later versions are passed over.

        Raises:
            ValueError: It is no such line.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            known = {name: values[name] for name in cls.__slots__ if name in values}
            line = cls(**{**known, "changes": tuple(values.get("changes", ()))})
            numbers = (line.shard, line.row, line.label, line.width, line.height)
            texts = (line.file_name, line.source_sha256, line.url, *line.changes)
            if not all(type(value) is int and -2 < value < 1 << 31 for value in numbers):
                raise ValueError("a number of another type or out of range")
            if not all(isinstance(value, str) for value in texts) or name_fault(line.file_name):
                raise ValueError("a text of another type, or no name")
            if not (_DIGEST.fullmatch(line.sha256) and _DIGEST.fullmatch(line.source_sha256)):
                raise ValueError("a digest that is none")
            if (line.url and name_fault(line.url)) or type(line.status) not in (int, type(None)):
                raise ValueError("a download that is none")
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"no record line: {error}") from error
        return line


@contextmanager
def opened_list(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a record list for reading its lines as bytes; what is wrong with the file while it is read is one error.

    Raises:
        RecordsError: It cannot be read, or is damaged.
    """
    try:
        with open_plain(path) as raw, gzip.GzipFile(fileobj=raw) as lines:
            yield lines
    except _FAULTS as error:
        got = getattr(error, "strerror", None) or str(error)
        raise RecordsError(
            f"{path}: the record list cannot be read", got=got, remedy="restore it or convert again"
        ) from error


def read_lines(path: Path) -> Iterator[RecordLine]:
    """Read a record list, in shard and row order, one line at a time.

    Raises:
        RecordsError: It cannot be read, or a line is not one.
    """
    number = 0
    with opened_list(path) as lines:
        for number, text in enumerate(lines, 1):
            try:
                line = RecordLine.from_json(text)
            except ValueError as error:
                raise RecordsError(f"{path}: line {number} is damaged", got=str(error)) from error
            yield line


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write ``records.jsonl.gz`` and bring it to the disk.

    Its time stamp is 0 and no name is inside, so that equal lines give equal bytes.

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
    """Return the bytes of ``rejected.jsonl``: a line an image, sorted by split, name and reason."""
    lines = [
        json.dumps({k: v for k, v in asdict(item).items() if v or k != "thumbnail"}, sort_keys=True, ensure_ascii=False)
        for item in sorted(rejected, key=lambda item: (item.split, item.file_name, item.reason))
    ]
    return "".join(line + "\n" for line in lines).encode()


def read_rejected(path: Path) -> Iterator[Rejected]:
    """Read ``rejected.jsonl``.

    Raises:
        RecordsError: It cannot be read, or a line is damaged.
    """
    number = 0
    try:
        with open_plain(path) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - named in the message
                yield Rejected.from_json(json.loads(line))
    except _FAULTS as error:
        got = f"line {number}: {getattr(error, 'strerror', None) or error}"
        remedy = "restore the file; `imnet-prep verify` names what else is damaged"
        raise RecordsError(f"{path}: the list of rejected images cannot be read", got=got, remedy=remedy) from error
