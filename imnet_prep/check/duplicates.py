"""Which images are the same picture: re-encoded, rescaled or mirrored copies.

Each image gets 128 bits: the signs of the lowest frequencies of a 32 x 32 grey copy. Mirroring changes the sign of the
odd horizontal frequencies and of nothing else, so the mirrored image's bits are known without a second look. Images
that agree in one of 24 groups of 18 bits are compared bit by bit (no pass over all pairs), and what is left is
compared by its pixels. Source: Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010
(the DCT hash); Indyk and Motwani, "Approximate nearest neighbors", 1998 (the groups of bits).

Measured on 250 photographs of ImageNet: copies at q60, scaled to 70 %, mirrored, and all three differ in at most 8
bits, different photographs in at least 37; in pixels they correlate at 0.93 or more, and at 0.66 or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from imnet_prep.images.check import examine

SIDE = 32  # pixels of the grey copy's side
BITS = 128
LOWEST = 16  # frequencies a direction among which the 128 lie
MAX_BITS = 24  # bits in which copies may differ; nearest-neighbour scaling of 64-pixel images needs as many
MIN_CORRELATION = 0.8
BANDS, BAND_BITS = 24, 18
WINDOW = 64  # neighbours that an image is compared with in a crowded group
MAX_PRINTS = 4096  # kept while candidates are compared: 4 kB each
MAX_LOOKED = 1 << 17  # pairs remembered as compared: a pair comes up in several groups, most of them soon
PART_KEYS = 1 << 19  # keys sorted at a time: bounds memory
_FEATURELESS = 2.0  # grey levels of standard deviation below which there is nothing to compare
_BLUR = 3.0  # pixels; what is smoother than this (a white background, a dark corner) says nothing
_MAX_ASPECT = 0.06  # difference of log(width / height)
Grey = NDArray[np.float32]
Signatures = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Print:
    """What is compared.

    Attributes:
        bits: uint64 (2,), zeros where there is nothing to see.
        grey: float32 (32, 32), mean 0. aspect: log(width / height).
    """

    bits: Signatures
    grey: Grey
    aspect: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images that show the same, ``first`` < ``second`` their positions; ``mirrored`` left to right."""

    first: int
    second: int
    mirrored: bool


@cache
def _frequencies() -> tuple[NDArray[np.int64], Signatures]:
    """Positions of the 128 lowest frequencies among 16 x 16 of the transform, and the bits that mirroring flips."""
    vertical, horizontal = np.mgrid[0:LOWEST, 0:LOWEST]
    order = np.argsort(((vertical + horizontal) * SIDE + vertical).ravel(), kind="stable")[1 : BITS + 1]
    return order, _pack(horizontal.ravel()[order] % 2 == 1)


def _pack(bits: NDArray[np.bool_]) -> Signatures:
    return np.packbits(bits, bitorder="little").view(np.uint64)


@cache
def _bands() -> NDArray[np.int64]:
    """Bits of each group, int64 (24, 18), drawn once and for all."""
    draw = np.random.Generator(np.random.Philox(key=1))
    return np.stack([draw.permutation(BITS)[:BAND_BITS] for _ in range(BANDS)])


@cache
def _weights(small: int, full: int) -> Grey:
    """Area weights (32, small) from ``small`` samples that stand for ``full`` pixels; the last may be a part of one.

    A decode at 1/8 rounds the size up, so that a plain resize would shift a mirrored copy against the original.
    """
    reduce = next((scale for scale in (1, 2, 4, 8) if -(-full // scale) == small), full / small)
    end = full / reduce
    edges = np.linspace(0, end, SIDE + 1)
    low = np.maximum(edges[:-1, None], np.arange(small))
    high = np.minimum(edges[1:, None], np.minimum(np.arange(1, small + 1), end))
    weights = np.clip(high - low, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


@cache
def _spectrum(small: int, full: int) -> Grey:
    """The lowest frequencies of the 32 samples that ``small`` ones are brought to: float32 (16, small)."""
    basis = cv2.dct(np.eye(SIDE, dtype=np.float32), flags=cv2.DCT_ROWS).T[:LOWEST]
    return np.asarray(basis @ _weights(small, full), dtype=np.float32)


def signature(grey: NDArray[np.uint8], width: int, height: int) -> Signatures:
    """Return an image's bits, uint64 (2,): the signs of its lowest frequencies; zeros where there is nothing to see.

    Args:
        grey: uint8 (H, W), perhaps decoded at a smaller scale, its short side 32 or more where the image has them.
        width: Of the whole image, in pixels. height: Likewise.
    """
    tall, wide = grey.shape
    lowest = (_spectrum(tall, height) @ grey.astype(np.float32) @ _spectrum(wide, width).T).ravel()
    if float(np.dot(lowest, lowest)) - float(lowest[0]) ** 2 < (_FEATURELESS * SIDE) ** 2:  # without the mean
        return np.zeros(2, np.uint64)
    return _pack(lowest[_frequencies()[0]] > 0)


def make_print(grey: NDArray[np.uint8], width: int, height: int) -> Print:
    """Return all that is compared; see :func:`signature` for the arguments."""
    small = _weights(grey.shape[0], height) @ grey.astype(np.float32) @ _weights(grey.shape[1], width).T
    small -= small.mean()
    return Print(signature(grey, width, height), small, float(np.log(width / height)))


def same_picture(first: Print, second: Print, mirrored: bool) -> bool:
    """Compare two images by their pixels: the correlation of what is finer than a few pixels."""
    if abs(first.aspect - second.aspect) > _MAX_ASPECT:
        return False
    one, other = _detail(first.grey), _detail(second.grey[:, ::-1] if mirrored else second.grey)
    norm = float(np.sqrt((one * one).sum() * (other * other).sum()))
    return norm > 0 and float((one * other).sum()) / norm >= MIN_CORRELATION


def _detail(grey: Grey) -> Grey:
    fine = grey - cv2.GaussianBlur(grey, (0, 0), _BLUR)
    return np.asarray(fine - fine.mean(), dtype=np.float32)


def candidates(signatures: Signatures) -> Iterator[Pair]:
    """Yield the pairs that differ in at most 24 bits, by sorting: n log n work, and not n squared.

    Args:
        signatures: uint64 (N, 2); rows of zeros are left out.

    Yields:
        Pairs, some of them more than once.
    """
    _, odd = _frequencies()
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
        signatures: uint64 (N, 2), see :class:`Print`.
        read: Returns the bytes of an image by position; called for candidates alone.

    Returns:
        By position, each image that shows the same as an earlier one, with the earliest of its group.
    """
    groups = _Groups()

    @lru_cache(MAX_PRINTS)
    def print_at(place: int) -> Print:
        return print_of(read(place))

    @lru_cache(MAX_LOOKED)
    def same(pair: Pair) -> bool:
        return same_picture(print_at(pair.first), print_at(pair.second), pair.mirrored)

    for pair in candidates(signatures):
        if groups.first(pair.first)[0] != groups.first(pair.second)[0] and same(pair):
            groups.join(pair)
    return groups.pairs()


def print_of(data: bytes) -> Print:
    """Return the print of an image's bytes.

    Raises:
        ImageFault: It does not decode.
    """
    seen = examine(data, SIDE)
    return make_print(seen.grey, seen.width, seen.height)
