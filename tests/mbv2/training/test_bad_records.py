"""Damaged records do not end a run, and change nothing between one process, two, and a run that is resumed."""

import itertools
import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep.errors import Interrupted, PipelineError, TrainError
from mbv2.data import open_run_data
from mbv2.network.model import ModelConfig
from mbv2.recipe import Recipe
from mbv2.runtime import Runtime
from mbv2.training.options import RunOptions
from mbv2.training.run import train
from mbv2.weights.checkpoint import Meta, read_checkpoint, save_checkpoint
from tests.mbv2.weights.test_convert import random_weights
from tests.records import entries, spoil_image, write_folder

TRAIN, VAL, BATCH = 600, 30, 50
RECIPE = Recipe(epochs=2, batch_size=BATCH, image_size=32, width=0.35, lr=0.01, warmup_frac=0)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("small_network")]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """600 training images, of which 5 are damaged, and 30 to score, of which 1 is; and the names of the six."""
    folder = tmp_path_factory.mktemp("data") / "records"
    write_folder(folder, {"train": entries(TRAIN), "val": entries(VAL, seed=1)}, shards=2)
    bad = [spoil_image(folder, *place)[1] for place in ((0, 0), (0, 299), (1, 17), (1, 18), (1, 200))]
    return folder, {*bad, spoil_image(folder, 0, 3, split="val")[1]}


def options(records: Path, out: Path, *, on_bad_record: str = "5", resume: bool = False) -> RunOptions:
    return RunOptions(records, out, RECIPE, save_every=4, log_every=1, on_bad_record=on_bad_record, resume=resume)


def test_a_run_skips_them_names_them_and_resumes_in_the_same_bits(
    records: tuple[Path, set[str]], tmp_path: Path
) -> None:
    folder, bad = records
    result = train(options(folder, tmp_path / "whole"))
    assert result.epochs == 2
    whole = read_checkpoint(tmp_path / "whole" / "last.ckpt")
    assert {len(rows) for rows in whole.meta.training["skipped"].values()} == {5, 1}
    log = (tmp_path / "whole" / "log.jsonl").read_text(encoding="utf-8")
    assert all(name in log for name in bad)
    assert set(result.skipped) == bad

    calls = itertools.count()
    with pytest.raises(Interrupted):
        train(options(folder, tmp_path / "again"), stop=lambda: next(calls) >= 6)
    train(options(folder, tmp_path / "again", resume=True))
    again = read_checkpoint(tmp_path / "again" / "last.ckpt")
    assert again.meta == whole.meta
    assert all(np.array_equal(value, again.tensors[name]) for name, value in whole.tensors.items())


def test_more_than_allowed_or_any_if_asked_are_an_error_that_names_them(records: tuple[Path, set[str]]) -> None:
    folder, bad = records
    with ExitStack() as stack:
        data = open_run_data(folder, RECIPE, 0, stack, Runtime("CPU", 1))
        with pytest.raises(PipelineError, match="at most 3 of 600") as caught:
            list(data.train.epoch(0))
        assert sum(name in str(caught.value) for name in bad) >= 4
        data = open_run_data(folder, RECIPE, 0, stack, Runtime("CPU", 1), on_bad_record="fail")
        with pytest.raises(PipelineError, match="the record is bad"):
            list(data.train.epoch(0))
        for text in ("ignore", "-1", "1.5", "5%", "", "²"):
            with pytest.raises(TrainError, match="fail, skip, or the number"):
                open_run_data(folder, RECIPE, 0, stack, Runtime("CPU", 1), on_bad_record=text)


def test_ranks_add_up_what_each_has_skipped(records: tuple[Path, set[str]]) -> None:
    folder, bad = records
    rank = Runtime("CPU", threads=1, ranks=2, local_ranks=2)
    with ExitStack() as stack:
        both = [
            open_run_data(folder, RECIPE, 0, stack, replace(rank, rank=number), on_bad_record="5") for number in (0, 1)
        ]
        for data in both:
            assert data.val is not None
            for batches in (data.train.epoch(0), data.train.epoch(1), data.val.epoch(0)):
                list(batches)
        given: list[list[NDArray[np.float32]]] = [[], []]  # what each rank adds to the sum: train, then val

        def note(own: list[NDArray[np.float32]], array: NDArray[np.float32]) -> NDArray[np.float32]:
            own.append(array)
            return array

        for own, data in zip(given, both, strict=True):
            data.share_skipped(partial(note, own))
        sums = [one + other for one, other in zip(*given, strict=True)]
        for data in both:
            turn = iter(sums)
            data.share_skipped(lambda _, turn=turn: next(turn))  # type: ignore[misc]
        names = [{row.file_name for row in data.skipped} for data in both]
        assert names == [bad, bad]
        assert all("SHA-256" in row.reason for data in both for row in data.skipped)


def test_a_pretrained_backbone_trains_its_head_on_the_good_ones(records: tuple[Path, set[str]], tmp_path: Path) -> None:
    folder, bad = records
    start = tmp_path / "start.ckpt"
    model = asdict(ModelConfig(classes=3, width=RECIPE.width))
    save_checkpoint(start, random_weights(RECIPE.width, classes=3), Meta(model, (), 32, 0.875))
    recipe = replace(RECIPE, freeze="backbone", feature_views=1, sampling="balanced")
    result = train(replace(options(folder, tmp_path / "head"), recipe=recipe, pretrained=start))
    assert result.epochs == 2
    assert set(result.skipped) == bad


def test_records_mended_since_are_scored_again(records: tuple[Path, set[str]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(records[0], tmp_path / "records"))

    def scored(state: dict[str, list[tuple[int, str]]]) -> tuple[int, int, dict[str, list[tuple[int, str]]]]:
        with ExitStack() as stack:
            data = open_run_data(folder, RECIPE, 0, stack, Runtime("CPU", 1))
            data.restore_skipped(state)
            assert data.val is not None
            return sum(map(len, data.val.epoch(0))), data.left_out(lambda array: array), data.skipped_state()

    images, left_out, state = scored({})
    assert (images, left_out) == (VAL - 1, 1)
    spoil_image(folder, 0, 3, split="val")  # the bit is flipped back
    images, left_out, _ = scored(state)
    assert images == VAL  # score_batches takes what is between all and all but those known as bad
    assert left_out == 1
