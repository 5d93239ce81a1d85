"""Is a records folder what its manifest says? Each level includes the ones before it.

``quick`` reads the manifest, sizes, headers and indexes; ``hash`` reads every byte. No level needs MindSpore.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.manifest import COLUMNS, MANIFEST, Manifest, SplitInfo, load_manifest
from imnet_prep.mindrecord import Header, RowIndex, index_path, read_header, read_index
from imnet_prep.types import Progress, ProgressCallback, ShardInfo

LEVELS = ("quick", "hash")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be.

    Attributes:
        kind: ``manifest``, ``missing``, ``unexpected``, ``size``, ``header``, ``index``, ``rows`` or ``digest``.
        file: Relative to the records folder.
        detail: One line for a person.
        row: The row in the shard, where it is about one. name: Its file_name.
    """

    kind: str
    file: str
    detail: str
    row: int | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a verification found; ``records`` is the number of records that the manifest promises."""

    level: str
    shards: int
    records: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Give the object that ``--json`` prints."""
        return {
            "ok": self.ok,
            "level": self.level,
            "shards": self.shards,
            "records": self.records,
            "problems": [asdict(problem) for problem in self.problems],
        }


def verify(records: Path, level: str, workers: int | None, progress: ProgressCallback) -> VerifyResult:
    """Compare a records folder with its manifest.

    Args:
        records: The folder.
        level: One of :data:`LEVELS`.
        workers: Files read at a time; one a usable core where None.
        progress: Told of bytes hashed.

    Raises:
        RecordsError: There is no such folder, it has no manifest, or the level is unknown.
    """
    if level not in LEVELS:
        raise RecordsError(f"unknown level {level!r}", expected=f"one of {', '.join(LEVELS)}")
    try:
        manifest = load_manifest(records)
    except IntegrityError as error:
        return VerifyResult(level, 0, 0, (Problem("manifest", MANIFEST, str(error)),))
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    problems = list(_unexpected(records, manifest))
    for name, split in manifest.splits.items():
        problems += _check_counts(name, split)
        for shard in split.shards:
            problems += _check_shard(records, split, shard)
    if level == "hash":
        problems += _check_digests(records, manifest, workers or len(os.sched_getaffinity(0)), progress)
    return VerifyResult(level, len(shards), sum(shard.rows for shard in shards), tuple(problems))


def _files(manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    """Name, size and digest of every file that the manifest lists."""
    for split in manifest.splits.values():
        yield split.records["file"], split.records["size_bytes"], split.records["sha256"]
        for shard in split.shards:
            yield shard.file, shard.size_bytes, shard.sha256
            yield index_path(Path(shard.file)).as_posix(), shard.index_size_bytes, shard.index_sha256


def _unexpected(records: Path, manifest: Manifest) -> Iterator[Problem]:
    """Shards that the manifest does not list would be read by whoever takes all files of the folder."""
    known = {name for name, _, _ in _files(manifest)}
    for path in sorted(records.glob("*/*")):
        name = path.relative_to(records).as_posix()
        if path.is_file() and name not in known:
            yield Problem("unexpected", name, "is not in the manifest")


def _check_counts(name: str, split: SplitInfo) -> Iterator[Problem]:
    rows = sum(shard.rows for shard in split.shards)
    if rows != split.images:
        yield Problem("manifest", MANIFEST, f"split {name}: {split.images} images, but its shards have {rows} rows")
    if split.found != split.images + sum(split.rejected.values()):
        yield Problem("manifest", MANIFEST, f"split {name}: found {split.found} is not images + rejected")
    labelled = sum(split.class_counts)
    if labelled != split.images and not (name == "test" and labelled == 0):
        yield Problem("manifest", MANIFEST, f"split {name}: {split.images} images, but class_counts add to {labelled}")


def _check_shard(records: Path, split: SplitInfo, shard: ShardInfo) -> list[Problem]:
    """Sizes first: a file of another size is not opened."""
    index = index_path(Path(shard.file)).as_posix()
    wrong = [
        problem
        for name, size in ((shard.file, shard.size_bytes), (index, shard.index_size_bytes))
        if (problem := check_size(records, name, size)) is not None
    ]
    if any(problem.file == shard.file for problem in wrong):
        return wrong
    try:
        header = read_header(records / shard.file)
    except RecordsError as error:
        return [*wrong, Problem("header", shard.file, str(error))]
    wrong += _check_header(split, shard, header)
    if any(problem.file == index for problem in wrong):
        return wrong
    try:
        rows = read_index(records / shard.file, header)
    except RecordsError as error:
        return [*wrong, Problem("index", index, str(error))]
    return [*wrong, *_check_index(shard, index, header, rows)]


def check_size(records: Path, name: str, size: int) -> Problem | None:
    """Give the problem with a file's existence or size, if any."""
    path = records / name
    if not path.is_file():
        return Problem("missing", name, "is not there")
    got = path.stat().st_size
    return None if got == size else Problem("size", name, f"expected {size} bytes, got {got}")


def _check_header(split: SplitInfo, shard: ShardInfo, header: Header) -> Iterator[Problem]:
    for what, expected, got in (
        ("rows", shard.rows, header.rows),
        ("header_size", split.header_size, header.header_size),
        ("page_size", split.page_size, header.page_size),
        ("columns", COLUMNS, header.fields),
        ("file name", (Path(shard.file).name,), header.addresses),
    ):
        if expected != got:
            yield Problem("header", shard.file, f"{what}: expected {expected}, got {got}")
    end = max((header.offset(page.page_id) + page.used_bytes for page in header.pages), default=0)
    if end != shard.size_bytes:
        yield Problem("header", shard.file, f"pages end at byte {end}, the file at {shard.size_bytes}")


def _check_index(shard: ShardInfo, index: str, header: Header, rows: RowIndex) -> Iterator[Problem]:
    if len(rows) != shard.rows:
        yield Problem("rows", index, f"expected {shard.rows} rows, got {len(rows)}")
        return
    for starts, ends in ((rows.raw_start, rows.raw_end), (rows.blob_start, rows.blob_end)):
        pages = (starts - header.header_size) // header.page_size
        first = np.flatnonzero(np.diff(pages, prepend=-1))
        follows = starts == np.concatenate([[0], ends[:-1]])
        follows[first] = (starts[first] - header.header_size) % header.page_size == 0
        wrong = np.flatnonzero(~follows | (ends <= starts) | (ends > shard.size_bytes))
        if len(wrong):
            yield Problem("index", index, "does not lie where the row before it ends", int(wrong[0]))


def _check_digests(records: Path, manifest: Manifest, workers: int, progress: ProgressCallback) -> list[Problem]:
    there = [(name, size, digest) for name, size, digest in _files(manifest) if (records / name).is_file()]
    total = sum(size for _, size, _ in there)
    problems: list[Problem] = []
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(_digest_problem, records, name, digest): size for name, size, digest in there}
        for job in as_completed(jobs):
            done += jobs[job]
            progress(Progress(done, total, "bytes"))
            if (problem := job.result()) is not None:
                problems.append(problem)
    return sorted(problems, key=lambda problem: problem.file)


def _digest_problem(records: Path, name: str, expected: str) -> Problem | None:
    try:
        got = file_digest(records / name)
    except OSError as error:
        return Problem("digest", name, f"cannot be read: {error}")
    return None if got == expected else Problem("digest", name, f"expected SHA-256 {expected[:12]}, got {got[:12]}")
