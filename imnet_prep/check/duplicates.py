"""Find duplicate records: the same name, the same bytes, or the same picture (re-encoded, rescaled or mirrored).

Pictures are compared by locality-sensitive hashing, without a pass over all pairs: images whose perceptual hashes agree
in one of 24 bands of 18 bits are compared bit by bit, and those that differ in few bits by their pixels.

Source: Indyk and Motwani, "Approximate nearest neighbors", 1998.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from imnet_prep.cpu import cpu_count
from imnet_prep.images.perceptual_hash import (
    BITS,
    PerceptualHash,
    Signatures,
    bits_flipped_by_mirroring,
    hash_image,
    same_picture,
)
from imnet_prep.records.check import Problem
from imnet_prep.records.folder import RecordsFolder

MAX_BITS = 24  # copies may differ in so many bits; nearest-neighbour scaling of 64-pixel images needs them
BANDS, BAND_BITS = 24, 18
WINDOW = 64  # in a crowded band, the number of neighbours that an image is compared with
MAX_HASHES = 4096  # cached while candidates are compared: 4 kB each
MAX_COMPARED = 1 << 17  # cached results: a pair comes up in several bands, mostly in quick succession
PART_KEYS = 1 << 19  # keys sorted at a time: bounds memory
MAX_THREADS = 8  # sort at a time, so that memory stays bounded
MAX_LISTED = 100  # duplicates of a kind that are listed; the last problem counts the rest


# By image or mirror image: key in a band, position, whether mirrored, and both halves of the bits.
_Run = tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.bool_], NDArray[np.uint64], NDArray[np.uint64]]


@dataclass(frozen=True, slots=True)
class Pair:
    """The positions of two images of the same picture, ``first`` < ``second``; ``mirrored`` left to right or not."""

    first: int
    second: int
    mirrored: bool


def find_duplicates(folder: RecordsFolder, fingerprints: NDArray[np.uint64]) -> tuple[list[Problem], list[Problem]]:
    """Find records with the same name, the same bytes or the same picture, within and across splits.

    Args:
        folder: The records.
        fingerprints: uint64 (records, 4), see :class:`~imnet_prep.check.rows.Checked`.

    Returns:
        Problems (the same name) and warnings (the rest).
    """
    problems = list(_listed(folder, "name", "the same file_name as", list(exact_pairs(fingerprints[:, 0]))))
    warnings = list(_listed(folder, "duplicate", "same bytes as", list(exact_pairs(fingerprints[:, 1]))))
    pairs = picture_pairs(folder, fingerprints)
    for mirrored, text in ((False, "same picture as"), (True, "same picture, mirrored, as")):
        chosen = [(pair.first, pair.second) for pair in pairs if pair.mirrored is mirrored]
        warnings += _listed(folder, "near_duplicate", text, chosen)
    return problems, warnings


def exact_pairs(keys: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Yield (first position with the same key, position) for every repeated key; zeros are left out."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero((keys[order][1:] == keys[order][:-1]) & (keys[order][1:] != 0)) + 1
    first = -1
    for place in same.tolist():
        if first < 0 or keys[order[place]] != keys[order[first]]:
            first = place - 1
        yield int(order[first]), int(order[place])


def picture_pairs(folder: RecordsFolder, fingerprints: NDArray[np.uint64]) -> list[Pair]:
    """Find near duplicates among images of different bytes: of equal images only the first is compared."""
    signatures = fingerprints[:, 2:].copy()
    repeated = np.fromiter((second for _, second in exact_pairs(fingerprints[:, 1])), np.int64)
    signatures[repeated] = 0
    return near_duplicates(signatures, lambda position: folder.row(position).image)


def _listed(folder: RecordsFolder, kind: str, text: str, pairs: Sequence[tuple[int, int]]) -> Iterator[Problem]:
    for number, pair in enumerate(pairs):
        first, second = (folder.row(position) for position in pair)
        if number == MAX_LISTED:
            yield Problem(kind, second.file, f"{len(pairs) - MAX_LISTED} more are not listed")
            return
        one, other = first.label, second.label
        labels = "" if one == other else f", under another label ({other} and {one})"
        detail = f"{text} {first.name} ({first.file} row {first.row}){labels}"
        yield Problem(kind, second.file, detail, second.row, second.name)


@cache
def _bands() -> NDArray[np.int64]:
    """Return the bits of each band, int64 (24, 18); the draw is fixed."""
    draw = np.random.Generator(np.random.Philox(key=1))
    return np.stack([draw.permutation(BITS)[:BAND_BITS] for _ in range(BANDS)])


def candidates(signatures: Signatures) -> Iterator[Pair]:
    """Yield the pairs that differ in at most 24 bits, by sorting: n log n work instead of n squared.

    Args:
        signatures: uint64 (N, 2); rows of zeros are left out.

    Yields:
        The pairs, some more than once.
    """
    waiting, threads = deque[Future[_Run]](), min(cpu_count(), MAX_THREADS)
    with ThreadPoolExecutor(threads) as pool:  # NumPy sorts without Python's lock
        for run in _runs(signatures):
            waiting.append(pool.submit(_sorted, run))
            if len(waiting) > threads:
                yield from _neighbours(*waiting.popleft().result())
        while waiting:
            yield from _neighbours(*waiting.popleft().result())


def _runs(signatures: Signatures) -> Iterator[_Run]:
    """Yield the images and their mirror images, part by part of each band: those of equal keys lie in one part."""
    odd = bits_flipped_by_mirroring()
    there = np.flatnonzero(signatures.any(axis=1))
    parts = 1 << max(0, int(np.ceil(np.log2(max(1, 2 * len(there)) / PART_KEYS))))
    for band in _bands():
        plain = _band_keys(signatures, band)[there]
        turned = _band_keys(odd[None], band)[0] ^ plain  # mirroring flips the same bits of every image
        for part in range(parts):
            mine = [np.flatnonzero(keys % parts == part) for keys in (plain, turned)]
            rows = there[np.concatenate(mine)]
            mirrored = np.arange(len(rows)) >= len(mine[0])
            first, second = (signatures[rows] ^ np.where(mirrored[:, None], odd, np.uint64(0))).T
            yield np.concatenate([plain[mine[0]], turned[mine[1]]]), rows, mirrored, first, second


def _band_keys(signatures: Signatures, band: NDArray[np.int64]) -> NDArray[np.uint32]:
    keys = np.zeros(len(signatures), np.uint32)
    for place, bit in enumerate(band.tolist()):
        word = (signatures[:, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)
        keys |= word.astype(np.uint32) << np.uint32(place)
    return keys


def _sorted(run: _Run) -> _Run:
    """Sort a run by its keys, and the images of a key by their bits."""
    keys, rows, mirrored, first, second = run
    order = np.lexsort((first, keys))
    return keys[order], rows[order], mirrored[order], first[order], second[order]


def _neighbours(
    keys: NDArray[np.uint32],
    rows: NDArray[np.int64],
    mirrored: NDArray[np.bool_],
    first: NDArray[np.uint64],
    second: NDArray[np.uint64],
) -> Iterator[Pair]:
    """Compare the images that share a key; where many do, only those whose bits sort close together."""
    active = np.arange(len(keys))
    # In a run of equal images each is compared only with the next one, which is enough to join them.
    alike = np.zeros(len(keys), bool)
    alike[:-1] = (first[1:] == first[:-1]) & (second[1:] == second[:-1]) & (mirrored[1:] == mirrored[:-1])
    for shift in range(1, WINDOW + 1):
        if shift == 2:
            active = active[~alike[active]]
        active = active[active + shift < len(keys)]
        active = active[keys[active] == keys[active + shift]]
        if not len(active):
            return
        other = active + shift
        near = _differing(first[active] ^ first[other]) + _differing(second[active] ^ second[other]) <= MAX_BITS
        near &= (rows[active] != rows[other]) & ~(mirrored[active] & mirrored[other])
        for one, two in zip(active[near].tolist(), other[near].tolist(), strict=True):
            low, high = sorted((int(rows[one]), int(rows[two])))
            yield Pair(low, high, bool(mirrored[one] or mirrored[two]))


@cache
def _ones() -> NDArray[np.uint8]:
    """Return the number of set bits of every 16-bit number."""
    return np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


def _differing(bits: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.asarray(_ones()[np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 4)].sum(axis=1), dtype=np.uint8)


class _Groups:
    """Union-find over positions; it knows of each position whether it is mirrored relative to its group's first."""

    def __init__(self) -> None:
        self._up: dict[int, tuple[int, bool]] = {}  # another position of the group, and whether mirrored against it

    def first(self, place: int) -> tuple[int, bool]:
        """Return the first position of a group, and whether ``place`` is mirrored relative to it."""
        path = []
        while place in self._up:
            path.append(place)
            place = self._up[place][0]
        mirrored = False
        for step in reversed(path):  # path compression, from the top down
            mirrored ^= self._up[step][1]
            self._up[step] = place, mirrored
        return place, mirrored

    def join(self, pair: Pair) -> None:
        """Join the groups of a pair."""
        (one, turned), (two, other) = self.first(pair.first), self.first(pair.second)
        self._up[max(one, two)] = min(one, two), turned ^ other ^ pair.mirrored

    def pairs(self) -> list[Pair]:
        """Return every position that is not the first of its group, paired with the first."""
        return [Pair(first, place, mirrored) for place in sorted(self._up) for first, mirrored in [self.first(place)]]


def near_duplicates(signatures: Signatures, read: Callable[[int], bytes]) -> list[Pair]:
    """Find images that show the same picture.

    Args:
        signatures: uint64 (N, 2), see :class:`~imnet_prep.images.perceptual_hash.PerceptualHash`.
        read: Returns the bytes of an image by position; called only for candidates.

    Returns:
        Each image that shows the same picture as an earlier one, paired with the first of its group, by position.
    """
    groups = _Groups()

    @lru_cache(MAX_HASHES)
    def hash_at(place: int) -> PerceptualHash:
        return hash_image(read(place))

    @lru_cache(MAX_COMPARED)
    def same(pair: Pair) -> bool:
        return same_picture(hash_at(pair.first), hash_at(pair.second), pair.mirrored)

    for pair in candidates(signatures):
        if groups.first(pair.first)[0] != groups.first(pair.second)[0] and same(pair):
            groups.join(pair)
    return groups.pairs()
