"""The learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mbv2.recipe import Recipe
from mbv2.training.schedule import changed_rate, describe_rate, learning_rate, peak_lr

STEPS = 10  # an epoch


def rates(recipe: Recipe) -> list[float]:
    return [learning_rate(recipe, step, STEPS, recipe.batch_size) for step in range(recipe.epochs * STEPS)]


def test_warm_up_rises_linearly_to_the_peak() -> None:
    values = rates(Recipe(epochs=4, lr=0.4, warmup_frac=0.25))
    assert values[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert values[10] == pytest.approx(0.4)


def test_warm_up_in_epochs_does_not_depend_on_the_length_of_the_run() -> None:
    for epochs in (4, 40):
        values = rates(Recipe(epochs=epochs, lr=0.4, warmup_epochs=1.5))
        assert values[:16] == pytest.approx([*(0.4 * (step + 1) / 15 for step in range(15)), 0.4])
        assert values[16] < 0.4


def test_the_rate_in_use_is_described() -> None:
    scaled = Recipe(lr=0.1, lr_batch_size=64, backbone_lr_factor=0.1, warmup_frac=0.1, epochs=4)
    line = "learning rate 0.05 (0.1 for a batch of 64, scaled to 32), 0.005 before the classifier; 4 steps of warm-up, "
    assert describe_rate(scaled, STEPS, 32) == f"{line}then cosine"
    assert describe_rate(Recipe(lr=0.3, schedule="constant", warmup_frac=0), STEPS, 32) == "learning rate 0.3; constant"


def test_cosine_ends_at_its_floor() -> None:
    values = rates(Recipe(epochs=4, lr=1.0, warmup_frac=0, final_lr_frac=0.1))
    assert values[20] == pytest.approx(0.1 + 0.9 * 0.5)
    assert values[39] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 39 / 40)))
    assert values == sorted(values, reverse=True)


def test_linear_falls_by_equal_amounts() -> None:
    values = rates(Recipe(epochs=2, lr=1.0, warmup_frac=0, schedule="linear"))
    assert values == pytest.approx([1 - step / 20 for step in range(20)])


def test_step_drops_at_epoch_borders() -> None:
    values = rates(Recipe(epochs=4, lr=1.0, warmup_frac=0, schedule="step", step_epochs=2, step_gamma=0.1))
    assert values[19] == pytest.approx(1.0)
    assert values[20] == pytest.approx(0.1)


def test_constant_stays() -> None:
    assert set(rates(Recipe(epochs=2, lr=0.3, warmup_frac=0, schedule="constant"))) == {0.3}


def test_rate_scales_with_the_global_batch_only_where_the_recipe_says_so() -> None:
    assert peak_lr(Recipe(lr=0.4, lr_batch_size=1024), 256) == pytest.approx(0.1)
    assert peak_lr(Recipe(lr=0.4), 256) == 0.4


@pytest.mark.parametrize(
    ("schedule", "step", "said"),
    [
        ("constant", 5, "the learning rate at step 6 stays 1"),
        ("step", 5, "the learning rate at step 6 stays 0.98"),
        ("linear", 5, "the learning rate at step 6 changes from 0.5 to 0.75"),
        ("linear", 10, "the learning rate at step 10 changes from 0.1 to 0.55"),  # finished: its last step
    ],
)
def test_what_more_epochs_do_to_the_rate_is_said(schedule: str, step: int, said: str) -> None:
    old = Recipe(epochs=2, lr=1, schedule=schedule, warmup_frac=0)
    assert changed_rate(old, replace(old, epochs=4), step, 5, 1) == said
