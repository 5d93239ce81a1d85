"""Cached features: keyed, whole or absent, shuffled by sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep.errors import Interrupted, TrainError
from imnet_prep.types import Batch
from mbv2.network.model import ModelConfig
from mbv2.recipe import Recipe
from mbv2.training.features import FeatureSet, FeatureSource, _check_views, cache_key, compute_features, load_features
from mbv2.training.options import RunOptions
from mbv2.training.run import train
from mbv2.weights.checkpoint import Meta, read_checkpoint, save_checkpoint
from tests.mbv2.standin import memory_data
from tests.mbv2.weights.test_convert import random_weights

LENGTH = 4
pytestmark = pytest.mark.usefixtures("small_network")


def pooled(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return image.reshape(len(image), -1)[:, :LENGTH].astype(np.float32)


def batches(count: int, size: int = 4) -> Iterator[Batch]:
    image = np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)
    label, ids = np.arange(count, dtype=np.int32), np.arange(100, 100 + count, dtype=np.uint64)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        yield Batch(image[rows], label[rows], ids[rows])


def compute(folder: Path, count: int = 10, *, images: int = 10, left_out: int = 0, stop: bool = False) -> FeatureSet:
    return compute_features(
        folder, "train-0-x", pooled, batches(count), images=images, left_out=lambda: left_out, length=LENGTH,
        stop=lambda: stop, progress=None,
    )  # fmt: skip


def test_features_come_back_in_record_order(tmp_path: Path) -> None:
    made = compute(tmp_path)
    loaded = load_features(tmp_path, "train-0-x", 10)
    assert loaded is not None
    assert np.array_equal(loaded.features, made.features)
    assert loaded.label.tolist() == list(range(10))
    assert loaded.record_id.tolist() == [100 + row for row in range(10)]
    assert loaded.features[3].tolist() == [36, 37, 38, 39]


def test_an_interrupted_computation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        compute(tmp_path, stop=True)
    assert list(tmp_path.iterdir()) == []
    assert load_features(tmp_path, "train-0-x", 10) is None


@pytest.mark.parametrize("images", [9, 11])
def test_another_number_of_images_is_an_error(tmp_path: Path, images: int) -> None:
    with pytest.raises(TrainError, match=f"expected {images}"):
        compute(tmp_path, images=images)


def test_two_runs_that_share_a_folder_do_not_write_one_cache_at_once(tmp_path: Path) -> None:
    def meanwhile() -> bool:
        with pytest.raises(TrainError, match="another run is computing the same features"):
            compute(tmp_path)
        return False

    found = compute_features(
        tmp_path, "train-0-x", pooled, batches(10), images=10, left_out=lambda: 0, length=LENGTH, stop=meanwhile,
        progress=None,
    )  # fmt: skip
    assert np.array_equal(found.features, compute(tmp_path / "alone").features)
    assert not list(tmp_path.glob("partial-*"))


def test_a_cache_without_the_bad_images_is_made_again(tmp_path: Path) -> None:
    made = compute(tmp_path, 8, images=10, left_out=2)
    assert made.features.shape == (8, LENGTH)
    assert made.label.tolist() == list(range(8))
    assert load_features(tmp_path, "train-0-x", 10) is None
    assert len(compute(tmp_path, 10, left_out=2).label) == 10  # they have been mended since


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    compute(tmp_path)
    (tmp_path / "train-0-x.npy").write_bytes(b"nothing")
    with pytest.raises(TrainError, match=r"train-0-x\.npy"):
        load_features(tmp_path, "train-0-x", 10)


def test_the_key_follows_every_part() -> None:
    parts = {"weights": "a", "records": "b", "image_size": 224}
    keys = {cache_key(parts), *(cache_key({**parts, name: "other"}) for name in parts)}
    assert len(keys) == 4


def view(offset: int) -> FeatureSet:
    rows = np.arange(10)
    features = (rows[:, None] + offset + np.zeros((1, LENGTH))).astype(np.float32)
    return FeatureSet(features, rows.astype(np.int32), rows.astype(np.uint64))


def test_an_epoch_visits_samples_once_in_an_order_of_its_own() -> None:
    source = FeatureSource((view(0),), 3, training=True, seed=1)
    first = [batch.label.tolist() for batch in source.epoch(0)]
    assert source.steps_per_epoch == len(first) == 3
    rows = [row for batch in first for row in batch]
    assert len(set(rows)) == 9
    assert rows != sorted(rows)
    assert first == [batch.label.tolist() for batch in source.epoch(0)]
    assert first[1:] == [batch.label.tolist() for batch in source.epoch(0, 1)]
    assert first != [batch.label.tolist() for batch in source.epoch(1)]


def test_a_balanced_epoch_takes_each_class_equally_often() -> None:
    rows = np.arange(10)
    few = FeatureSet(np.zeros((10, LENGTH), np.float32), (rows == 9).astype(np.int32), rows.astype(np.uint64))
    source = FeatureSource((few,), 10, training=True, balanced=True)
    labels = [next(source.epoch(number)).label.tolist() for number in range(3)]
    assert [sum(one) for one in labels] == [5, 5, 5]
    assert len({tuple(one) for one in labels}) == 3


def test_views_are_drawn_by_epoch_and_stay_with_their_sample() -> None:
    source = FeatureSource((view(0), view(100)), 5, training=True)
    drawn: set[int] = set()
    for epoch in range(4):
        for batch in source.epoch(epoch):
            drawn |= {int(value) for value in batch.features[:, 0] // 100}
            assert np.array_equal(batch.features[:, 0] % 100, batch.label)
    assert drawn == {0, 1}


def test_views_of_different_images_are_refused() -> None:
    _check_views((view(0), view(100)), 10)
    other = FeatureSet(view(0).features[1:], view(0).label[1:], view(0).record_id[1:])
    with pytest.raises(TrainError, match="bad in one augmented view"):
        _check_views((view(0), other), 8)
    with pytest.raises(TrainError, match="got 9 of 10"):
        _check_views((other,), 10)


def test_scoring_takes_every_row_in_order() -> None:
    source = FeatureSource((view(0),), 4, training=False)
    assert [row for batch in source.epoch(0) for row in batch.label] == list(range(10))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another class count."""
    path = tmp_path_factory.mktemp("pretrained") / "start.ckpt"
    save_checkpoint(path, random_weights(0.35, classes=5), Meta(asdict(ModelConfig(5, width=0.35)), (), 32, 0.875))
    return path


@pytest.mark.slow
def test_head_training_caches_features_and_leaves_the_backbone_alone(pretrained: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        epochs=6, batch_size=8, image_size=32, width=0.35, lr=0.05, freeze="backbone", feature_views=1, warmup_frac=0
    )
    options = RunOptions(tmp_path, tmp_path / "run", recipe, pretrained=pretrained, features=tmp_path / "cache")
    result = train(options, data=memory_data())
    assert result.top1 is not None
    start, end = read_checkpoint(pretrained), read_checkpoint(result.checkpoint)
    assert end.meta.model["classes"] == 3
    for name, value in start.tensors.items():
        if not name.startswith("classifier."):
            assert np.array_equal(value, end.tensors[name]), name
    assert end.tensors["classifier.weight"].shape == (3, 1280)
    caches = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(caches) == 9  # two views of train and one of val, three files each
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    other = replace(options, out=tmp_path / "other", recipe=replace(recipe, lr=0.01))
    train(other, data=memory_data())
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


@pytest.mark.slow
def test_frozen_batchnorm_keeps_its_statistics_while_weights_train(pretrained: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=8, image_size=32, width=0.35, lr=0.05, freeze="bn", warmup_frac=0)
    result = train(RunOptions(tmp_path, tmp_path / "run", recipe, pretrained=pretrained), data=memory_data())
    start, end = read_checkpoint(pretrained).tensors, read_checkpoint(result.checkpoint).tensors
    for name, value in start.items():
        same = name not in end or np.array_equal(value, end[name]) if value.shape == end[name].shape else False
        assert same == ("moving_" in name), name


def test_head_training_needs_pretrained_weights(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="--pretrained"):
        RunOptions(tmp_path, tmp_path, Recipe(freeze="backbone"))


@pytest.mark.slow
def test_another_width_is_refused(pretrained: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=8, image_size=32, width=0.5)
    with pytest.raises(TrainError, match=r"width 0\.35"):
        train(RunOptions(tmp_path, tmp_path / "run", recipe, pretrained=pretrained), data=memory_data())
