"""Write damaged indexes again from their data files, and recover data files that are cut off or damaged.

The bytes of our own shards depend only on their rows, and the record list has each row's digest, label and name. So if
every image is still there, the whole shard is restored bit for bit, whatever else is damaged: header, scalar fields or
index. If images are lost, the whole rows go into a new shard of the same name, and the damaged file is moved aside.
"""

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
    """The result of repairing a shard.

    Attributes:
        file: Path relative to the records folder.
        state: ``intact``; ``rebuilt`` (the index); ``restored`` (data file and index, bit for bit); ``damaged`` (bytes
            inside images changed; the data file is unchanged); ``salvaged`` (the whole rows, in a new data file);
            ``lost`` (nothing could be read).
        rows: Number of rows now. expected: Number of rows in the manifest.
        exact: Whether data file and index have the digests in the manifest.
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
    """The result of repairing a folder."""

    shards: tuple[ShardRepair, ...]

    @property
    def ok(self) -> bool:
        """Whether every data file and index now has the digest in the manifest."""
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
    """Write lost or damaged indexes again, and data files of which all or some rows can be recovered.

    Every byte of the shards is read. The new files of a shard are published before the next shard is read.

    Args:
        records: The folder; its manifest must be intact.
        progress: Called with the number of shards done.

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
        exact, detail = _rewrite_index(change, path, info)
        return ShardRepair(info.file, REBUILT, info.rows, info.rows, exact, detail)
    first = sum(shard.rows for shard in split.shards[:number])
    lines = [*islice(folder.lines(name), first, first + info.rows)] if list_is_whole(name) else []
    ours = bool(folder.manifest.plan)
    shard = open_in_place(path, split, info, indexed=indexed)
    places, in_place = find_images(path, split, lines, shard), shard is not None
    del shard  # closes it: Windows replaces no open file
    missing = [row for row in range(info.rows) if row not in places]
    if in_place and not (ours and lines and not missing):
        return _damaged(change, path, info, lines, missing, indexed=indexed)
    if not ours:
        return _salvage(change, path, info)
    if not places:
        return _lost(
            info, "no image in it is whole" if lines else f"{split.records['file']} is damaged too: restore it first"
        )
    made = change.stage(path)
    rewrite_shard(path, made, split, lines, places)
    exact = (file_digest(made), file_digest(index_path(made))) == (info.sha256, info.index_sha256)
    detail = "" if exact else "every row is there, but the file is not bit for bit the manifest's"
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
    """Publish new files; move the old ones aside if ``keep``, or if one is not a regular file."""
    keep = keep or any(os.path.lexists(place) and not place.is_file() for place in places)
    change.publish(places, aside=change.folder / DAMAGED_FOLDER if keep else None)


def _rewrite_index(change: Change, path: Path, info: ShardInfo) -> tuple[bool, str]:
    """Write the index again; return whether it has the digest in the manifest, and a detail if not."""
    made = change.stage(path)
    try:
        write_index_of(path, made)
    except RecordsError as error:
        return False, f"the index cannot be written again: {error}"
    exact = file_digest(index_path(made)) == info.index_sha256
    _publish(change, [index_path(path)])
    return exact, "" if exact else "the index is written again, but is not bit for bit the manifest's"


def _damaged(
    change: Change, path: Path, info: ShardInfo, lines: Sequence[RecordLine], missing: Sequence[int], *,
    indexed: bool,
) -> ShardRepair:  # fmt: skip
    """Report a data file in which bytes changed but every row is still in its place; write a damaged index again."""
    verify = "`imnet-prep verify --level decode` lists them"
    detail = f"{_rows(missing, lines)} are damaged; {verify}" if lines and missing else f"bytes changed; {verify}"
    if not indexed:
        detail += "; " + (_rewrite_index(change, path, info)[1] or "the index is written again")
    return ShardRepair(info.file, DAMAGED, info.rows, info.rows, False, detail)


def _salvage(change: Change, path: Path, info: ShardInfo) -> ShardRepair:
    """Keep the rows before the damage in a file of another writer, as its pages locate them."""
    made = change.stage(path)
    try:
        rows = salvage_rows(path, made)
        write_index_of(made, made)
    except RecordsError as error:
        return _lost(info, str(error))
    _publish(change, [path, index_path(path)], keep=True)
    detail = f"{info.rows - rows} rows are lost; the damaged files are in {change.folder / DAMAGED_FOLDER}"
    return ShardRepair(info.file, SALVAGED, rows, info.rows, False, detail)
