"""A scan: a function of a row, carried out on every record of a folder, its results in stored order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from imnet_prep.errors import RecordsError
from imnet_prep.process_pool import Advance, process_count, run_processes
from imnet_prep.records.mindrecord import Shard, index_path, open_shard
from imnet_prep.records.record_list import RecordLine, opened_list
from imnet_prep.types import Progress, ProgressCallback

if TYPE_CHECKING:
    from imnet_prep.records.folder import RecordsFolder

Result = TypeVar("Result")
CHUNK_ROWS = 512  # a task: some seconds of photographs, and a few hundred kB of record lines
REPORT_EVERY = 32


class Row:
    """A record, read when its parts are asked for.

    Attributes:
        split: Its split. file: Its data file, as in the manifest. shard: That file's number in the split. row: Its row.
        position: Its number among all records of the folder.
        listed: Its line of the record list, as bytes; None where no list was asked for, or it breaks off.
    """

    __slots__ = ("_shard", "file", "listed", "position", "row", "shard", "split")

    def __init__(
        self,
        opened: Shard | RecordsError,
        split: str,
        file: str,
        shard: int,
        row: int,
        position: int,
        listed: bytes | None = None,
    ) -> None:
        self._shard = opened
        self.split, self.file, self.shard, self.row, self.position = split, file, shard, row, position
        self.listed = listed

    @property
    def opened(self) -> Shard:
        """The shard.

        Raises:
            RecordsError: It cannot be opened.
        """
        if isinstance(self._shard, RecordsError):
            raise self._shard
        return self._shard

    @property
    def fields(self) -> dict[str, Any]:
        """The scalar and string fields.

        Raises:
            RecordsError: They cannot be read.
        """
        return self.opened.fields(self.row)

    @property
    def image(self) -> bytes:
        """The stored image.

        Raises:
            RecordsError: It cannot be read.
        """
        return self.opened.image(self.row)

    @property
    def size_bytes(self) -> int:
        """Stored bytes of its columns of bytes, by the index; 0 where it is not readable."""
        if isinstance(self._shard, RecordsError) or self.row >= len(self._shard):
            return 0
        index = self._shard.index
        return int(index.blob_end[self.row] - index.blob_start[self.row]) - 8 * len(self._shard.header.blob_fields)

    @property
    def name(self) -> str:
        """The stored file_name; its place where there is none that reads."""
        try:
            return str(self.fields["file_name"])
        except (RecordsError, KeyError):
            return f"{self.file} row {self.row}"

    @property
    def label(self) -> Any:
        """The stored label; None where it cannot be read."""
        try:
            return self.fields.get("label")
        except RecordsError:
            return None

    def line(self) -> RecordLine:
        """Read its line of the record list.

        Raises:
            ValueError: The line is damaged, or another record's.
        """
        line = RecordLine.from_json(self.listed or b"")
        if (line.shard, line.row) != (self.shard, self.row):
            raise ValueError(f"the record list has shard {line.shard} row {line.row} here")
        return line


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows of one shard, from ``first`` on; ``position`` is the first one's among all records."""

    number: int
    path: Path
    split: str
    file: str
    shard: int
    first: int
    count: int
    position: int
    listed: tuple[bytes, ...] | None


@dataclass(frozen=True, slots=True)
class _Apply:
    """Carries out a function on the rows of a chunk; in a worker process."""

    function: Callable[[Row], Any]

    def __call__(self, chunk: _Chunk, advance: Advance) -> tuple[int, list[Any]]:
        try:
            opened: Shard | RecordsError = _open(chunk.path, _state(chunk.path))
        except RecordsError as error:
            opened = error
        results, pending, size = [], 0, 0
        for place in range(chunk.count):
            listed = chunk.listed[place] if chunk.listed is not None and place < len(chunk.listed) else None
            row = Row(opened, chunk.split, chunk.file, chunk.shard, chunk.first + place, chunk.position + place, listed)
            results.append(self.function(row))
            pending, size = pending + 1, size + row.size_bytes
            if pending == REPORT_EVERY or place + 1 == chunk.count:
                advance(pending, size, 0)
                pending, size = 0, 0
        return chunk.number, results


def _state(path: Path) -> tuple[tuple[int, int], ...]:
    """Return what changes when a data file or its index is written again."""
    found = []
    for file in (path, index_path(path)):
        try:
            at = file.stat()
        except OSError:
            continue
        found.append((at.st_size, at.st_mtime_ns))
    return tuple(found)


@lru_cache(maxsize=1)
def _open(path: Path, _state: tuple[tuple[int, int], ...]) -> Shard:
    return open_shard(path)


def map_rows(
    folder: RecordsFolder,
    function: Callable[[Row], Result],
    workers: int | None,
    progress: ProgressCallback,
    *,
    lines: bool = False,
    unit: str = "images",
) -> Generator[Result, None, None]:
    """Carry out a function on every record and yield the results in stored order.

    Close the iterator (:func:`contextlib.closing`) where it is not read to its end: the workers are killed then.

    Args:
        folder: The records.
        function: What to do with a record; from a module, for it may go to other processes. Whatever bytes are there,
            only its own reads of the row raise.
        workers: Processes; one a usable core where None.
        progress: Told of records and bytes.
        lines: Give each row its line of the record list.
        unit: What the records are called in the progress.

    Raises:
        PlanError: A worker process was killed.
    """
    chunks = -(-folder.records // CHUNK_ROWS) if folder.records else 0
    early: dict[int, list[Result]] = {}
    wanted = 0

    def report(images: int, size: int, _bad: int) -> None:
        progress(Progress(min(images, folder.records), folder.records, unit, size))

    work = run_processes(_Apply(function), _chunks(folder, lines=lines), min(process_count(workers), chunks), report)
    for number, results in work:
        early[number] = results
        while wanted in early:
            yield from early.pop(wanted)
            wanted += 1


def _chunks(folder: RecordsFolder, *, lines: bool) -> Iterator[_Chunk]:
    number = position = 0
    texts: Iterator[bytes] = iter(())
    for split, shard_number, shard in folder.shards:
        if shard_number == 0 and lines:
            texts = _texts(folder.list_path(split))
        for first in range(0, shard.rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, shard.rows - first)
            listed = tuple(islice(texts, count)) if lines else None
            path = folder.path / shard.file
            yield _Chunk(number, path, split, shard.file, shard_number, first, count, position, listed)
            number, position = number + 1, position + count


def _texts(path: Path) -> Iterator[bytes]:
    """Yield the lines of a record list as far as it can be read: the rows are scanned all the same."""
    try:
        with opened_list(path) as lines:
            yield from lines
    except RecordsError:
        return
