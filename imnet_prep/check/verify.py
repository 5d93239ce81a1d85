"""Verify a records folder against its manifest. Each level includes the ones before it.

``quick`` reads the manifest, sizes, headers and indexes; ``hash`` reads every byte; ``decode`` checks every record
(:mod:`imnet_prep.check.rows`) and looks for duplicates. No level needs MindSpore. Damaged files never raise an error:
what cannot be read is reported as a problem.
"""

import os
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog
from imnet_prep.cluster import check_executor, run_tasks
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.process_pool import Advance, in_order, process_count
from imnet_prep.records.check import (
    Problem,
    check_rows_of_index,
    check_shard,
    check_size,
    check_unlisted,
    listed_files,
)
from imnet_prep.records.folder import RecordsFolder, map_rows, refuse_unseen
from imnet_prep.records.manifest import MANIFEST, MIN_ROW_BYTES, Manifest, SplitInfo
from imnet_prep.types import Progress, ProgressCallback

LEVELS = ("quick", "hash", "decode")
WITHHELD = ("shards", "records")
EXPECTATIONS = ("ilsvrc2012",)
MAX_PROBLEMS = 10_000  # problems that are kept: a folder of a million bad rows must not fill the memory


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The result of a verification.

    Attributes:
        level: The level.
        shards: Number of shards that the manifest lists. records: Number of records that it lists.
        problems: The problems; past 10,000 the last one says how many more there are.
        warnings: Duplicates. They leave the folder ``ok``.
    """

    level: str
    shards: int
    records: int
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
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
    records: Path | str,
    level: str,
    workers: int | None,
    progress: ProgressCallback,
    expect: str | None = None,
    withhold: Collection[str] = (),
    *,
    executor: str = "local",
    scheduler: str | None = None,
) -> VerifyResult:
    """Compare a records folder with its manifest.

    Args:
        records: The folder, or the URL of one, which is read and not kept (not at the level ``decode``).
        level: One of :data:`LEVELS`.
        workers: Number of files hashed, or of decoding processes, at a time; by default one per usable core.
        progress: Called with the bytes hashed and the images decoded.
        expect: ``ilsvrc2012`` to compare the counts with the published ones. Folders converted from whole official
            archives are always compared.
        withhold: Digests to ignore (:data:`WITHHELD`), to measure what the other checks find: ``shards`` for those of
            all files, ``records`` for those of the records, with the whole record list.
        executor: ``local``, or ``dask`` to read files and records on the workers of a Dask cluster, which see the
            folder under the same path. The result is the same.
        scheduler: Address of the Dask scheduler.

    Raises:
        RecordsError: There is no such folder, it has no manifest, ``level`` or ``expect`` is unknown, or a Dask worker
            does not see the folder.
        PlanError: A worker process was killed, or Dask cannot be used.
    """
    check_executor(executor, scheduler)
    if level not in LEVELS:
        raise RecordsError(f"unknown level {level!r}", expected=f"one of {', '.join(LEVELS)}")
    width = process_count(workers)
    if isinstance(records, str):
        from imnet_prep.check.elsewhere import verify_url

        return verify_url(records, level, width, progress, expect, scheduler=scheduler)
    try:
        folder = RecordsFolder.open(records)
    except (IntegrityError, RecordsError) as error:
        if not os.path.lexists(records / MANIFEST):
            raise
        return VerifyResult(level, 0, 0, (Problem("manifest", MANIFEST, str(error)),))
    problems = [*check_expectation(folder.manifest, expect), *_check_quick(folder)]
    if level != "quick" and "shards" not in withhold:
        problems += _check_digests(folder, width, scheduler, progress)
    warnings: list[Problem] = []
    hidden = 0
    if level == "decode" and _can_hold_its_rows(folder):
        from imnet_prep.check.duplicates import find_duplicates  # imports OpenCV, which the other levels do not need

        lines = "records" not in withhold
        rows = _check_rows(folder, width, scheduler, progress, lines=lines)
        same_name, warnings = find_duplicates(folder, rows.fingerprints)
        problems += [*_check_agreement(folder, rows, lines=lines), *same_name, *rows.problems]
        hidden = rows.number - len(rows.problems)
    problems = list(dict.fromkeys(problems))
    if hidden := hidden + len(problems[MAX_PROBLEMS:]):
        last = problems[:MAX_PROBLEMS][-1]
        problems[MAX_PROBLEMS:] = [Problem(last.kind, last.file, f"{hidden} more problems are not listed")]
    return VerifyResult(level, len(folder.shards), folder.records, tuple(problems), tuple(warnings))


def _check_quick(folder: RecordsFolder) -> Iterator[Problem]:
    path, manifest = folder.path, folder.manifest
    yield from check_unlisted(path, manifest)
    yield from _check_rejected(folder)
    for split in manifest.splits.values():
        if problem := check_size(path, str(split.records["file"]), split.records["size_bytes"]):
            yield problem
        for shard in split.shards:
            yield from check_shard(path, manifest, split, shard)


def _can_hold_its_rows(folder: RecordsFolder) -> bool:
    """Return whether the shards on the disk are large enough for the rows that the manifest lists.

    A forged manifest must not start a scan of 10^18 rows; the sizes of its shards are already reported.
    """
    paths = [folder.path / shard.file for _, _, shard in folder.shards]
    return folder.records * MIN_ROW_BYTES <= sum(os.path.getsize(path) for path in paths if os.path.isfile(path))


@dataclass(slots=True)
class _Rows:
    """The results of :func:`~imnet_prep.check.rows.check_row` over all records.

    Attributes:
        fingerprints: uint64 (records, 4). labels: int32 (records,). listed: bool (records,).
        problems: The first 10,000, in stored order. number: How many there are in all.
    """

    fingerprints: NDArray[np.uint64]
    labels: NDArray[np.int32]
    listed: NDArray[np.bool_]
    problems: list[Problem] = field(default_factory=list)
    number: int = 0


def _check_rows(
    folder: RecordsFolder, workers: int, scheduler: str | None, progress: ProgressCallback, *, lines: bool
) -> _Rows:
    """Check every record, in worker processes."""
    from imnet_prep.check.rows import BASE, EQUAL, check_row

    manifest, total = folder.manifest, folder.records
    names = dict.fromkeys(manifest.splits, EQUAL if manifest.plan else BASE)
    if isinstance(adopted := manifest.options.get("names"), dict):
        names |= adopted
    check = partial(check_row, classes=manifest.classes, names=names)
    found = _Rows(np.zeros((total, 4), np.uint64), np.zeros(total, np.int32), np.zeros(total, bool))

    def report(state: Progress) -> None:
        progress(replace(state, counts=(("problems", found.number),)))

    with closing(map_rows(folder, check, workers, report, lines=lines, scheduler=scheduler)) as rows:
        for place, row in enumerate(rows):
            found.labels[place], found.listed[place] = row.label, row.listed
            found.fingerprints[place] = row.fingerprints
            found.number += len(row.problems)
            found.problems += row.problems[: max(0, MAX_PROBLEMS - len(found.problems))]
    return found


def _check_agreement(folder: RecordsFolder, rows: _Rows, *, lines: bool) -> Iterator[Problem]:
    """Compare the rows with the indexes, the counts in the manifest and the record lists."""
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
            yield Problem(
                "counts",
                MANIFEST,
                f"split {name}: {len(wrong)} class counts are not those of the records; "
                f"label {label}: expected {split.class_counts[label]}, got {counts[label]}",
            )
        if lines:
            yield from _check_list(folder, name, looked_at=bool(rows.listed[span].all()))


def _check_list(folder: RecordsFolder, split: str, *, looked_at: bool) -> Iterator[Problem]:
    """Check the record list of a split.

    Args:
        folder: The records.
        split: The name of the split.
        looked_at: Whether the line of every record was checked; then only the number of lines is.
    """
    info = folder.manifest.splits[split]
    try:
        if not looked_at or folder.count_lines(split) != info.images:
            deque(folder.lines(split), maxlen=0)
    except RecordsError as error:
        yield Problem("records", str(info.records["file"]), str(error))


def _check_rejected(folder: RecordsFolder) -> Iterator[Problem]:
    """Compare the list of rejected images with the manifest: its size, its digest, and the counts by reason."""
    entry = folder.manifest.rejected
    if not entry:
        return
    file = str(entry["file"])
    if problem := check_size(folder.path, file, entry["size_bytes"]):
        yield problem
        return
    try:
        # A split whose images were all rejected is not in the manifest.
        found = Counter((item.split, str(item.reason)) for item in folder.rejected())
    except (IntegrityError, RecordsError) as error:
        yield Problem("rejected", file, str(error))
        return
    for name, split in folder.manifest.splits.items():
        got = {reason: count for (where, reason), count in found.items() if where == name}
        if got != split.rejected:
            yield Problem("rejected", file, f"split {name}: expected {_words(split.rejected)}, got {_words(got)}")


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in sorted(counts.items())) or "none"


_File = tuple[str, int, str]  # name, size and digest


def _check_digests(
    folder: RecordsFolder, workers: int, scheduler: str | None, progress: ProgressCallback
) -> Iterator[Problem]:
    files = [file for file in listed_files(folder.manifest) if os.path.isfile(folder.path / file[0])]
    done, total = 0, sum(size for _, size, _ in files)
    with closing(_digest_problems(folder, files, workers, scheduler)) as problems:
        for (_, size, _), problem in zip(files, problems, strict=True):
            if problem:
                yield problem
            done += size
            progress(Progress(done, total, "bytes"))


def _digest_problems(
    folder: RecordsFolder, files: Sequence[_File], workers: int, scheduler: str | None
) -> Generator[Problem | None, None, None]:
    """Yield the problem of each file, or None, in their order."""
    path = folder.path.absolute()
    if scheduler is None:  # hashing lets other threads run, and processes take longer to start
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(partial(_digest_problem, path), files)
    else:
        check = partial(_digest_problem_elsewhere, path, folder.manifest.digest)
        tasks = run_tasks(check, enumerate(files), workers, scheduler, lambda *_: None, task="file")
        yield from in_order(tasks)


def _digest_problem_elsewhere(
    records: Path, digest: str, task: tuple[int, _File], _advance: Advance
) -> tuple[int, Problem | None]:
    """Compare a file with its digest on a Dask worker; return its number as well."""
    refuse_unseen(records, digest)
    number, file = task
    return number, _digest_problem(records, file)


def _digest_problem(records: Path, file: _File) -> Problem | None:
    name, _, expected = file
    try:
        got = file_digest(records / name)
    except OSError as error:
        return Problem("digest", name, f"cannot be read: {error.strerror}")
    return None if got == expected else Problem("digest", name, f"expected SHA-256 {expected[:12]}, got {got[:12]}")


def check_expectation(manifest: Manifest, expect: str | None) -> Iterator[Problem]:
    """Compare the counts with ILSVRC2012 as published, if asked for or if whole official archives were converted.

    Raises:
        RecordsError: The expectation is unknown.
    """
    if expect is not None and expect not in EXPECTATIONS:
        raise RecordsError(f"unknown --expect {expect!r}", expected=f"one of {', '.join(EXPECTATIONS)}")
    names = tuple(synset.wnid for synset in catalog.synsets())
    if expect is not None and manifest.classes != names:
        got = f"got {len(manifest.classes)} classes"
        yield Problem("counts", MANIFEST, f"expected the {len(names)} wnids of ILSVRC2012 in sorted order, {got}")
    if expect is not None and not {"train", "val"} & set(manifest.splits):
        yield Problem("counts", MANIFEST, "expected a train or val split")
    for name in ("train", "val"):
        split = manifest.splits.get(name)
        if split is not None and (expect is not None or _official_and_whole(manifest, name)):
            yield from _check_published(name, split, asked=expect is not None)


def _official_and_whole(manifest: Manifest, split: str) -> bool:
    """Return whether a split comes from its official archive alone, with nothing left out on purpose."""
    if any(manifest.options.get(name) is not None for name in ("keep_classes", "max_per_class")):
        return False
    archives = [catalog.archive_with_digest(str(source["md5"])) for source in manifest.sources]
    kinds = {archive.split for archive in archives if archive is not None and "train_t3" not in archive.file_name}
    return split in kinds and all(source["official"] or source["images"] is None for source in manifest.sources)


def _check_published(name: str, split: SplitInfo, *, asked: bool) -> Iterator[Problem]:
    known = catalog.counts()
    total, low, high = {
        "train": (known.train, known.train_per_class_min, known.train_per_class_max),
        "val": (known.val, known.val_per_class, known.val_per_class),
    }[name]
    # If asked for, every image must be there; otherwise rejected images, which are under a budget, count as well.
    if total != (split.images if asked else split.found):
        duplicates = split.rejected.get("duplicate", 0)
        detail = f"split {name}: ILSVRC2012 has {total:,} images, here are {split.images:,}"
        yield Problem("counts", MANIFEST, detail + (f" ({duplicates} rejected as duplicates)" if duplicates else ""))
    low = 0 if not asked and any(split.rejected.values()) else low
    wrong = [label for label, count in enumerate(split.class_counts) if not low <= count <= high]
    if wrong:
        between = f"{low}" if low == high else f"{low} to {high}"
        first = f"label {wrong[0]} has {split.class_counts[wrong[0]]}"
        yield Problem("counts", MANIFEST, f"split {name}: {len(wrong)} classes without {between} images; {first}")
