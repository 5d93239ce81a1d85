"""Scoring: every image once, ties and broken logits judged against the network."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep.errors import Interrupted, TrainError
from imnet_prep.types import Batch
from mbv2.scoring.score import Scores, label_ranks, score_batches, write_per_class

CLASSES = 7


def code(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Read the logits that a test wrote into the pixels."""
    return image[:, 0, :CLASSES, 0].astype(np.float32)


def batches(logits: NDArray[np.uint8], label: NDArray[np.int32], size: int) -> list[Batch]:
    image = np.zeros((len(label), 8, 8, 3), np.uint8)
    image[:, 0, :CLASSES, 0] = logits
    ids = np.arange(len(label), dtype=np.uint64)
    return [Batch(image[i : i + size], label[i : i + size], ids[i : i + size]) for i in range(0, len(label), size)]


def test_counts_equal_a_plain_sort_and_the_last_partial_batch_counts() -> None:
    rng = np.random.default_rng(0)
    logits = rng.permuted(np.tile(np.arange(CLASSES, dtype=np.uint8) * 9, (53, 1)), axis=1)
    label = rng.integers(0, CLASSES, 53).astype(np.int32)
    sizes: list[int] = []

    def predict(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        sizes.append(len(image))
        return code(image)

    scores = score_batches(predict, batches(logits, label, 8), classes=CLASSES, batch_size=8, total=53)
    order = np.argsort(-logits.astype(int), axis=1)
    assert scores.images == 53
    assert scores.correct1 == int((order[:, 0] == label).sum())
    assert scores.correct5 == int((order[:, :5] == label[:, None]).any(1).sum())
    assert set(sizes) == {8}
    assert scores.confusion.sum() == 53
    assert np.trace(scores.confusion) == scores.correct1


def test_loss_is_the_mean_cross_entropy() -> None:
    logits = np.array([[1, 2, 3, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0]], np.uint8)
    label = np.array([2, 1], np.int32)
    scores = score_batches(code, batches(logits, label, 2), classes=CLASSES, batch_size=2, total=2)
    p = np.exp(logits.astype(float))
    p /= p.sum(1, keepdims=True)
    assert scores.loss == pytest.approx(-np.log(p[[0, 1], label]).mean())


def test_equal_logits_are_ordered_by_class() -> None:
    logits = np.zeros((CLASSES, CLASSES), np.float32)
    assert label_ranks(logits, np.arange(CLASSES, dtype=np.int32)).tolist() == list(range(CLASSES))


def test_a_row_that_is_not_finite_never_scores() -> None:
    logits = np.array([[np.nan] * 3, [np.inf, 0, 0], [1, 0, 0]], np.float32)
    assert label_ranks(logits, np.zeros(3, np.int32)).tolist() == [5, 5, 0]


def test_a_missing_image_is_an_error() -> None:
    logits, label = np.zeros((5, CLASSES), np.uint8), np.zeros(5, np.int32)
    with pytest.raises(TrainError, match="expected 6"):
        score_batches(code, batches(logits, label, 2), classes=CLASSES, batch_size=2, total=6)


def test_a_stop_leaves() -> None:
    logits, label = np.zeros((5, CLASSES), np.uint8), np.zeros(5, np.int32)
    with pytest.raises(Interrupted):
        score_batches(code, batches(logits, label, 2), classes=CLASSES, batch_size=2, total=5, stop=lambda: True)


def test_per_class_file_has_a_row_a_class(tmp_path: Path) -> None:
    confusion = np.array([[3, 1, 0], [0, 0, 2], [0, 0, 0]])
    path = tmp_path / "classes.csv"
    write_per_class(path, Scores(6, 3, 6, 0.1, confusion), ("cat", "dog", "owl"))
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert [row["class"] for row in rows] == ["cat", "dog", "owl"]
    assert (rows[0]["images"], rows[0]["correct1"], rows[0]["most_confused_with"]) == ("4", "3", "dog")
    assert (rows[1]["top1"], rows[2]["top1"]) == ("0.000000", "")


def test_unwritable_per_class_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="absent"):
        write_per_class(tmp_path / "absent" / "x.csv", Scores(1, 1, 1, 0.0, np.eye(1, dtype=np.int64)), ("a",))
