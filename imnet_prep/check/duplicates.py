"""Find the images that show the same picture: re-encoded, rescaled or mirrored copies.

Images whose hashes agree in one of 24 groups of 18 bits are compared bit by bit, without a pass over all pairs. Those
that differ in few bits are compared by their pixels.

Source: Indyk and Motwani, "Approximate nearest neighbors", 1998 (groups of bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from imnet_prep.images.perceptual_hash import (
    BITS,
    PerceptualHash,
    Signatures,
    bits_flipped_by_mirroring,
    hash_image,
    same_picture,
)

MAX_BITS = 24  # bits in which copies may differ; nearest-neighbour scaling of 64-pixel images needs as many
BANDS, BAND_BITS = 24, 18
WINDOW = 64  # neighbours that an image is compared with in a crowded group
MAX_HASHES = 4096  # kept while candidates are compared: 4 kB each
MAX_LOOKED = 1 << 17  # pairs remembered as compared: a pair comes up in several groups, most of them soon
PART_KEYS = 1 << 19  # keys sorted at a time: bounds memory


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images that show the same, ``first`` < ``second`` their positions; ``mirrored`` left to right."""

    first: int
    second: int
    mirrored: bool


@cache
def _bands() -> NDArray[np.int64]:
    """Bits of each group, int64 (24, 18), drawn once and for all."""
    draw = np.random.Generator(np.random.Philox(key=1))
    return np.stack([draw.permutation(BITS)[:BAND_BITS] for _ in range(BANDS)])


def candidates(signatures: Signatures) -> Iterator[Pair]:
    """Yield the pairs that differ in at most 24 bits, by sorting: n log n work, and not n squared.

    Args:
        signatures: uint64 (N, 2); rows of zeros are left out.

    Yields:
        Pairs, some of them more than once.
    """
    odd = bits_flipped_by_mirroring()
    there = np.flatnonzero(signatures.any(axis=1))
    parts = 1 << max(0, int(np.ceil(np.log2(max(1, 2 * len(there)) / PART_KEYS))))
    for band in _bands():
        plain = _band_keys(signatures, band)[there]
        turned = _band_keys(odd[None], band)[0] ^ plain  # mirrored: the same bits flip in every image
        for part in range(parts):
            mine = [np.flatnonzero(keys % parts == part) for keys in (plain, turned)]
            keys = np.concatenate([plain[mine[0]], turned[mine[1]]])
            rows = np.concatenate([there[place] for place in mine])
            mirrored = np.arange(len(keys)) >= len(mine[0])
            yield from _neighbours(signatures, odd, keys, rows, mirrored)


def _band_keys(signatures: Signatures, band: NDArray[np.int64]) -> NDArray[np.uint32]:
    keys = np.zeros(len(signatures), np.uint32)
    for place, bit in enumerate(band.tolist()):
        word = (signatures[:, bit // 64] >> np.uint64(bit % 64)) & np.uint64(1)
        keys |= word.astype(np.uint32) << np.uint32(place)
    return keys


def _neighbours(
    signatures: Signatures,
    odd: Signatures,
    keys: NDArray[np.uint32],
    rows: NDArray[np.int64],
    mirrored: NDArray[np.bool_],
) -> Iterator[Pair]:
    """Compare the images of each group; in a crowded one, those whose bits sort close together."""
    first, second = (signatures[rows] ^ np.where(mirrored[:, None], odd, np.uint64(0))).T
    order = np.lexsort((first, keys))
    keys, rows, mirrored, first, second = (a[order] for a in (keys, rows, mirrored, first, second))
    active = np.arange(len(keys))
    # Of a run of equal images each is compared with the next: they are joined by that.
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
    """Set bits of every 16-bit number."""
    return np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


def _differing(bits: NDArray[np.uint64]) -> NDArray[np.uint8]:
    words = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 4)
    return np.asarray(_ones()[words].sum(axis=1), dtype=np.uint8)


class _Groups:
    """Positions joined into groups; of each is known whether it is mirrored against its group's first."""

    def __init__(self) -> None:
        self._up: dict[int, tuple[int, bool]] = {}  # another of the group, and mirrored against that

    def first(self, place: int) -> tuple[int, bool]:
        """Return the first of a position's group, and whether the position is mirrored against it."""
        path = []
        while place in self._up:
            path.append(place)
            place = self._up[place][0]
        mirrored = False
        for step in reversed(path):  # from the top down, so that the next search is short
            mirrored ^= self._up[step][1]
            self._up[step] = place, mirrored
        return place, mirrored

    def join(self, pair: Pair) -> None:
        """Join the groups of a pair."""
        (one, turned), (two, other) = self.first(pair.first), self.first(pair.second)
        self._up[max(one, two)] = min(one, two), turned ^ other ^ pair.mirrored

    def pairs(self) -> list[Pair]:
        """Return each position with the first of its group, but for those that are the first."""
        return [Pair(first, place, mirrored) for place in sorted(self._up) for first, mirrored in [self.first(place)]]


def near_duplicates(signatures: Signatures, read: Callable[[int], bytes]) -> list[Pair]:
    """Find the images that show the same picture.

    Args:
        signatures: uint64 (N, 2), see :class:`~imnet_prep.images.perceptual_hash.PerceptualHash`.
        read: Returns the bytes of an image by position; called for candidates alone.

    Returns:
        By position, each image that shows the same as an earlier one, with the earliest of its group.
    """
    groups = _Groups()

    @lru_cache(MAX_HASHES)
    def hash_at(place: int) -> PerceptualHash:
        return hash_image(read(place))

    @lru_cache(MAX_LOOKED)
    def same(pair: Pair) -> bool:
        return same_picture(hash_at(pair.first), hash_at(pair.second), pair.mirrored)

    for pair in candidates(signatures):
        if groups.first(pair.first)[0] != groups.first(pair.second)[0] and same(pair):
            groups.join(pair)
    return groups.pairs()
