"""Apply a function to every record of a folder, in several processes, and yield the results in stored order."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
CHUNK_ROWS = 512  # rows per task: some seconds of photographs, and a few hundred kB of record lines


@dataclass(slots=True)
class Row:
    """A record whose parts are read on access.

    Attributes:
        split: The name of its split. file: Its data file, as in the manifest. shard: The number of that file in the
            split.
        row: The row in the data file. position: The number of the record in the whole folder.
        shard_file: The opened data file, or why it cannot be opened.
        listed: Its line of the record list, as bytes; None if no list was asked for, or if the list is cut off.
    """

    split: str
    file: str
    shard: int
    row: int
    position: int
    shard_file: Shard | RecordsError | None = None
    listed: bytes | None = None

    @property
    def opened(self) -> Shard:
        """The shard.

        Raises:
            RecordsError: It cannot be opened.
        """
        if not isinstance(self.shard_file, Shard):
            raise self.shard_file or RecordsError(f"{self.file}: is not open")
        return self.shard_file

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
        """Total size of its bytes columns, by the index; 0 if the row cannot be read."""
        shard = self.shard_file
        if not isinstance(shard, Shard) or self.row >= len(shard):
            return 0
        return int(shard.index.blob_end[self.row] - shard.index.blob_start[self.row]) - 8 * len(
            shard.header.blob_fields
        )

    @property
    def name(self) -> str:
        """The stored file_name; file and row if it cannot be read."""
        try:
            return str(self.fields["file_name"])
        except (RecordsError, KeyError):
            return f"{self.file} row {self.row}"

    @property
    def label(self) -> Any:
        """The stored label; None if it cannot be read."""
        try:
            return self.fields.get("label")
        except RecordsError:
            return None

    def line(self) -> RecordLine:
        """Return its line of the record list.

        Raises:
            ValueError: The line is damaged, or another record's.
        """
        line = RecordLine.from_json(self.listed or b"")
        if (line.shard, line.row) != (self.shard, self.row):
            raise ValueError(f"the record list has shard {line.shard} row {line.row} here")
        return line


_Chunk = tuple[int, Path, Row, int, list[bytes]]  # number, data file, first row, row count, lines (perhaps too few)


def _apply(function: Callable[[Row], Result], chunk: _Chunk, advance: Advance) -> tuple[int, list[Result]]:
    """Apply a function to the rows of a chunk, in a worker process."""
    number, path, first, count, listed = chunk
    opened: Shard | RecordsError
    try:
        opened = _open(path, _fingerprint(path))
    except RecordsError as error:
        opened = error
    results = []
    for place in range(count):
        line = listed[place] if place < len(listed) else None
        row = replace(first, row=first.row + place, position=first.position + place, shard_file=opened, listed=line)
        results.append(function(row))
        advance(1, row.size_bytes, 0)
    return number, results


def _fingerprint(path: Path) -> tuple[tuple[int, int], ...]:
    """Return a value that changes when a data file or its index is written again."""
    files = [os.stat(file) for file in (path, index_path(path)) if os.path.exists(file)]
    return tuple((file.st_size, file.st_mtime_ns) for file in files)


@lru_cache(maxsize=1)
def _open(path: Path, _fingerprint: tuple[tuple[int, int], ...]) -> Shard:
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
    """Apply a function to every record and yield the results in stored order.

    Close the iterator (:func:`contextlib.closing`) if you do not read it to its end: that kills the workers.

    Args:
        folder: The records.
        function: Takes a row; must be importable, as other processes run it. Whatever bytes are stored, only its own
            reads of the row raise.
        workers: Number of processes; by default one per usable core.
        progress: Called with the number of records and bytes.
        lines: Pass each row its line of the record list.
        unit: What the progress calls the records.

    Raises:
        PlanError: A worker process was killed.
    """
    early: dict[int, list[Result]] = {}
    wanted = 0

    def report(images: int, size: int, _bad: int) -> None:
        progress(Progress(min(images, folder.records), folder.records, unit, size))

    width = min(process_count(workers), -(-folder.records // CHUNK_ROWS))
    try:
        for number, results in run_processes(partial(_apply, function), _chunks(folder, lines=lines), width, report):
            early[number] = results
            while wanted in early:
                yield from early.pop(wanted)
                wanted += 1
    finally:
        _open.cache_clear()  # Windows does not rename a folder while a file in it is open


def _chunks(folder: RecordsFolder, *, lines: bool) -> Iterator[_Chunk]:
    number = position = 0
    texts: Iterator[bytes] = iter(())
    for split, shard_number, shard in folder.shards:
        if shard_number == 0 and lines:
            texts = _texts(folder.list_path(split))
        for first in range(0, shard.rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, shard.rows - first)
            row = Row(split, shard.file, shard_number, first, position)
            yield number, folder.path / shard.file, row, count, list(islice(texts, count))
            number, position = number + 1, position + count


def _texts(path: Path) -> Iterator[bytes]:
    """Yield the lines of a record list as far as it can be read: the rows are scanned all the same."""
    with suppress(RecordsError), opened_list(path) as lines:
        yield from lines
