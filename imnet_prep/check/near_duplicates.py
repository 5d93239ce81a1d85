"""Records that are there twice: under the same name (a problem), or the same picture (a warning)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from imnet_prep.check.duplicates import Pair, near_duplicates
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.problems import Problem

MAX_LISTED = 100  # of a kind that are named; the last one counts the rest


def find_duplicates(folder: RecordsFolder, prints: NDArray[np.uint64]) -> tuple[list[Problem], list[Problem]]:
    """Find records of the same name, of the same bytes, and of the same picture, inside and across splits.

    Args:
        folder: The records.
        prints: uint64 (records, 4), see :class:`~imnet_prep.check.rows.Checked`.

    Returns:
        Problems and warnings.
    """
    problems = list(_listed(folder, "name", "the same file_name as", list(exact_pairs(prints[:, 0]))))
    warnings = list(_listed(folder, "duplicate", "same bytes as", list(exact_pairs(prints[:, 1]))))
    pairs = picture_pairs(folder, prints)
    for mirrored, text in ((False, "same picture as"), (True, "same picture, mirrored, as")):
        chosen = [(pair.first, pair.second) for pair in pairs if pair.mirrored is mirrored]
        warnings += _listed(folder, "near_duplicate", text, chosen)
    return problems, warnings


def exact_pairs(keys: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Yield each position whose key an earlier one has, after the first of them; zeros are left out."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero((keys[order][1:] == keys[order][:-1]) & (keys[order][1:] != 0)) + 1
    first = -1
    for place in same.tolist():
        if first < 0 or keys[order[place]] != keys[order[first]]:
            first = place - 1
        yield int(order[first]), int(order[place])


def picture_pairs(folder: RecordsFolder, prints: NDArray[np.uint64]) -> list[Pair]:
    """Find the same pictures among images of different bytes: of equal ones only the first is compared."""
    signatures = prints[:, 2:].copy()
    repeated = np.fromiter((second for _, second in exact_pairs(prints[:, 1])), np.int64)
    signatures[repeated] = 0
    return near_duplicates(signatures, lambda position: folder.row(position).image)


def _listed(folder: RecordsFolder, kind: str, text: str, pairs: list[tuple[int, int]]) -> Iterator[Problem]:
    for number, pair in enumerate(pairs):
        first, second = (folder.row(position) for position in pair)
        if number == MAX_LISTED:
            yield Problem(kind, second.file, f"{len(pairs) - MAX_LISTED} more are not listed")
            return
        one, other = first.label, second.label
        labels = "" if one == other else f", under another label ({other} and {one})"
        detail = f"{text} {first.name} ({first.file} row {first.row}){labels}"
        yield Problem(kind, second.file, detail, second.row, second.name)
