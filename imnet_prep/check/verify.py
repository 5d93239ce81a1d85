"""Is a records folder what its manifest says? Each level includes the ones before it.

``quick`` reads the manifest, sizes, headers and indexes; ``hash`` reads every byte; ``decode`` looks at every record
(:mod:`imnet_prep.check.rows`) and for duplicates. No level needs MindSpore. Nothing on the disk makes it raise: what
cannot be read is a problem like any other.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.check.counts import check_expectation, check_rejected
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.process_pool import process_count
from imnet_prep.records.check import (
    check_list,
    check_rows_of_index,
    check_shard,
    check_size,
    check_unlisted,
    listed_files,
)
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import MANIFEST, MIN_ROW_BYTES
from imnet_prep.records.problems import Problem
from imnet_prep.records.scan import map_rows
from imnet_prep.types import Progress, ProgressCallback

LEVELS = ("quick", "hash", "decode")
WITHHELD = ("shards", "records")
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
        """Return the object that ``--json`` prints."""
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
    width = process_count(workers)
    try:
        folder = RecordsFolder.open(records)
    except (IntegrityError, RecordsError) as error:
        if not os.path.lexists(records / MANIFEST):
            raise
        return VerifyResult(level, 0, 0, (Problem("manifest", MANIFEST, str(error)),))
    problems = [*check_expectation(folder.manifest, expect), *_check_quick(folder)]
    if level != "quick" and "shards" not in withhold:
        problems += _check_digests(folder, width, progress)
    warnings: list[Problem] = []
    hidden = 0
    if level == "decode" and _can_hold_its_rows(folder):
        from imnet_prep.check.near_duplicates import find_duplicates  # with OpenCV, which the other levels do without

        lines = "records" not in withhold
        rows = _check_rows(folder, width, progress, lines=lines)
        twice, warnings = find_duplicates(folder, rows.prints)
        problems += [*_check_agreement(folder, rows, lines=lines), *twice, *rows.problems]
        hidden = rows.number - len(rows.problems)
    return VerifyResult(level, len(folder.shards), folder.records, _bounded(problems, hidden), tuple(warnings))


def _bounded(problems: list[Problem], hidden: int) -> tuple[Problem, ...]:
    once = list(dict.fromkeys(problems))
    hidden += len(once[MAX_PROBLEMS:])
    if hidden:
        once[MAX_PROBLEMS:] = [Problem(once[-1].kind, once[-1].file, f"{hidden} more problems are not listed")]
    return tuple(once)


def _check_quick(folder: RecordsFolder) -> Iterator[Problem]:
    path, manifest = folder.path, folder.manifest
    yield from check_unlisted(path, manifest)
    yield from check_rejected(folder)
    for split in manifest.splits.values():
        if problem := check_size(path, str(split.records["file"]), split.records["size_bytes"]):
            yield problem
        for shard in split.shards:
            yield from check_shard(path, manifest, split, shard)


def _can_hold_its_rows(folder: RecordsFolder) -> bool:
    """Tell a manifest that claims more rows than the shards on the disk could hold; their sizes are problems already.

    It must not make the scan go through 10^18 rows.
    """
    paths = [folder.path / shard.file for _, _, shard in folder.shards]
    there = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
    return folder.records * MIN_ROW_BYTES <= there


@dataclass(slots=True)
class _Rows:
    """What was found in the rows.

    Attributes:
        prints: uint64 (records, 4), see :class:`~imnet_prep.check.rows.Checked`.
        labels: int32 (records,). listed: bool (records,), likewise.
        problems: In stored order, the first 10,000. number: Of all of them.
    """

    prints: NDArray[np.uint64]
    labels: NDArray[np.int32]
    listed: NDArray[np.bool_]
    problems: list[Problem] = field(default_factory=list)
    number: int = 0


def _check_rows(folder: RecordsFolder, workers: int, progress: ProgressCallback, *, lines: bool) -> _Rows:
    """Look at every record, in worker processes."""
    from imnet_prep.check.rows import BASE, EQUAL, check_row

    manifest, total = folder.manifest, folder.records
    names = dict.fromkeys(manifest.splits, EQUAL if manifest.plan else BASE)
    if isinstance(adopted := manifest.options.get("names"), dict):
        names |= adopted
    check = partial(check_row, classes=manifest.classes, names=names)
    found = _Rows(np.zeros((total, 4), np.uint64), np.zeros(total, np.int32), np.zeros(total, bool))

    def report(state: Progress) -> None:
        progress(replace(state, counts=(("problems", found.number),)))

    with closing(map_rows(folder, check, workers, report, lines=lines)) as rows:
        for place, row in enumerate(rows):
            found.labels[place], found.prints[place], found.listed[place] = row.label, row.prints, row.listed
            found.number += len(row.problems)
            found.problems += row.problems[: max(0, MAX_PROBLEMS - len(found.problems))]
    return found


def _check_agreement(folder: RecordsFolder, rows: _Rows, *, lines: bool) -> Iterator[Problem]:
    """Compare the rows with the indexes, the manifest's counts and the record lists."""
    places = accumulate((shard.rows for _, _, shard in folder.shards), initial=0)
    for first, (_, _, shard) in zip(places, folder.shards, strict=False):
        yield from check_rows_of_index(folder.path, shard, rows.labels[first : first + shard.rows])
    for name, split in folder.manifest.splits.items():
        span = folder.span(name)
        labels = rows.labels[span]
        counts = np.bincount(labels[labels >= 0], minlength=len(split.class_counts))
        wrong = np.flatnonzero(counts != split.class_counts)
        if len(wrong):
            label = int(wrong[0])
            detail = f"split {name}: {len(wrong)} class counts are not those of the records; label {label}: "
            detail += f"expected {split.class_counts[label]}, got {counts[label]}"
            yield Problem("counts", MANIFEST, detail)
        if lines:
            yield from check_list(folder, name, looked_at=bool(rows.listed[span].all()))


def _check_digests(folder: RecordsFolder, workers: int, progress: ProgressCallback) -> list[Problem]:
    files = [file for file in listed_files(folder.manifest) if os.path.isfile(folder.path / file[0])]
    done, total = 0, sum(size for _, size, _ in files)
    problems: list[Problem] = []
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(partial(_digest_problem, folder.path), files)
        for (_, size, _), problem in zip(files, found, strict=True):
            problems += filter(None, [problem])
            done += size
            progress(Progress(done, total, "bytes"))
    return problems


def _digest_problem(records: Path, file: tuple[str, int, str]) -> Problem | None:
    name, _, expected = file
    try:
        got = file_digest(records / name)
    except OSError as error:
        return Problem("digest", name, f"cannot be read: {error.strerror}")
    return None if got == expected else Problem("digest", name, f"expected SHA-256 {expected[:12]}, got {got[:12]}")
