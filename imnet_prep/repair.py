"""Indexes made again from their data files, and what is left of data files that were cut or damaged.

A shard of ours is a function of its rows, and the record list has each row's digest, label and name. So where every
image is still there, the whole shard comes back bit for bit, whatever else was damaged: header, scalar fields, index.
Where images are lost, the whole rows go into a new shard under the same name, and the damaged file is put aside.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imnet_prep.errors import RecordsError
from imnet_prep.files import file_digest, sync
from imnet_prep.records.index import write_index_of
from imnet_prep.records.manifest import Manifest, SplitInfo, load_manifest
from imnet_prep.records.mindrecord import LENGTH, index_path
from imnet_prep.records.salvage import clip_to_whole_rows
from imnet_prep.records.shards import Layout, ShardWriter
from imnet_prep.types import Progress, ProgressCallback, ShardInfo
from imnet_prep.verify import check_shard

DAMAGED = ".damaged"  # where files that were replaced are kept
INTACT, REBUILT, RESTORED, SALVAGED, LOST = "intact", "rebuilt", "restored", "salvaged", "lost"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardRepair:
    """What became of a shard.

    Attributes:
        file: Relative to the records folder.
        state: ``intact``; ``rebuilt`` (the index); ``restored`` (data file and index, bit for bit); ``salvaged`` (the
            whole rows, in a new data file); ``lost`` (nothing could be read).
        rows: Rows that are there now. expected: Rows that the manifest promises.
        exact: The index has the manifest's digest (and so does a data file that was written).
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
        """Whether every index is the manifest's now, and nothing was lost."""
        return all(shard.exact for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Give the object that ``--json`` prints."""
        states = [shard.state for shard in self.shards]
        return {
            "ok": self.ok,
            "shards": len(self.shards),
            **{state: states.count(state) for state in (INTACT, REBUILT, RESTORED, SALVAGED, LOST)},
            "rows": sum(shard.rows for shard in self.shards),
            "rows_lost": sum(shard.expected - shard.rows for shard in self.shards),
            "details": [asdict(shard) for shard in self.shards if shard.state != INTACT],
        }


def repair_index(records: Path, progress: ProgressCallback) -> RepairResult:
    """Make lost or damaged indexes again, and data files where they were cut or damaged so that they do not open.

    A flipped bit inside an image is not looked for: that takes reading every byte, and ``verify`` does it.

    Args:
        records: The folder; its manifest must be whole.
        progress: Told of shards looked at.

    Raises:
        RecordsError: There is no such folder, or it has no manifest.
        IntegrityError: The manifest is damaged.
        OSError: The disk is full or fails.
    """
    manifest = load_manifest(records)
    total = sum(len(split.shards) for split in manifest.splits.values())
    done: list[ShardRepair] = []
    for name, split in manifest.splits.items():
        for number, shard in enumerate(split.shards):
            repaired = _repair(records, manifest, name, number)
            if repaired.state != INTACT:
                _logger.info("%s: %s %s", shard.file, repaired.state, repaired.detail)
            done.append(repaired)
            progress(Progress(len(done), total, "shards"))
    return RepairResult(tuple(done))


def _repair(records: Path, manifest: Manifest, name: str, number: int) -> ShardRepair:
    split = manifest.splits[name]
    shard = split.shards[number]
    path = records / shard.file
    problems = check_shard(records, manifest, split, shard)
    if not problems and file_digest(index_path(path)) == shard.index_sha256:
        return ShardRepair(shard.file, INTACT, shard.rows, shard.rows, True)
    if not path.is_file():
        return ShardRepair(shard.file, LOST, 0, shard.rows, False, "the data file is not there")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".repair-") as folder:
        if all(problem.file != shard.file for problem in problems):
            found = _rebuild(path, shard, Path(folder))
            if found is not None and (found.exact or not manifest.plan):
                return found
        if manifest.plan:
            return _rewrite(records, split, number, Path(folder))
        return _clip(records, shard, Path(folder))


def _rebuild(path: Path, shard: ShardInfo, folder: Path) -> ShardRepair | None:
    """Make the index again; it is put in place where it is the manifest's, or where the files are not ours."""
    try:
        made = write_index_of(path, folder)
    except RecordsError as error:
        _logger.info("%s", error)
        return None
    exact = file_digest(made) == shard.index_sha256
    adopted = "" if exact else "its digest is not the manifest's: other writers' indexes are not made bit for bit"
    found = ShardRepair(shard.file, REBUILT, shard.rows, shard.rows, exact, adopted)
    if exact or adopted:
        os.replace(made, index_path(path))
        sync(path.parent)
    return found


# --- our own shards, by the record list ------------------------------------------------------------------------------


def _rewrite(records: Path, split: SplitInfo, number: int, folder: Path) -> ShardRepair:
    """Write the shard again from the images that are still whole."""
    shard = split.shards[number]
    path = records / shard.file
    lines = _lines(records, split, number)
    if lines is None:
        detail = f"{split.records['file']} is damaged too: restore it first"
        return ShardRepair(shard.file, LOST, 0, shard.rows, False, detail)
    places = _find_images(path, split, lines)
    if not places:
        return ShardRepair(shard.file, LOST, 0, shard.rows, False, "no image in it is whole")
    made = folder / path.name
    writer = ShardWriter(made, Layout(split.header_size, split.page_size))
    try:
        with path.open("rb") as file:
            for row in sorted(places):
                start, size = places[row]
                image = os.pread(file.fileno(), size, start)
                writer.add(image, lines[row]["label"], lines[row]["file_name"])
        writer.finish()
    finally:
        writer.close()
    sync(made)
    exact = (file_digest(made), file_digest(index_path(made))) == (shard.sha256, shard.index_sha256)
    missing = [row for row in range(shard.rows) if row not in places]
    detail = "" if exact else _words(records, missing, lines)
    _replace(records, path, made, keep=not exact)
    state = RESTORED if exact else SALVAGED
    return ShardRepair(shard.file, state, len(places), shard.rows, exact, detail)


def _words(records: Path, missing: list[int], lines: list[dict[str, Any]]) -> str:
    if not missing:
        return "every row is there, and the file is not the manifest's bit for bit"
    names = ", ".join(str(lines[row]["file_name"]) for row in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return f"{len(missing)} rows are lost ({names}); the damaged files are in {records / DAMAGED}"


def _lines(records: Path, split: SplitInfo, number: int) -> list[dict[str, Any]] | None:
    """Give the record list's lines of a shard, or None where the list is not what the manifest says."""
    path = records / str(split.records["file"])
    try:
        if file_digest(path) != split.records["sha256"]:
            return None
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [line for line in map(json.loads, file) if line["shard"] == number]
    except (OSError, EOFError, ValueError, zlib.error):
        return None


def _find_images(path: Path, split: SplitInfo, lines: list[dict[str, Any]]) -> dict[int, tuple[int, int]]:
    """Find whole images by their digests, whatever the header says: (first byte, bytes) by row.

    Pages begin at known places and hold one length and image after the other, so a damaged length costs at most the
    rest of its page.
    """
    waiting: dict[str, list[int]] = {}
    for row, line in reversed(list(enumerate(lines))):
        waiting.setdefault(line["sha256"], []).append(row)
    found: dict[int, tuple[int, int]] = {}
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for page in range(split.header_size, size, split.page_size):
            for start, digest, length in _parts(file.fileno(), page, min(page + split.page_size, size)):
                if rows := waiting.get(digest):
                    found[rows.pop()] = (start, length)
    return found


def _parts(descriptor: int, start: int, end: int) -> Iterator[tuple[int, str, int]]:
    """Give place, SHA-256 and size of each part of a page that is preceded by its length."""
    while start + LENGTH.size < end:
        length = LENGTH.unpack(os.pread(descriptor, LENGTH.size, start))[0]
        start += LENGTH.size
        if not 0 < length <= end - start:
            return
        yield start, hashlib.sha256(os.pread(descriptor, length, start)).hexdigest(), length
        start += length


# --- adopted shards --------------------------------------------------------------------------------------------------


def _clip(records: Path, shard: ShardInfo, folder: Path) -> ShardRepair:
    """Keep the rows before the damage, as the file's own pages give them."""
    path = records / shard.file
    try:
        rows = clip_to_whole_rows(path, folder / path.name)
        write_index_of(folder / path.name, folder)
    except RecordsError as error:
        return ShardRepair(shard.file, LOST, 0, shard.rows, False, str(error))
    _replace(records, path, folder / path.name, keep=True)
    detail = f"{shard.rows - rows} rows are lost; the damaged files are in {records / DAMAGED}"
    return ShardRepair(shard.file, SALVAGED, rows, shard.rows, False, detail)


def _replace(records: Path, path: Path, made: Path, *, keep: bool) -> None:
    """Put a new data file and index in place; ``keep`` the old ones aside, but never over those kept before."""
    for new, old in ((made, path), (index_path(made), index_path(path))):
        aside = records / DAMAGED / old.relative_to(records)
        if keep and old.is_file() and not aside.exists():
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(old, aside)
            sync(aside.parent)
        os.replace(new, old)
    sync(path.parent)
