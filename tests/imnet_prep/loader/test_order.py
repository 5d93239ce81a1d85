"""The order of an epoch, and the part of it that each rank takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep.loader.order import ORDERS, RankSampler, balanced_order, epoch_order
from imnet_prep.types import record_id

IDS = np.array([record_id("train", f"n{i}") for i in range(5000)], dtype=np.uint64)


SHARD = np.repeat(np.arange(11, dtype=np.int32), [500, 300, 301, 700, 400, 400, 400, 600, 599, 300, 500])
LABELS = np.array([0] * 4000 + [1] * 900 + [2] * 99 + [7], dtype=np.int32)  # 3 to 6 are classes without records


def order_of(kind: str, seed: int = 0, epoch: int = 0, ids: NDArray[np.uint64] = IDS) -> NDArray[np.int64]:
    return epoch_order(kind, seed, epoch, ids, SHARD, LABELS).positions


@pytest.mark.parametrize("kind", [kind for kind in ORDERS if kind != "balanced"])
def test_every_row_comes_once(kind: str) -> None:
    assert np.array_equal(np.sort(order_of(kind)), np.arange(len(IDS)))


@pytest.mark.parametrize("kind", ["global", "blocks"])
def test_seed_and_epoch_change_the_order(kind: str) -> None:
    orders = [order_of(kind, seed, epoch) for seed, epoch in itertools.product(range(3), range(3))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.05


def test_the_global_order_of_ids_does_not_depend_on_how_they_are_stored() -> None:
    mixed = np.random.default_rng(0).permutation(IDS)
    assert np.array_equal(IDS[order_of("global", 3, 1)], mixed[order_of("global", 3, 1, mixed)])


def test_blocks_takes_one_shard_after_another_and_mixes_two_at_a_time() -> None:
    shards = SHARD[order_of("blocks")]
    kinds, first, rows = np.unique(shards, return_index=True, return_counts=True)
    last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
    turns = kinds[np.argsort(first)]
    first, last, rows = first[np.argsort(first)], last[np.argsort(first)], rows[np.argsort(first)]
    assert turns.tolist() != sorted(turns)
    assert (last[:-2] < first[2:]).all()  # three are never needed at a time
    assert first[1] == pytest.approx(0.8 * rows[0], abs=0.1 * rows[0])  # while the second is brought
    for turn in range(3, len(turns) - 1):
        both = shards[first[turn] : first[turn + 1]]
        assert (both == turns[turn]).sum() == pytest.approx(rows[turn] / 2, abs=1 + 0.1 * rows[turn])
        assert set(both) == {turns[turn - 1], turns[turn]}


def test_blocks_draws_rows_of_a_shard_in_another_order_than_they_are_stored() -> None:
    order = order_of("blocks")
    for shard in np.unique(SHARD):
        own = order[SHARD[order] == shard]
        assert len(own) < 2 or not np.array_equal(own, np.sort(own))


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


@pytest.mark.parametrize("rows", [5000, 1, 3])
def test_a_balanced_order_has_every_class_equally_often_and_a_class_its_records(rows: int) -> None:
    ids, label = IDS[-rows:], LABELS[-rows:]
    for epoch in range(3):
        order = balanced_order(3, epoch, ids, label)
        assert len(order.positions) == rows
        classes, places = np.unique(label[order.positions], return_counts=True)
        assert set(classes) <= set(label)
        assert places.max() - places.min() <= 1
        records, times = np.unique(order.positions, return_counts=True)
        for one in classes:
            of_class = times[label[records] == one]
            assert of_class.max() - of_class.min() <= 1
            assert len(of_class) == min((label == one).sum(), places[classes == one][0])


def test_a_balanced_order_depends_on_seed_epoch_and_ids_alone() -> None:
    orders = [balanced_order(seed, epoch, IDS, LABELS) for seed in range(2) for epoch in range(2)]
    for one, other in itertools.combinations(orders, 2):
        assert (one.positions == other.positions).mean() < 0.08  # the record of class 7 has a place in four
    stored = np.random.default_rng(0).permutation(len(IDS))
    mixed = balanced_order(0, 0, IDS[stored], LABELS[stored])
    assert np.array_equal(IDS[stored][mixed.positions], IDS[orders[0].positions])
    everywhere = np.arange(len(IDS))
    assert np.array_equal(mixed.keys(IDS[stored], everywhere), orders[0].keys(IDS, everywhere))


def test_a_balanced_order_spreads_each_class_over_the_epoch_and_takes_other_records_each_epoch() -> None:
    orders = [balanced_order(0, epoch, IDS, LABELS) for epoch in range(40)]
    for order in orders[:3]:
        quarters = LABELS[order.positions].reshape(4, -1)
        for one in (0, 1, 2, 7):
            assert ((quarters == one).mean(axis=1) > 0.21).all()
    large = np.concatenate([order.positions for order in orders])
    times = np.bincount(large, minlength=5000)[:4000]
    assert times.min() >= 1  # 40 epochs of 1,250 of 4,000 records
    assert times.mean() == pytest.approx(12.5)
    assert times.std() == pytest.approx((40 * 0.3125 * 0.6875) ** 0.5, rel=0.05)


def test_every_time_a_record_comes_in_an_epoch_its_draws_are_others() -> None:
    order = balanced_order(0, 0, IDS, LABELS)
    keys = order.keys(IDS, np.arange(len(IDS)))
    assert len(np.unique(keys)) == len(IDS)
    assert order.repeat is not None
    first = order.repeat == 0
    assert np.array_equal(keys[first], IDS[order.positions][first])
