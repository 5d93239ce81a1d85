"""The order of an epoch, and the part of it that each rank takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from imnet_prep.loader.order import ORDERS, RankSampler, epoch_order
from imnet_prep.types import record_id

IDS = np.array([record_id("train", f"n{i}") for i in range(5000)], dtype=np.uint64)


@pytest.mark.parametrize("kind", ORDERS)
def test_every_row_comes_once(kind: str) -> None:
    assert np.array_equal(np.sort(epoch_order(kind, 0, 0, IDS)), np.arange(len(IDS)))


@pytest.mark.parametrize("kind", ["global", "blocks"])
def test_seed_and_epoch_change_the_order(kind: str) -> None:
    orders = [epoch_order(kind, seed, epoch, IDS, 100, 4) for seed, epoch in itertools.product(range(3), range(3))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.05


def test_the_global_order_of_ids_does_not_depend_on_how_they_are_stored() -> None:
    mixed = np.random.default_rng(0).permutation(IDS)
    assert np.array_equal(IDS[epoch_order("global", 3, 1, IDS)], mixed[epoch_order("global", 3, 1, mixed)])


def test_blocks_reads_few_blocks_at_a_time_and_shuffles_inside() -> None:
    order = epoch_order("blocks", 0, 0, IDS, block_rows=100, window=4)
    for start in range(0, len(order) - 400, 400):
        window = order[start : start + 400]
        assert len(np.unique(window // 100)) == 4
        assert not np.array_equal(window, np.sort(window))
    first_blocks = [order[start : start + 400].min() // 100 for start in range(0, 4800, 400)]
    assert first_blocks != sorted(first_blocks)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("rows", "batch", "ranks"), [(103, 8, 1), (103, 8, 2), (103, 8, 3), (7, 8, 3), (64, 8, 2)])
def test_the_ranks_batches_in_order_are_the_single_rank_run(rows: int, batch: int, ranks: int, drop_last: bool) -> None:
    alone = RankSampler(rows, batch, 0, 1, drop_last)
    samplers = [RankSampler(rows, batch, rank, ranks, drop_last) for rank in range(ranks)]
    most = max(one.steps for one in samplers)
    spans = [one.span(step) for step in range(most) for one in samplers if step < one.steps]
    expected = [alone.span(step) for step in range(alone.steps)]
    if drop_last:
        assert len({one.steps for one in samplers}) == 1
        assert len(expected) - len(spans) < ranks
        expected = expected[: len(spans)]
    assert spans == expected
    covered = sum(span.stop - span.start for span in spans)
    assert covered == (rows // (batch * ranks) * batch * ranks if drop_last else rows)
