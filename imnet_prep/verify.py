"""Is a records folder what its manifest says? Each level includes the ones before it.

``quick`` reads the manifest, sizes, headers and indexes; ``hash`` reads every byte; ``decode`` looks at every record
(:mod:`imnet_prep.verify_rows`) and for duplicates. No level needs MindSpore. Nothing on the disk makes it raise: what
cannot be read is a problem like any other.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.problems import Problem
from imnet_prep.records.manifest import MANIFEST, Manifest, SplitInfo, load_manifest
from imnet_prep.records.mindrecord import Header, RowIndex, index_path, read_header, read_index
from imnet_prep.types import Progress, ProgressCallback, ShardInfo
from imnet_prep.verify_counts import check_counts, check_expectation, check_rejected
from imnet_prep.workers import process_count, run_processes

if TYPE_CHECKING:
    from imnet_prep.verify_rows import RowsTask

LEVELS = ("quick", "hash", "decode")
WITHHELD = ("shards", "records")
CHUNK_ROWS = 512  # a task: some seconds of photographs, and a few hundred kB of record lines
MAX_PROBLEMS = 10_000  # that are kept; a folder of a million bad rows must not fill the memory


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a verification found.

    Attributes:
        level: As asked.
        shards: Shards that the manifest lists. records: Records that it promises.
        problems: What is wrong; past 10,000 the last one says how many more there are.
        warnings: What one should know: duplicates. They leave the folder ``ok``.
    """

    level: str
    shards: int
    records: int
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()

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
            "warnings": [asdict(warning) for warning in self.warnings],
        }


def verify(
    records: Path,
    level: str,
    workers: int | None,
    progress: ProgressCallback,
    expect: str | None = None,
    withhold: Collection[str] = (),
) -> VerifyResult:
    """Compare a records folder with its manifest.

    Args:
        records: The folder.
        level: One of :data:`LEVELS`.
        workers: Files hashed, or processes that decode, at a time; one a usable core where None.
        progress: Told of bytes hashed and of images decoded.
        expect: ``ilsvrc2012`` to compare the counts with those published; they are compared anyway where official
            archives were converted whole.
        withhold: Digests not to look at (:data:`WITHHELD`), to see what the rest finds: those of ``shards`` and of
            other files, or those of ``records`` (and with them the whole record list).

    Raises:
        RecordsError: There is no such folder, it has no manifest, or a name is unknown.
        PlanError: A worker process was killed.
    """
    if level not in LEVELS:
        raise RecordsError(f"unknown level {level!r}", expected=f"one of {', '.join(LEVELS)}")
    try:
        manifest = load_manifest(records)
    except (IntegrityError, RecordsError) as error:
        if not (records / MANIFEST).is_file():
            raise
        return VerifyResult(level, 0, 0, (Problem("manifest", MANIFEST, str(error)),))
    problems = [*check_expectation(manifest, expect), *_check_quick(records, manifest)]
    width = process_count(workers)
    if level != "quick" and "shards" not in withhold:
        problems += _check_digests(records, manifest, width, progress)
    warnings: list[Problem] = []
    if level == "decode":
        from imnet_prep.verify_duplicates import find_duplicates  # with OpenCV, which the other levels do without

        found, prints = _check_rows(records, manifest, width, progress, digests="records" not in withhold)
        problems += found
        unique, warnings = find_duplicates(records, manifest, prints)
        problems += unique
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return VerifyResult(level, len(shards), sum(s.rows for s in shards), _bounded(problems), tuple(warnings))


def _bounded(problems: list[Problem]) -> tuple[Problem, ...]:
    # The header and the index are looked at more than once; what was said once is enough.
    once = list(dict.fromkeys(problems))
    if len(once) <= MAX_PROBLEMS:
        return tuple(once)
    more = len(once) - MAX_PROBLEMS
    return (*once[:MAX_PROBLEMS], Problem(once[-1].kind, once[-1].file, f"{more} more problems are not listed"))


def _check_quick(records: Path, manifest: Manifest) -> Iterator[Problem]:
    yield from _unexpected(records, manifest)
    yield from check_rejected(records, manifest)
    if manifest.rejected and (problem := check_size(records, *_name_and_size(manifest.rejected))) is not None:
        yield problem
    for name, split in manifest.splits.items():
        yield from check_counts(name, split)
        if (problem := check_size(records, *_name_and_size(split.records))) is not None:
            yield problem
        for shard in split.shards:
            yield from check_shard(records, manifest, split, shard)


def _name_and_size(entry: dict[str, Any]) -> tuple[str, int]:
    return entry["file"], entry["size_bytes"]


def _files(manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    """Name, size and digest of every file that the manifest lists."""
    if manifest.rejected:
        yield manifest.rejected["file"], manifest.rejected["size_bytes"], manifest.rejected["sha256"]
    for split in manifest.splits.values():
        yield split.records["file"], split.records["size_bytes"], split.records["sha256"]
        for shard in split.shards:
            yield shard.file, shard.size_bytes, shard.sha256
            yield index_path(Path(shard.file)).as_posix(), shard.index_size_bytes, shard.index_sha256


def _unexpected(records: Path, manifest: Manifest) -> Iterator[Problem]:
    """Shards that the manifest does not list would be read by whoever takes all files of the folder."""
    known = {name for name, _, _ in _files(manifest)}
    for path in sorted([*records.glob("*/*"), *records.glob("*.mindrecord*")]):
        name = path.relative_to(records).as_posix()
        if path.is_file() and name not in known and not _has_no_rows(path):
            yield Problem("unexpected", name, "is not in the manifest")


def check_shard(records: Path, manifest: Manifest, split: SplitInfo, shard: ShardInfo) -> list[Problem]:
    """Compare sizes, header and index of a shard with the manifest and with each other, without reading its rows.

    Sizes first: a file of another size is not opened.
    """
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
    wrong += _check_header(manifest, split, shard, header)
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


def _has_no_rows(path: Path) -> bool:
    """Whether it is a data file without a row, or the index of one, as ImageNetToMR leaves them."""
    data = path.with_suffix("") if path.suffix == ".db" else path
    try:
        return not read_header(data).pages
    except RecordsError:
        return False


def _check_header(manifest: Manifest, split: SplitInfo, shard: ShardInfo, header: Header) -> Iterator[Problem]:
    for what, expected, got in (
        ("rows", shard.rows, header.rows),
        ("header_size", split.header_size, header.header_size),
        ("page_size", split.page_size, header.page_size),
        ("columns", manifest.columns, header.fields),
        (
            "bytes columns",
            {name for name, kind in manifest.columns.items() if kind == "bytes"},
            set(header.blob_fields),
        ),
        ("indexed columns", True, set(header.index_fields) <= set(manifest.columns)),
        ("file name", True, Path(shard.file).name in header.addresses),
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


def _check_rows(
    records: Path, manifest: Manifest, workers: int, progress: ProgressCallback, *, digests: bool
) -> tuple[list[Problem], NDArray[np.uint64]]:
    """Look at every record, in worker processes.

    Returns:
        The problems, in stored order, and uint64 (records, 4): see :class:`~imnet_prep.verify_rows.RowsResult`.
    """
    from imnet_prep.verify_rows import check_rows

    total = sum(shard.rows for split in manifest.splits.values() for shard in split.shards)
    prints = np.zeros((total, 4), np.uint64)
    counts = {name: np.zeros(len(split.class_counts), np.int64) for name, split in manifest.splits.items()}
    found: dict[int, tuple[Problem, ...]] = {}
    lists: list[Problem] = []

    def report(images: int, size: int, wrong: int) -> None:
        progress(Progress(min(images, total), total, "images", size, (("problems", wrong),)))

    tasks = _tasks(records, manifest, lists, digests=digests)
    for result in run_processes(check_rows, tasks, min(workers, -(-total // CHUNK_ROWS)), report):
        prints[result.position : result.position + len(result.prints)] = result.prints
        labelled = result.labels[(result.labels >= 0) & (result.labels < len(counts[result.split]))]
        np.add.at(counts[result.split], labelled, 1)
        if result.problems and sum(map(len, found.values())) <= MAX_PROBLEMS:
            found[result.position] = result.problems
    problems = lists + [problem for position in sorted(found) for problem in found[position]]
    for name, split in manifest.splits.items():
        wrong = np.flatnonzero(counts[name] != np.array(split.class_counts, np.int64))
        if len(wrong):
            label = int(wrong[0])
            detail = f"split {name}: {len(wrong)} class counts are not those of the records; label {label}: "
            detail += f"expected {split.class_counts[label]}, got {counts[name][label]}"
            problems.append(Problem("counts", MANIFEST, detail))
    return problems, prints


def _tasks(records: Path, manifest: Manifest, problems: list[Problem], *, digests: bool) -> Iterator[RowsTask]:
    """Cut the shards into tasks; read the record lists on the way, and append what is wrong with them."""
    from imnet_prep.verify_rows import BASE, EQUAL, RowsTask

    position = 0
    for name, split in manifest.splits.items():
        file = str(split.records["file"])
        lines = _Lines(records / file) if digests else None
        for number, shard in enumerate(split.shards):
            for first in range(0, shard.rows, CHUNK_ROWS):
                count = min(CHUNK_ROWS, shard.rows - first)
                yield RowsTask(
                    path=records / shard.file,
                    file=shard.file,
                    split=name,
                    shard=number,
                    first=first,
                    count=count,
                    position=position,
                    lines=None if lines is None else lines.take(count),
                    classes=manifest.classes,
                    names=EQUAL if manifest.plan else str(manifest.options.get("names", {}).get(name, BASE)),
                    digests=digests,
                )
                position += count
        if lines is not None and (error := lines.finish()):
            problems.append(Problem("records", file, error))


class _Lines:
    """The lines of a record list, a few at a time; where it breaks off, none."""

    def __init__(self, path: Path) -> None:
        self._error, self._number, self._asked = "", 0, 0
        try:
            self._file = gzip.open(path, "rb")  # noqa: SIM115 - closed in finish
        except OSError as error:
            self._error = str(error)

    def take(self, count: int) -> tuple[bytes, ...] | None:
        """Give the next lines, or None where they cannot be read."""
        self._asked += count
        if self._error:
            return None
        try:
            lines = tuple(islice(self._file, count))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            self._error = f"damaged after line {self._number}: {error}"
            return None
        self._number += len(lines)
        if len(lines) < count:
            self._error = f"expected {self._asked} lines or more, got {self._number}"
            return None
        return lines

    def finish(self) -> str:
        """Close it, and say what is wrong with it, if anything."""
        if not self._error:
            more = self.take(1)
            self._error = "" if self._number == self._asked - 1 and more is None else "more lines than records"
        if hasattr(self, "_file"):
            self._file.close()
        return self._error


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
