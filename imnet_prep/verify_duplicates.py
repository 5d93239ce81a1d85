"""Records that are there twice: under the same name (a problem), or the same picture (a warning)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep.duplicates import Pair, near_duplicates
from imnet_prep.errors import RecordsError
from imnet_prep.problems import Problem
from imnet_prep.records.manifest import Manifest
from imnet_prep.records.mindrecord import Shard, index_from_data, read_header
from imnet_prep.verify_rows import IMAGE_FIELDS

MAX_LISTED = 100  # warnings of a kind that are named; the last one counts the rest


class Located:
    """Finds a record by its position among all records of a folder."""

    def __init__(self, records: Path, manifest: Manifest) -> None:
        self._records = records
        self._shards = [(name, shard) for name, split in manifest.splits.items() for shard in split.shards]
        self._starts = [0, *accumulate(shard.rows for _, shard in self._shards)]
        self._open = lru_cache(maxsize=64)(self._opened)

    def place(self, position: int) -> tuple[str, str, int]:
        """Give split, file and row."""
        number = bisect_right(self._starts, position) - 1
        name, shard = self._shards[number]
        return name, shard.file, position - self._starts[number]

    def _opened(self, file: str) -> Shard:
        try:
            return Shard(self._records / file)
        except RecordsError:  # the index is gone; the pages are enough
            path = self._records / file
            return Shard(path, index=index_from_data(path, read_header(path)))

    def image(self, position: int) -> bytes:
        """Read an image.

        Raises:
            RecordsError: It cannot be read.
        """
        _, file, row = self.place(position)
        blobs = self._open(file).blobs(row)
        return blobs[next((name for name in IMAGE_FIELDS if name in blobs), next(iter(blobs)))]

    def name(self, position: int) -> str:
        """Give a record's file_name, or shard and row where it has none that reads."""
        _, file, row = self.place(position)
        try:
            return str(self._open(file).fields(row)["file_name"])
        except (RecordsError, KeyError, OSError):
            return f"{file} row {row}"

    def label(self, position: int) -> object:
        """Give a record's label, or None where it cannot be read."""
        _, file, row = self.place(position)
        try:
            return self._open(file).fields(row).get("label")
        except (RecordsError, OSError):
            return None

    def close(self) -> None:
        """Forget the open shards."""
        self._open.cache_clear()


def find_duplicates(
    records: Path, manifest: Manifest, prints: NDArray[np.uint64]
) -> tuple[list[Problem], list[Problem]]:
    """Find records of the same name, of the same bytes, and of the same picture, inside and across splits.

    Args:
        records: The folder.
        manifest: Its manifest.
        prints: uint64 (records, 4), see :class:`~imnet_prep.verify_rows.RowsResult`.

    Returns:
        Problems and warnings.
    """
    located = Located(records, manifest)
    problems = [
        _problem(located, "name", second, f"the same file_name as {_where(located, first)}")
        for first, second in exact_pairs(prints[:, 0])
    ]
    warnings = list(_listed(located, "duplicate", "same bytes as", list(exact_pairs(prints[:, 1]))))
    pairs = picture_pairs(located, prints)
    for mirrored, text in ((False, "same picture as"), (True, "same picture, mirrored, as")):
        chosen = [(pair.first, pair.second) for pair in pairs if pair.mirrored is mirrored]
        warnings += _listed(located, "near_duplicate", text, chosen)
    located.close()
    return problems, warnings


def exact_pairs(keys: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Give each position whose key an earlier one has, after the first of them; zeros are left out."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero((keys[order][1:] == keys[order][:-1]) & (keys[order][1:] != 0)) + 1
    first = -1
    for place in same.tolist():
        if first < 0 or keys[order[place]] != keys[order[first]]:
            first = place - 1
        yield int(order[first]), int(order[place])


def picture_pairs(located: Located, prints: NDArray[np.uint64]) -> list[Pair]:
    """Find the same pictures among images of different bytes: of equal ones only the first is compared."""
    signatures = prints[:, 2:].copy()
    repeated = np.fromiter((second for _, second in exact_pairs(prints[:, 1])), np.int64)
    signatures[repeated] = 0

    return near_duplicates(signatures, located.image)


def _listed(located: Located, kind: str, text: str, pairs: list[tuple[int, int]]) -> Iterator[Problem]:
    for first, second in pairs[:MAX_LISTED]:
        labels = located.label(first), located.label(second)
        other = "" if labels[0] == labels[1] else f", under another label ({labels[1]} and {labels[0]})"
        yield _problem(located, kind, second, f"{text} {_where(located, first)}{other}")
    if len(pairs) > MAX_LISTED:
        yield Problem(kind, located.place(pairs[MAX_LISTED][1])[1], f"{len(pairs) - MAX_LISTED} more are not listed")


def _problem(located: Located, kind: str, position: int, detail: str) -> Problem:
    _, file, row = located.place(position)
    return Problem(kind, file, detail, row, located.name(position))


def _where(located: Located, position: int) -> str:
    _, file, row = located.place(position)
    return f"{located.name(position)} ({file} row {row})"
