"""Indexes made again from their data files, and what is left of data files that were cut or damaged.

A shard of ours is a function of its rows, and the record list has each row's digest, label and name. So where every
image is still there, the whole shard comes back bit for bit, whatever else was damaged: header, scalar fields, index.
Where images are lost, the whole rows go into a new shard under the same name, and the damaged file is put aside.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from imnet_prep.errors import RecordsError
from imnet_prep.files import file_digest
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.mindrecord import index_path
from imnet_prep.records.publish import DAMAGED_FOLDER, Change, changing
from imnet_prep.records.record_list import RecordLine
from imnet_prep.records.salvage import find_images, open_in_place, rewrite_shard, salvage_rows, write_index_of
from imnet_prep.types import Progress, ProgressCallback, ShardInfo

STATES = INTACT, REBUILT, RESTORED, DAMAGED, SALVAGED, LOST = (
    "intact", "rebuilt", "restored", "damaged", "salvaged", "lost",
)  # fmt: skip
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardRepair:
    """What became of a shard.

    Attributes:
        file: Relative to the records folder.
        state: ``intact``; ``rebuilt`` (the index); ``restored`` (data file and index, bit for bit); ``damaged`` (bytes
            inside images changed; the data file stays as it is); ``salvaged`` (the whole rows, in a new data file);
            ``lost`` (nothing could be read).
        rows: Rows that are there now. expected: Rows that the manifest promises.
        exact: Data file and index have the manifest's digests.
        detail: One line for a person.
    """

    file: str
    state: str
    rows: int
    expected: int
    exact: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What became of a folder."""

    shards: tuple[ShardRepair, ...]

    @property
    def ok(self) -> bool:
        """Whether every data file and index is the manifest's now."""
        return all(shard.exact for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        states = [shard.state for shard in self.shards]
        return {
            "ok": self.ok,
            "shards": len(self.shards),
            **{state: states.count(state) for state in STATES},
            "rows": sum(shard.rows for shard in self.shards),
            "rows_lost": sum(shard.expected - shard.rows for shard in self.shards),
            "details": [asdict(shard) for shard in self.shards if shard.state != INTACT],
        }


def repair_index(records: Path, progress: ProgressCallback) -> RepairResult:
    """Make lost or damaged indexes again, and data files where all or some of their rows can be written again.

    Every byte of the shards is read. Each shard gets its new files before the next one is looked at.

    Args:
        records: The folder; its manifest must be whole.
        progress: Told of shards looked at.

    Raises:
        RecordsError: There is no such folder, it has no manifest, another command is changing it, or it cannot be
            written.
        IntegrityError: The manifest is damaged.
    """
    done: list[ShardRepair] = []
    with changing(records) as change:
        folder = RecordsFolder.open(records)
        whole = cache(folder.list_is_whole)
        for split, number, info in folder.shards:
            done.append(_repair(change, folder, split, number, info, whole))
            if done[-1].state != INTACT:
                _logger.info("%s: %s %s", info.file, done[-1].state, done[-1].detail)
            progress(Progress(len(done), len(folder.shards), "shards"))
    return RepairResult(tuple(done))


def _repair(
    change: Change, folder: RecordsFolder, name: str, number: int, info: ShardInfo, list_is_whole: Callable[[str], bool]
) -> ShardRepair:
    path, split = folder.path / info.file, folder.manifest.splits[name]
    got, why = _digest(path)
    indexed = _digest(index_path(path))[0] == info.index_sha256
    if got == info.sha256 and indexed:
        return ShardRepair(info.file, INTACT, info.rows, info.rows, True)
    if why:
        return _lost(info, why)
    if got == info.sha256:
        exact, detail = _make_index(change, path, info)
        return ShardRepair(info.file, REBUILT, info.rows, info.rows, exact, detail)
    first = sum(shard.rows for shard in split.shards[:number])
    lines = [*islice(folder.lines(name), first, first + info.rows)] if list_is_whole(name) else []
    ours = bool(folder.manifest.plan)
    shard = open_in_place(path, split, info, indexed=indexed)
    places = find_images(path, split, lines, shard)
    missing = [row for row in range(info.rows) if row not in places]
    if shard is not None and not (ours and lines and not missing):
        return _damaged(change, path, info, lines, missing, indexed=indexed)
    if not ours:
        return _clip(change, path, info)
    if not places:
        why = f"{split.records['file']} is damaged too: restore it first"
        return _lost(info, "no image in it is whole" if lines else why)
    made = change.stage(path)
    rewrite_shard(path, made, split, lines, places)
    exact = (file_digest(made), file_digest(index_path(made))) == (info.sha256, info.index_sha256)
    detail = "" if exact else "every row is there, and the file is not the manifest's bit for bit"
    if missing:
        detail = f"{_rows(missing, lines)} are lost; the damaged files are in {folder.path / DAMAGED_FOLDER}"
    _publish(change, [path, index_path(path)], keep=not exact)
    return ShardRepair(info.file, RESTORED if exact else SALVAGED, len(places), info.rows, exact, detail)


def _digest(path: Path) -> tuple[str, str]:
    """Return the SHA-256 of a file, or why there is none."""
    try:
        return file_digest(path), ""
    except FileNotFoundError:
        return "", "the data file is not there"
    except OSError as error:
        return "", f"the data file cannot be read: {error.strerror or error}"


def _lost(info: ShardInfo, why: str) -> ShardRepair:
    return ShardRepair(info.file, LOST, 0, info.rows, False, why)


def _rows(rows: Sequence[int], lines: Sequence[RecordLine]) -> str:
    names = ", ".join(lines[row].file_name for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
    return f"{len(rows)} rows ({names})"


def _publish(change: Change, places: Sequence[Path], *, keep: bool = False) -> None:
    """Put new files in place; ``keep`` the old ones aside, as is done with whatever is no file."""
    keep = keep or any(os.path.lexists(place) and not place.is_file() for place in places)
    change.publish(places, aside=change.folder / DAMAGED_FOLDER if keep else None)


def _make_index(change: Change, path: Path, info: ShardInfo) -> tuple[bool, str]:
    """Make the index again; return whether it is the manifest's, and what to say of it."""
    made = change.stage(path)
    try:
        write_index_of(path, made)
    except RecordsError as error:
        return False, f"the index cannot be made again: {error}"
    exact = file_digest(index_path(made)) == info.index_sha256
    _publish(change, [index_path(path)])
    return exact, "" if exact else "the index is made again, and is not the manifest's bit for bit"


def _damaged(
    change: Change, path: Path, info: ShardInfo, lines: Sequence[RecordLine], missing: Sequence[int], *,
    indexed: bool,
) -> ShardRepair:  # fmt: skip
    """Leave a data file as it is in which bytes changed, and every row still lies in its place."""
    verify = "`imnet-prep verify --level decode` lists them"
    detail = f"{_rows(missing, lines)} are damaged; {verify}" if lines and missing else f"bytes changed; {verify}"
    if not indexed:
        detail += "; " + (_make_index(change, path, info)[1] or "the index is made again")
    return ShardRepair(info.file, DAMAGED, info.rows, info.rows, False, detail)


def _clip(change: Change, path: Path, info: ShardInfo) -> ShardRepair:
    """Keep the rows before the damage of a file that others wrote, as its own pages say where they lie."""
    made = change.stage(path)
    try:
        rows = salvage_rows(path, made)
        write_index_of(made, made)
    except RecordsError as error:
        return _lost(info, str(error))
    _publish(change, [path, index_path(path)], keep=True)
    detail = f"{info.rows - rows} rows are lost; the damaged files are in {change.folder / DAMAGED_FOLDER}"
    return ShardRepair(info.file, SALVAGED, rows, info.rows, False, detail)
