"""What a run says while it trains: a line per epoch, what a wait is for, one speed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mbv2.recipe import Recipe
from mbv2.scoring.score import Scores
from mbv2.training import progress
from mbv2.training.logs import verdict
from mbv2.training.options import BEST, RunResult
from mbv2.training.progress import StepResults, _duration
from mbv2.training.state import Position
from tests.mbv2.standin import memory_data

RECIPE = Recipe(epochs=3, batch_size=8)


class _Result:
    """What a step returns: its loss, the norm of its gradient, and whether a rank asked to stop."""

    def asnumpy(self) -> tuple[float, float, float]:
        return 0.5, 0.0, 0.0


def after_an_epoch(recipe: Recipe = RECIPE, *, classes: int = 3, epoch: int = 0, scored: bool = True) -> str:
    """Give the line of an epoch of five steps, of which the first compiles; the others take 0.1 s."""
    clock = 100.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "perf_counter", lambda: clock)
        data = memory_data(classes=classes)
        results = StepResults(recipe, data, 1, lambda step, got: pytest.fail(f"{step} {got}"))
        position = Position(epoch=epoch, step=5 * epoch, best_top1=0.75)
        for busy_s in (60.0, 0.1, 0.1, 0.1, 0.1):
            results.before_step()
            position.step, clock = position.step + 1, clock + busy_s
            results.add(position.step, (_Result(), None), 0.0, busy_s)
        results.read_back(position)
        position.epoch += 1
        scores = Scores(8, 4, 8, 0.9, np.eye(classes, dtype=np.int64)) if scored else None
        assert results.progress(position, 0.1).per_s == pytest.approx(80.0)
        clock += 3.6  # the evaluation
        return results.epoch_line(results.epoch_row(position, 0.1, scores, None), position)


def test_a_line_says_how_an_epoch_went() -> None:
    said = "epoch 1/3: loss 0.500, val loss 0.900, top-1 0.500, best 0.750, 80 images/s, 10 s left"
    assert after_an_epoch() == said


def test_the_last_line_tells_no_time_left() -> None:
    assert after_an_epoch(epoch=2).endswith("80 images/s")


def test_top_5_is_said_of_more_than_five_classes() -> None:
    assert "top-5 1.000" in after_an_epoch(classes=6)
    assert "top-5" not in after_an_epoch(classes=5)


def test_an_epoch_that_is_not_scored_says_so_much_less() -> None:
    assert after_an_epoch(epoch=2, scored=False) == "epoch 3/3: loss 0.500, best 0.750, 80 images/s"


def test_frozen_features_are_not_called_images() -> None:
    assert "80 features/s" in after_an_epoch(replace(RECIPE, freeze="backbone"))


def test_the_wait_for_compilation_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        after_an_epoch()
    assert caplog.messages == ["compiling the training step (about 15 s) ..."]


def test_the_first_evaluation_compiles_too(caplog: pytest.LogCaptureFixture) -> None:
    results = StepResults(RECIPE, memory_data(), 1, lambda step, got: pytest.fail(f"{step} {got}"))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with results.evaluation():
                pass
    assert caplog.messages == ["compiling the evaluation (a few seconds) ..."]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (600, "10.0 min"), (9000, "2.5 h")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


def test_advice_is_for_what_can_be_changed() -> None:
    assert verdict(0.02) == "compute-bound"
    assert "--short-side" in verdict(0.5)
    assert verdict(0.5, small=True) == "data-bound: give the loader more cores"
    assert verdict(0.5, cached=True) == "data-bound: keep the features on a faster disk (--features)"


def test_a_result_says_one_speed_and_only_what_applies() -> None:
    result = RunResult(0.9, 1.0, 3, 80.0, 0.02, Path("run") / BEST, classes=3)
    rows = dict(result.rows())
    assert rows == {
        "top-1": "0.9000", "epochs": "3", "speed": "80.0 images/s", "waiting for data": "2.0%",
        "checkpoint": str(Path("run") / BEST),
    }  # fmt: skip
    rows = dict(replace(result, cached=True, classes=6, data_wait_frac=0.5, already_done=True).rows())
    assert (rows["speed"], rows["top-5"]) == ("80.0 features/s", "1.0000")
    assert "--features" in rows["waiting for data"]
    assert rows["already done"] == "nothing was trained"
