"""The order of an epoch, and the part of it that each rank takes: pure functions of (seed, epoch, rank)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imnet_prep.loader.random_numbers import Stream, order_keys

ORDERS = ("global", "blocks", "sequential")
BLOCK_ROWS = 1024  # about 110 MB of original photographs: long enough for a disk to read at full speed
WINDOW_BLOCKS = 16  # the rows of this many blocks are shuffled together


def epoch_order(
    kind: str, seed: int, epoch: int, ids: NDArray[np.uint64], block_rows: int = BLOCK_ROWS, window: int = WINDOW_BLOCKS
) -> NDArray[np.int64]:
    """Return the order in which an epoch visits the rows.

    ``global`` sorts all rows by a key drawn from (seed, epoch, record id), so it does not depend on how the records are
    spread over shards. ``blocks`` cuts the stored rows into blocks, permutes the blocks, and shuffles the rows of a
    few blocks together, so each block is read within a short time. ``sequential`` is as stored.

    Args:
        kind: One of :data:`ORDERS`.
        seed: 0 to 2**64 - 1.
        epoch: From 0.
        ids: uint64 (N,), record ids in stored order, all different.
        block_rows: Rows of a block.
        window: Blocks whose rows are shuffled together.

    Returns:
        int64 (N,), a permutation of 0..N-1.
    """
    rows = len(ids)
    if kind == "sequential":
        return np.arange(rows, dtype=np.int64)
    keys = order_keys(seed, epoch, ids)
    if kind == "global":
        return np.argsort(keys, kind="stable")
    blocks = -(-rows // block_rows)
    place = np.empty(blocks, dtype=np.int64)
    place[np.argsort(keys[::block_rows], kind="stable")] = np.arange(blocks)  # a block's key is its first row's
    group = place[np.arange(rows) // block_rows] // window
    return np.asarray(np.lexsort((order_keys(seed, epoch, ids, Stream.WINDOW), group)), dtype=np.int64)


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

    def span(self, step: int) -> slice:
        """Return where this rank's batch ``step`` lies in the epoch's order."""
        start = (step * self.ranks + self.rank) * self.batch_size
        return slice(start, min(self.rows, start + self.batch_size))
