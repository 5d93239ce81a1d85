"""The order of an epoch, and the part of it that each rank takes: pure functions of (seed, epoch, rank)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imnet_prep.loader.random_numbers import Stream, order_keys

ORDERS = ("global", "blocks", "sequential", "balanced")
MIXED_SHARDS = 2  # whose rows come mixed: a cache of three shards then has room to bring the next one
FIRST_MIXED = 1.25  # of the first: 4/5 of its rows come before the second is needed, so there is time to bring that
_STRIDE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the multiples up to 2**64 differ


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """The rows that an epoch visits.

    Attributes:
        positions: int64 (N,), positions of the rows in stored order.
        repeat: int64 (N,), how many other times of the epoch the record was counted before this one; None where every
            record comes once.
    """

    positions: NDArray[np.int64]
    repeat: NDArray[np.int64] | None = None

    def keys(self, ids: NDArray[np.uint64], places: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return what the draws of the rows at some places are keyed by: the record id, another at each repeat."""
        own = ids[self.positions[places]]
        return own if self.repeat is None else _repeated(own, self.repeat[places])


def _repeated(ids: NDArray[np.uint64], repeat: NDArray[np.int64]) -> NDArray[np.uint64]:
    return ids + repeat.astype(np.uint64) * _STRIDE


def epoch_order(
    kind: str, seed: int, epoch: int, ids: NDArray[np.uint64], shard: NDArray[np.int32], label: NDArray[np.int32]
) -> EpochOrder:
    """Return the order in which an epoch visits the rows.

    ``global`` sorts all rows by a key drawn from (seed, epoch, record id), so it does not depend on how the records are
    spread over shards. ``sequential`` is as stored. See :func:`block_order` and :func:`balanced_order` for the others.

    Args:
        kind: One of :data:`ORDERS`.
        seed: 0 to 2**64 - 1.
        epoch: From 0.
        ids: uint64 (N,), record ids in stored order, all different.
        shard: int32 (N,), ascending.
        label: int32 (N,).
    """
    if kind == "balanced":
        return balanced_order(seed, epoch, ids, label)
    if kind == "blocks":
        return EpochOrder(block_order(seed, epoch, ids, shard))
    if kind == "sequential":
        return EpochOrder(np.arange(len(ids), dtype=np.int64))
    return EpochOrder(np.argsort(order_keys(seed, epoch, ids), kind="stable"))


def block_order(seed: int, epoch: int, ids: NDArray[np.uint64], shard: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return an order that takes one shard after another, for storage where random reads are slow.

    The shards come in random order, one per turn. The rows of a shard are spread at random over two turns, its own and
    the next, so two shards are mixed at a time. Those of the first shards are spread over less, so the first batches
    need one shard alone, and last while the second is brought.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: From 0.
        ids: uint64 (N,), record ids in stored order, all different.
        shard: int32 (N,), the shard of each row, ascending.

    Returns:
        int64 (N,), a permutation of 0..N-1.
    """
    _, first, rows = np.unique(shard, return_index=True, return_counts=True)
    turn = np.empty(len(first))
    turn[np.argsort(order_keys(seed, epoch, ids[first]), kind="stable")] = np.arange(len(first))
    turn = np.repeat(turn, rows)
    spread = np.minimum(MIXED_SHARDS, FIRST_MIXED + turn / 4)
    return np.argsort(turn + spread * (order_keys(seed, epoch, ids, Stream.WINDOW) * 2.0**-64), kind="stable")


def balanced_order(seed: int, epoch: int, ids: NDArray[np.uint64], label: NDArray[np.int32]) -> EpochOrder:
    """Return an order of as many rows as there are records, in which every class comes equally often.

    Each class gets the same number of places, or one more where they do not come out even. A class takes its records in
    an order of their own, again and again if it has fewer records than places; the places of all classes are then
    shuffled. The result does not depend on how the records are stored.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: From 0.
        ids: uint64 (N,), record ids in stored order, all different.
        label: int32 (N,).
    """
    rows = len(ids)
    by_class = np.lexsort((order_keys(seed, epoch, ids, Stream.CLASS_ORDER), label))
    classes, first, records = np.unique(label[by_class], return_index=True, return_counts=True)
    places = np.full(len(classes), rows // max(1, len(classes)))
    turn = np.argsort(order_keys(seed, epoch, classes.astype(np.uint64), Stream.CLASS), kind="stable")
    places[turn[: rows - places.sum()]] += 1
    number = np.repeat(np.arange(len(classes)), places)
    repeat, place = np.divmod(np.arange(rows) - np.repeat(np.cumsum(places) - places, places), records[number])
    positions = by_class[first[number] + place]
    shuffled = np.argsort(order_keys(seed, epoch, _repeated(ids[positions], repeat)), kind="stable")
    return EpochOrder(positions[shuffled], repeat[shuffled])


@dataclass(frozen=True, slots=True)
class RankSampler:
    """The batches of one rank: batch ``k * ranks + rank`` of the single-rank run is this rank's batch ``k``.

    The batches of all ranks, in order, are therefore the single-rank run with the same batch size, and the ranks'
    batches of one step together are one batch of ``ranks * batch_size`` consecutive records.

    Attributes:
        rows: Records of the split.
        batch_size: Rows of a batch on one rank.
        rank: From 0.
        ranks: Number of ranks.
        drop_last: Every rank takes the same number of whole batches, and fewer than ``ranks * batch_size`` records are
            left out, other ones each epoch. Otherwise every record is visited, the last batch may be short, and the
            ranks' numbers of batches may differ by one.
    """

    rows: int
    batch_size: int
    rank: int = 0
    ranks: int = 1
    drop_last: bool = False

    @property
    def steps(self) -> int:
        """Batches of this rank in an epoch."""
        if self.drop_last:
            return self.rows // (self.batch_size * self.ranks)
        batches = -(-self.rows // self.batch_size)
        return max(0, -(-(batches - self.rank) // self.ranks))

    def places(self, first_step: int) -> NDArray[np.int64]:
        """Return the places in the epoch's order of all rows that this rank takes from a step on, int64."""
        steps = np.arange(first_step, self.steps)[:, None] * self.ranks + self.rank
        places = (steps * self.batch_size + np.arange(self.batch_size)).reshape(-1)
        return places[places < self.rows]

    def span(self, step: int) -> slice:
        """Return where this rank's batch ``step`` lies in the epoch's order."""
        start = (step * self.ranks + self.rank) * self.batch_size
        return slice(start, min(self.rows, start + self.batch_size))
