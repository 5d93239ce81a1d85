"""Open a records folder for reading; all code reads records folders through this class."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from imnet_prep.errors import ImnetError, IntegrityError, RecordsError
from imnet_prep.files import file_digest, max_open_files
from imnet_prep.records.manifest import Manifest, load_manifest
from imnet_prep.records.mindrecord import open_shard
from imnet_prep.records.publish import refuse_interrupted
from imnet_prep.records.record_list import RecordLine, opened_list, read_lines, read_rejected
from imnet_prep.records.scan import Row
from imnet_prep.records.table import RowTable, load_rows
from imnet_prep.types import Rejected, ShardInfo


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
    def open(cls, path: Path) -> RecordsFolder:
        """Open a folder by its manifest.

        Raises:
            RecordsError: No such folder, no manifest in it, another format version, or a change of it was interrupted.
            IntegrityError: The manifest is damaged or was changed.
        """
        refuse_interrupted(path)
        return cls(path, load_manifest(path))

    def span(self, split: str) -> slice:
        """Return the positions of a split's records."""
        starts = (start for start, (name, _, _) in zip(self._starts, self.shards, strict=False) if name == split)
        first = next(starts, 0)
        return slice(first, first + self.manifest.splits[split].images)

    def row(self, position: int) -> Row:
        """Return the record at a position; its parts are read on access."""
        place = bisect_right(self._starts, position) - 1
        split, number, shard = self.shards[place]
        row = Row(split, shard.file, number, position - self._starts[place], position)
        try:
            row.shard_file = self._opened(self.path / shard.file)
        except RecordsError as error:
            row.shard_file = error
        return row

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

    def line(self, position: int) -> RecordLine:
        """Read the line of one record. It reads the list from its beginning: about a second per million records.

        Raises:
            RecordsError: The list cannot be read, or does not list the record there.
        """
        row = self.row(position)
        with opened_list(self.list_path(row.split)) as lines:
            row.listed = next(islice(lines, position - self.span(row.split).start, None), None)
            return row.line()

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

    def rejected(self) -> Iterator[Rejected]:
        """Read the list of images that were rejected when the folder was made.

        Raises:
            IntegrityError: The list cannot be read, or is not the manifest's.
            RecordsError: A line is damaged.
        """
        if entry := self.manifest.rejected:
            self._check_digest(entry, "the list of rejected images", IntegrityError)
            yield from read_rejected(self.path / str(entry["file"]))
