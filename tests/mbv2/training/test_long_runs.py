"""Runs that go on longer, stop early, keep checkpoints, score two sets of weights and call a function."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imnet_prep.errors import TrainError
from mbv2.recipe import Recipe
from mbv2.training.config import _warn_of_others
from mbv2.training.logs import EpochRow, StepRow, read_metrics
from mbv2.training.options import CONFIG, RunOptions, stored_run
from mbv2.training.run import train
from mbv2.weights.checkpoint import read_checkpoint
from tests.mbv2.standin import memory_data

BATCH, STEPS = 8, 2  # an epoch
RECIPE = Recipe(
    epochs=4, batch_size=BATCH, image_size=32, width=0.35, lr=0.02, schedule="constant", warmup_frac=0, ema_decay=0.5,
    score_live=True, keep_every=2,
)  # fmt: skip
DATA = memory_data(images=STEPS * BATCH, val=9, batch=BATCH)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("small_network")]


def options(out: Path, epochs: int = RECIPE.epochs, *, resume: bool = False) -> RunOptions:
    recipe = replace(RECIPE, epochs=epochs)
    return RunOptions(out.parent, out, recipe, seed=3, log_every=1, resume=resume, tensorboard=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepRow | EpochRow]]:
    """A run of four epochs, and the rows that its function was called with."""
    rows: list[StepRow | EpochRow] = []
    out = tmp_path_factory.mktemp("straight") / "run"
    train(options(out), data=DATA, callback=rows.append)
    return out, rows


def test_a_run_that_broke_off_and_goes_on_longer_ends_in_the_same_bits(
    straight: tuple[Path, list[StepRow | EpochRow]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, seen = tmp_path / "run", []

    def break_off(row: StepRow | EpochRow) -> None:
        seen.append(row.step)
        if row.step == 3:
            raise FileNotFoundError(2, "the caller's own fault")  # as an error of the run's own files

    with pytest.raises(FileNotFoundError, match="own fault"):
        train(options(out, 2), data=DATA, callback=break_off)
    assert seen == [1, 2, 2, 3]
    assert read_checkpoint(out / "last.ckpt").meta.step == 3
    assert train(options(out, 2, resume=True), data=DATA).epochs == 2
    with pytest.raises(TrainError, match="epochs differ; expected epochs 2"):
        train(options(out, 1, resume=True), data=DATA)
    with pytest.raises(TrainError, match="epochs differ"):
        train(options(out, 4), data=DATA)
    with caplog.at_level(logging.INFO):
        assert train(options(out, 4, resume=True), data=DATA).epochs == 4
    assert "4 epochs in place of 2: the learning rate at step 4 stays 0.02" in caplog.text
    assert "the run began with" not in caplog.text
    stored = stored_run(out)
    assert stored is not None
    assert stored[0].epochs == 4
    for name in ("last.ckpt", "best.ckpt", "epoch-0002.ckpt", "epoch-0004.ckpt"):
        one, two = read_checkpoint(straight[0] / name), read_checkpoint(out / name)
        assert one.meta == two.meta
        assert all(np.array_equal(value, two.tensors[tensor]) for tensor, value in one.tensors.items())
    assert [row.live_loss for row in read_metrics(straight[0])] == [row.live_loss for row in read_metrics(out)]


def test_kept_checkpoints_are_those_of_their_epochs(straight: tuple[Path, list[StepRow | EpochRow]]) -> None:
    kept = sorted(path.name for path in straight[0].glob("epoch-*"))
    assert kept == ["epoch-0002.ckpt", "epoch-0004.ckpt"]
    second, last = (read_checkpoint(straight[0] / name) for name in ("epoch-0004.ckpt", "last.ckpt"))
    assert second.meta.metrics["top1"] == read_metrics(straight[0])[-1].val_top1
    assert all(np.array_equal(value, last.weights()[name]) for name, value in second.tensors.items())


def test_both_sets_of_weights_are_scored(straight: tuple[Path, list[StepRow | EpochRow]]) -> None:
    rows = read_metrics(straight[0])
    assert all(row.val_loss is not None and row.live_loss is not None for row in rows)
    assert all(row.val_loss != row.live_loss for row in rows)
    assert (straight[0] / "metrics.csv").read_text().splitlines()[0].endswith(",live_loss,live_top1,live_top5")


def test_the_function_is_called_with_what_the_logs_hold(straight: tuple[Path, list[StepRow | EpochRow]]) -> None:
    out, rows = straight
    assert [row for row in rows if isinstance(row, EpochRow)] == read_metrics(out)
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row.loss for row in rows if isinstance(row, StepRow)] == [row["loss"] for row in steps]
    assert [row.step for row in rows] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]


def test_a_run_that_goes_on_elsewhere_says_so(
    straight: tuple[Path, list[StepRow | EpochRow]], caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((straight[0] / CONFIG).read_text())
    now = {**config["computed_with"], **config["versions"]}
    assert {"operators", "operator_threads", "instruction_set", "decoder", "mindspore", "numpy"} <= set(now)
    _warn_of_others(config, now)
    for unknown in ({}, {"computed_with": 5}):  # lost, of an old version that did not say, or damaged
        _warn_of_others(unknown, now)
    assert caplog.text == ""
    _warn_of_others(config, now | {"operator_threads": 99, "numpy": "0"})
    assert len(caplog.records) == 1
    assert f"operator_threads {now['operator_threads']}, now 99; numpy {now['numpy']}, now 0" in caplog.text


def test_patience_ends_a_run_that_learns_nothing(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=9, lr=1e-12, patience=2, score_live=False, ema_decay=0.0, keep_every=0)
    run = replace(options(tmp_path / "run"), recipe=recipe, tensorboard=False)
    result = train(run, data=DATA)
    assert (result.epochs, result.stopped_early) == (3, True)
    assert ("epochs", "3, stopped early: no better top-1") in result.rows()
    again = train(run, data=DATA)
    assert (again.already_done, again.stopped_early, again.top1) == (True, True, result.top1)
    with pytest.raises(TrainError, match="patience counts evaluations; expected records with a val split"):
        train(replace(run, out=tmp_path / "other"), data=memory_data(images=16, val=0, batch=BATCH))
