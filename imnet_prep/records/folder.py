"""Read a records folder: one record by its position, or all of them in several processes.

All code outside this package reads records through :class:`RecordsFolder`.
"""

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from typing import Any, Self, TypeVar

from imnet_prep.cluster import run_tasks, this_worker
from imnet_prep.errors import ImnetError, IntegrityError, RecordsError
from imnet_prep.files import file_digest, max_open_files
from imnet_prep.process_pool import Advance, in_order, process_count
from imnet_prep.records.line_index import ListIndex, RejectedIndex
from imnet_prep.records.manifest import MANIFEST, Manifest, load_manifest
from imnet_prep.records.mindrecord import Shard, open_shard
from imnet_prep.records.publish import refuse_interrupted
from imnet_prep.records.record_list import RecordLine, opened_list, read_lines, read_rejected
from imnet_prep.records.table import RowReader, RowTable, load_rows
from imnet_prep.types import Progress, ProgressCallback, Rejected, ShardInfo

Result = TypeVar("Result")
CHUNK_ROWS = 512  # rows per task: some seconds of photographs, and a few hundred kB of record lines
_open = lru_cache(maxsize=1)(open_shard)  # of a scan, which clears it at its end
SCAN = "part of the records"  # what a worker does at a time, for messages


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


def _shard_or_error(open_it: Callable[[Path], Shard], path: Path) -> Shard | RecordsError:
    """Return an opened shard, or why it cannot be opened."""
    try:
        return open_it(path)
    except RecordsError as error:
        return error


class RecordsFolder:
    """A records folder and its manifest. Positions number its records through all splits, in the manifest's order.

    Safe to share between threads; a bounded number of shards is kept open.

    Attributes:
        path: The folder.
        manifest: Its manifest.
        shards: (split, number in the split, files) of each shard, in the order of the records.
        records: Number of records in all splits.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Take a folder and a manifest that need not be written yet; :meth:`open` reads it from the folder."""
        self.path, self.manifest = path, manifest
        self.shards: list[tuple[str, int, ShardInfo]] = [
            (name, number, shard)
            for name, split in manifest.splits.items()
            for number, shard in enumerate(split.shards)
        ]
        self._starts = [0, *accumulate(shard.rows for _, _, shard in self.shards)]
        self.records = self._starts[-1]
        self._opened = lru_cache(maxsize=max(1, max_open_files() // 2))(open_shard)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a folder by its manifest.

        Raises:
            RecordsError: No such folder, no manifest in it, another format version, or a change of it was interrupted.
            IntegrityError: The manifest is damaged or was changed.
        """
        refuse_interrupted(path)
        return cls(path, load_manifest(path))

    def span(self, split: str) -> slice:
        """Return the positions of a split's records."""
        first = next((s for s, (name, _, _) in zip(self._starts, self.shards, strict=False) if name == split), 0)
        return slice(first, first + self.manifest.splits[split].images)

    def row(self, position: int) -> Row:
        """Return the record at a position; its parts are read on access."""
        place = bisect_right(self._starts, position) - 1
        split, number, shard = self.shards[place]
        opened = _shard_or_error(self._opened, self.path / shard.file)
        return Row(split, shard.file, number, position - self._starts[place], position, opened)

    def lines(self, split: str) -> Iterator[RecordLine]:
        """Read the record list of a split, in shard and row order.

        Raises:
            RecordsError: It cannot be read, a line is damaged, or it does not list the rows of the split's shards.
        """
        path = self.list_path(split)
        info = self.manifest.splits[split]
        expected = ((number, row) for number, shard in enumerate(info.shards) for row in range(shard.rows))
        count = 0
        for count, line in enumerate(read_lines(path), 1):
            if (line.shard, line.row) != next(expected, None):
                raise RecordsError(f"{path}: line {count} is not the record that is stored there")
            yield line
        if count != info.images:
            raise RecordsError(f"{path}: the record list is short", expected=f"{info.images} lines", got=str(count))

    def count_lines(self, split: str) -> int:
        """Return the number of lines in the record list of a split.

        Raises:
            RecordsError: The list cannot be read.
        """
        with opened_list(self.list_path(split)) as lines:
            return sum(1 for _ in lines)

    def index(self, split: str) -> ListIndex:
        """Index the record list of a split, to read any of its lines at once; raises as :meth:`count_lines`."""
        return ListIndex(self.list_path(split))

    def line(self, position: int, index: ListIndex) -> RecordLine:
        """Read the line of one record, by the index of its split's list; raises as :meth:`lines`."""
        row = self.row(position)
        row.listed = index.line(position - self.span(row.split).start)
        try:
            return row.line()
        except ValueError as error:
            raise RecordsError(f"{index.path}: the record list cannot be read", got=str(error)) from error

    def list_path(self, split: str) -> Path:
        """Return the path of a split's record list."""
        return self.path / str(self.manifest.splits[split].records["file"])

    def check_list(self, split: str) -> None:
        """Compare a split's record list with the digest in the manifest.

        Raises:
            RecordsError: It cannot be read.
            IntegrityError: It differs.
        """
        self._check_digest(self.manifest.splits[split].records, "the record list", RecordsError)

    def _check_digest(self, entry: dict[str, Any], what: str, unreadable: type[ImnetError]) -> None:
        path = self.path / str(entry["file"])
        try:
            got = file_digest(path)
        except OSError as error:
            raise unreadable(f"{path}: {what} cannot be read", got=error.strerror or str(error)) from error
        if got != entry["sha256"]:
            raise IntegrityError(
                f"{path}: {what} is not the manifest's",
                expected=f"SHA-256 {entry['sha256'][:12]}",
                got=got[:12],
                remedy="restore the file; `imnet-prep verify` names what else is damaged",
            )

    def list_is_whole(self, split: str) -> bool:
        """Return whether a split's record list has the digest in the manifest."""
        with suppress(RecordsError, IntegrityError):
            self.check_list(split)
            return True
        return False

    def table(self, split: str) -> RowTable:
        """Read what the loader needs to know of each record of a split.

        Raises:
            RecordsError: No such split; a shard, index or record list is missing or damaged, or they do not agree.
        """
        return load_rows(self.path, self.manifest, split)

    def reader(self, split: str, *, at_random: bool = False) -> RowReader:
        """Return a reader of the images of a split, and its table; raises as :meth:`table`.

        Args:
            split: The name of the split.
            at_random: Whether rows of all shards are read at a time, or those of a few.
        """
        return RowReader(self.table(split))

    def rejected(self) -> Iterator[Rejected]:
        """Read the list of images that were rejected when the folder was made.

        Raises:
            IntegrityError: The list cannot be read, or is not the manifest's.
            RecordsError: A line is damaged.
        """
        if path := self._rejected_path():
            yield from read_rejected(path)

    def index_rejected(self) -> RejectedIndex:
        """Index that list, to read any of its entries at once; raises as :meth:`rejected`."""
        return RejectedIndex(self._rejected_path())

    def _rejected_path(self) -> Path | None:
        if entry := self.manifest.rejected:
            self._check_digest(entry, "the list of rejected images", IntegrityError)
            return self.path / str(entry["file"])
        return None


_Chunk = tuple[int, Path, Row, int, list[bytes]]  # number, data file, first row, row count, lines (perhaps too few)


def _apply(function: Callable[[Row], Result], chunk: _Chunk, advance: Advance) -> tuple[int, list[Result]]:
    """Apply a function to the rows of a chunk, in a worker process."""
    number, path, first, count, listed = chunk
    opened = _shard_or_error(_open, path)
    results = []
    for place, line in zip(range(count), chain(listed, repeat(None)), strict=False):
        row = replace(first, row=first.row + place, position=first.position + place, shard_file=opened, listed=line)
        results.append(function(row))
        advance(1, row.size_bytes, 0)
    return number, results


def _apply_elsewhere(
    apply: Callable[[_Chunk, Advance], tuple[int, list[Result]]],
    folder: Path,
    digest: str,
    chunk: _Chunk,
    advance: Advance,
) -> tuple[int, list[Result]]:
    """Apply a function to the rows of a chunk on a Dask worker, which outlives the scan."""
    refuse_unseen(folder, digest)
    try:
        return apply(chunk, advance)
    finally:
        _open.cache_clear()  # the next scan may find other files


def refuse_unseen(folder: Path, digest: str) -> None:
    """Refuse to work on a Dask worker that does not see the folder of the command.

    Args:
        folder: The records folder.
        digest: SHA-256 (hex) of its manifest, as the command read it.

    Raises:
        RecordsError: Another folder is there, or none.
    """
    try:
        got = f"SHA-256 {file_digest(folder / MANIFEST)}"
    except OSError as error:
        got = error.strerror or str(error)
    if got != f"SHA-256 {digest}":
        raise RecordsError(
            f"Dask worker {this_worker()}: does not see {folder}",
            expected=f"a manifest of SHA-256 {digest}",
            got=got,
            remedy="mount the folder under the same path on every machine",
        )


def map_rows(
    folder: RecordsFolder,
    function: Callable[[Row], Result],
    workers: int | None,
    progress: ProgressCallback,
    *,
    lines: bool = False,
    unit: str = "images",
    scheduler: str | None = None,
) -> Generator[Result, None, None]:
    """Apply a function to every record and yield the results in stored order.

    Close the iterator (:func:`contextlib.closing`) if you do not read it to its end: that kills the local workers.

    Args:
        folder: The records.
        function: Takes a row; must be importable, as other processes run it. Whatever bytes are stored, only its own
            reads of the row raise.
        workers: Number of processes; by default one per usable core.
        progress: Called with the number of records and bytes.
        lines: Pass each row its line of the record list.
        unit: What the progress calls the records.
        scheduler: Address of a Dask scheduler whose workers see the folder under the same path; None for this machine.

    Raises:
        PlanError: A worker process was killed, or Dask cannot be used.
        RecordsError: A Dask worker does not see the folder.
    """

    def report(images: int, size: int, _bad: int) -> None:
        progress(Progress(min(images, folder.records), folder.records, unit, size))

    width = min(process_count(workers), -(-folder.records // CHUNK_ROWS))
    apply = partial(_apply, function)
    if scheduler is not None:
        apply = partial(_apply_elsewhere, apply, folder.path.absolute(), folder.manifest.digest)
    try:
        chunks = _chunks(folder, lines=lines)
        yield from chain.from_iterable(in_order(run_tasks(apply, chunks, width, scheduler, report, task=SCAN)))
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
            yield number, folder.path.absolute() / shard.file, row, count, list(islice(texts, count))
            number, position = number + 1, position + count


def _texts(path: Path) -> Iterator[bytes]:
    """Yield the lines of a record list as far as it can be read: the rows are scanned all the same."""
    with suppress(RecordsError), opened_list(path) as lines:
        yield from lines
