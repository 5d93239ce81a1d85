"""Draws keyed by (seed, epoch, record id)."""

from __future__ import annotations

import numpy as np
import pytest

from imnet_prep.loader.random_numbers import MAX_EPOCH, MAX_SEED, Stream, bits, order_keys, philox, uniforms
from tests.imnet_prep.loader.distributions import p_value


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)

    assert philox(words(counter), words(key)).tolist() == words(expected).tolist()


def test_a_draw_does_not_depend_on_the_others_in_the_call() -> None:
    ids = np.random.default_rng(0).integers(0, 1 << 64, 50, dtype=np.uint64)
    streams = np.array([Stream.FLIP, Stream.CROP, Stream.CROP + 1])
    together = uniforms(7, 3, ids, streams)
    for place, one in enumerate(ids):
        for column, stream in enumerate(streams):
            assert np.array_equal(uniforms(7, 3, np.array([one]), int(stream))[0], together[place, column])


def test_seed_epoch_id_and_stream_each_change_the_draw() -> None:
    ids = np.array([1 << 40], dtype=np.uint64)
    base = bits(1, 0, ids, Stream.CROP)
    others = [
        bits(0, 1, ids, Stream.CROP),  # seed 0 epoch 1 is not seed 1 epoch 0
        bits(1 << 32, 0, ids, Stream.CROP),
        bits(1, 0, ids >> np.uint64(32), Stream.CROP),
        bits(1, 0, ids, Stream.FLIP),
        bits(MAX_SEED, MAX_EPOCH, ids, Stream.CROP),
    ]
    found = {tuple(one.ravel().tolist()) for one in [base, *others]}
    assert len(found) == 6


def test_draws_are_uniform_and_never_0_or_1() -> None:
    drawn = uniforms(0, 0, np.arange(50_000, dtype=np.uint64), Stream.CROP)
    assert 0.0 < drawn.min() < drawn.max() < 1.0
    for word in range(4):
        assert p_value(drawn[:, word], "uniform") > 1e-3
    assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.02


def test_order_keys_are_the_same_in_pieces() -> None:
    ids = np.arange((1 << 16) + 10, dtype=np.uint64)
    whole = order_keys(5, 2, ids)
    assert np.array_equal(whole[-10:], order_keys(5, 2, ids[-10:]))
