"""Find any line of a record list or of the rejections without reading the list from its beginning.

A record list is one stream of gzip. Its index keeps copies of the decompressor's state, about one per MiB of text, and
a line is read from the state before it. Source: zlib's ``examples/zran.c``, which does the same in C.
"""

import json
import re
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from imnet_prep.errors import RecordsError
from imnet_prep.files import open_plain
from imnet_prep.types import Change, Rejected

if TYPE_CHECKING:
    from zlib import _Decompress

POINT_BYTES = 1 << 18  # compressed bytes between two points; a point takes about 40 kB of memory
_STEP_BYTES = 1 << 15  # compressed bytes that are read at a time for one line
# The beginning of a line as the writer forms it; any other form is parsed as JSON.
_HEAD = re.compile(rb'^\{(?:"changes":\[([^\]]*)\],)?"file_name":"([^"\\]*)"', re.MULTILINE)
_FAULTS = (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError, zlib.error)


class _Point(NamedTuple):
    """A place in a list: the number of the line that is read next, the part of it that was read, and how to go on."""

    line: int
    begun: bytes
    offset: int
    state: "_Decompress"


class ListIndex:
    """The names and changes of all records of a list, and where its lines are. Threads may share it.

    Attributes:
        names: Every file_name as UTF-8, each ended by a newline.
        starts: int64 (N + 1,), where each name begins in ``names``.
        changes: uint16 (N,), what was changed or noticed; bit i is the i-th :class:`~imnet_prep.types.Change`.
        inflated_bytes: Bytes of text that were decompressed to read single lines.
    """

    def __init__(self, path: Path) -> None:
        """Read a list once.

        Raises:
            RecordsError: It cannot be read.
        """
        self.path = path
        self.inflated_bytes = 0
        self._points: list[_Point] = []
        names, changes = bytearray(), array("H")
        with _faults_named(path, "the record list"):
            for text in self._texts():
                for changed, name in _heads(text):
                    names += name + b"\n"
                    changes.append(_bits(changed))
        self.names = bytes(names)
        ends = np.flatnonzero(np.frombuffer(self.names, np.uint8) == ord("\n")) + 1
        self.starts = np.concatenate([np.zeros(1, np.int64), ends])
        self.changes = np.array(changes, dtype=np.uint16)

    def _texts(self) -> Iterator[bytes]:
        """Yield the text in whole lines, and set the points."""
        state, begun, lines, offset = zlib.decompressobj(31), b"", 0, 0
        with open_plain(self.path) as file:
            while True:
                self._points.append(_Point(lines, begun, offset, state.copy()))
                packed = file.read(POINT_BYTES)
                if not packed:
                    break
                offset += len(packed)
                state, text = _inflate(state, packed)
                whole, newline, begun = (begun + text).rpartition(b"\n")
                lines += whole.count(b"\n") + len(newline)
                yield whole + newline
        if begun:
            yield begun + b"\n"

    def name(self, number: int) -> str:
        """Return the file_name of a line; the first is 0."""
        return self.names[self.starts[number] : self.starts[number + 1] - 1].decode(errors="replace")

    def line(self, number: int) -> bytes:
        """Read one line; empty if the list ends before it.

        Raises:
            RecordsError: The list cannot be read.
        """
        first, text, offset, shared = self._points[bisect_right(self._points, number, key=lambda at: at.line) - 1]
        state, skip = shared.copy(), number - first
        with _faults_named(self.path, "the record list"), open_plain(self.path) as file:
            file.seek(offset)
            while text.count(b"\n") <= skip and (packed := file.read(_STEP_BYTES)):
                state, more = _inflate(state, packed)
                text += more
                self.inflated_bytes += len(more)
        return next(iter(text.split(b"\n", skip + 1)[skip : skip + 1]), b"")


class RejectedIndex:
    """The reasons and splits of all rejected images, and where their lines are. Threads may share it.

    Attributes:
        reasons: The reason of each. splits: The split of each.
    """

    def __init__(self, path: Path | None) -> None:
        """Read a list once; without a path it is empty.

        Raises:
            RecordsError: It cannot be read.
        """
        self._path = path
        self._starts = array("q")
        reasons: list[str] = []
        splits: list[str] = []
        if path is not None:
            with _faults_named(path, "the list of rejected images"), open_plain(path) as file:
                start = 0
                for line in file:
                    item = Rejected.from_json(json.loads(line))
                    reasons.append(item.reason)
                    splits.append(item.split)
                    self._starts.append(start)
                    start += len(line)
        self.reasons, self.splits = np.array(reasons, dtype=np.str_), np.array(splits, dtype=np.str_)

    def read(self, numbers: Iterable[int]) -> Iterator[Rejected]:
        """Read some entries, by their number in the list.

        Raises:
            RecordsError: They cannot be read.
        """
        if self._path is None:
            return
        with _faults_named(self._path, "the list of rejected images"), open_plain(self._path) as file:
            for number in numbers:
                file.seek(self._starts[number])
                yield Rejected.from_json(json.loads(file.readline()))


@contextmanager
def _faults_named(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise RecordsError(
            f"{path}: {what} cannot be read",
            got=getattr(error, "strerror", None) or str(error),
            remedy="restore the file; `imnet-prep verify` names what else is damaged",
        ) from error


def _inflate(state: "_Decompress", packed: bytes) -> tuple["_Decompress", bytes]:
    """Decompress a part of a file of one or more gzip members, and return the state after it and the text."""
    text = state.decompress(packed)
    while state.eof and (packed := state.unused_data.lstrip(b"\0")):
        state = zlib.decompressobj(31)
        text += state.decompress(packed)
    return state, text


def _heads(text: bytes) -> list[tuple[bytes, bytes]]:
    """Return the changes, as a JSON list without its brackets, and the name of each line."""
    found: list[tuple[bytes, bytes]] = _HEAD.findall(text)
    if len(found) == text.count(b"\n"):
        return found
    lines = [json.loads(line) for line in text.split(b"\n")[:-1]]
    return [
        (
            json.dumps(values.get("changes", ()))[1:-1].encode(),
            str(values["file_name"]).replace("\n", " ").encode(errors="replace"),
        )
        for values in lines
    ]


@cache
def _bits(changes: bytes) -> int:
    return sum(1 << number for number, change in enumerate(Change) if b'"%s"' % change.encode() in changes)
