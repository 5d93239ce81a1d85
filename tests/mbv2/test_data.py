"""A run's batches are made as its recipe says, on this rank's share of the machine."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep.errors import PipelineError
from imnet_prep.loader.batches import Batches
from imnet_prep.loader.options import TrainOptions
from mbv2.data import RunData, bad_record_options, batch_inputs, open_run_data, rank_share, sampling_of
from mbv2.recipe import Recipe
from mbv2.runtime import Runtime
from tests.records import entries, write_folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 images of three classes, of which one has 36, and 6 to score."""
    few = [entry for entry in entries(100) if entry[1] in (1, 2)][:6]
    many = [entry for entry in entries(200) if entry[1] == 0][:36]
    folder = tmp_path_factory.mktemp("data") / "records"
    return write_folder(folder, {"train": [*many, *few], "val": entries(6, seed=1)}, shards=1)


def opened(records: Path, stack: ExitStack, **fields: Any) -> RunData:
    recipe = Recipe(batch_size=6, image_size=32, **fields)
    return open_run_data(records, recipe, 3, stack, Runtime("CPU", threads=2))


def test_evaluation_has_a_size_of_its_own(records: Path) -> None:
    with ExitStack() as stack:
        data = opened(records, stack, eval_size=64, eval_crop=1.0)
        assert data.val is not None
        assert isinstance(data.val, Batches)
        assert (data.val.options.image_size, data.val.options.short_side) == (64, 64)  # type: ignore[union-attr]
        sizes = [next(iter(batches)).image.shape[1] for batches in (data.train.epoch(0), data.val.epoch(0))]  # type: ignore[union-attr]
        assert sizes == [32, 64]
        assert [next(data.train_view(view)).image.shape[1] for view in (0, 1)] == [64, 32]  # type: ignore[union-attr]


def test_balanced_sampling_shows_each_class_equally_often(records: Path) -> None:
    with ExitStack() as stack:
        for sampling, most in (("plain", 36), ("balanced", 14)):
            labels = np.concatenate([batch.label for batch in opened(records, stack, sampling=sampling).train.epoch(0)])
            assert np.bincount(labels).max() == most


def test_records_behind_a_url_come_shard_by_shard_in_the_same_batches(records: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    url = f"file://{records}"
    assert [sampling_of(Recipe(sampling=kind), url) for kind in ("plain", "balanced")] == ["blocks", "balanced"]
    assert sampling_of(Recipe(), records) == "plain"
    recipe = Recipe(batch_size=6, image_size=32, sampling="blocks")
    with ExitStack() as stack:
        here = open_run_data(records, recipe, 3, stack, Runtime("CPU", threads=2))
        there = open_run_data(url, recipe, 3, stack, Runtime("CPU", threads=2), cache=tmp_path)
        assert (here.digest, here.val_images) == (there.digest, there.val_images)
        for one, other in ((here.train, there.train), (here.val, there.val)):
            assert one is not None
            assert other is not None
            pairs = list(zip(one.epoch(1), other.epoch(1), strict=True))
            assert pairs
            assert all((batch_inputs(a) == batch_inputs(b)).all() for a, b in pairs)
        views = list(zip(here.train_view(1), there.train_view(1), strict=True))
        assert all((batch_inputs(a) == batch_inputs(b)).all() for a, b in views)


def test_every_augmentation_of_a_recipe_reaches_the_loader(records: Path) -> None:
    fields = {
        "crop_min": 0.3, "crop_max": 0.9, "flip": 0.1, "color_jitter": 0.2, "trivialaugment": True, "erasing_prob": 0.3,
        "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "mixup_prob": 0.4, "mixup_last_epoch": 7,
    }  # fmt: skip
    with ExitStack() as stack:
        train = opened(records, stack, **fields).train
        assert isinstance(train, Batches)
        assert train.options == TrainOptions(
            6, image_size=32, scale=(0.3, 0.9), flip_prob=0.1, color_jitter=(0.2, 0.2, 0.2, 0.0), trivialaugment=True,
            erasing_prob=0.3, mixup_alpha=0.2, cutmix_alpha=1.0, mixup_prob=0.4, mixup_last_epoch=7,
        )  # fmt: skip


def test_a_rank_decodes_with_as_many_threads_as_its_operators_or_as_asked(records: Path) -> None:
    here = Runtime("CPU", threads=8, rank=3, ranks=16, local_ranks=8)
    share = {"rank": 3, "ranks": 16, "local_ranks": 8}
    assert rank_share(here) == {**share, "workers": 8}
    assert rank_share(here, 5) == {**share, "workers": 5}
    with ExitStack() as stack, pytest.raises(PipelineError, match="workers is out of range"):
        open_run_data(records, Recipe(batch_size=6, image_size=32), 0, stack, Runtime("CPU", 2), workers=0)


def test_what_is_done_at_a_bad_record_is_the_loaders_option() -> None:
    assert bad_record_options("fail") == {"on_error": "raise"}
    assert bad_record_options("skip") == {"on_error": "skip"}
    assert bad_record_options("12") == {"on_error": "skip", "max_skipped": 12}
