"""The optimizers' operator against float64 NumPy, for weights of odd sizes, several decays and rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imnet_prep.errors import TrainError
from mbv2 import kernels
from mbv2.recipe import Recipe
from mbv2.training.optimizer import SLOTS, step_controls
from tests.mbv2.blocks import Floats, empty
from tests.mbv2.reference import Array, update

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())

RECIPES = {
    "sgd": Recipe(momentum=0.8),
    "nesterov": Recipe(optimizer="nesterov", momentum=0.8),
    "adamw": Recipe(optimizer="adamw", beta1=0.7, beta2=0.9, epsilon=1e-3),
    "rmsprop": Recipe(optimizer="rmsprop", momentum=0.8, rms_decay=0.6, epsilon=1e-3),
}
SHAPES = [(1,), (7, 1), (3, 5, 3, 3), (40, 24, 1, 1), (129,), (1001, 13)]
DECAYS, FACTORS = [0.0, 0.1, 0.3, 0.05, 0.0, 0.2], [1.0, 0.1, 0.5, 1.0, 2.0, 0.3]
STEPS, LR = 4, 0.1


def steps(rule: str, threads: int) -> tuple[list[Floats], list[Array]]:
    """Return the weights after some steps, and what they are by the definition."""
    kernels.set_threads(threads)
    recipe, rng = RECIPES[rule], np.random.default_rng(1)
    one, two = (recipe.beta1, recipe.beta2) if rule == "adamw" else (recipe.momentum, recipe.rms_decay)
    constants = ([one, two, recipe.epsilon, 1 - one, 1 - two], DECAYS, FACTORS)
    fixed = [np.array(values, np.float32) for values in constants]
    number = np.array([list(SLOTS).index(rule)], np.int32)
    weights = [rng.standard_normal(shape, np.float32) for shape in SHAPES]
    starts = [float(start == "ones") for start in SLOTS[rule].values()]
    state = [np.full(shape, start, np.float32) for start in starts for shape in SHAPES]
    wanted = [[weight.astype(np.float64)] for weight in weights]
    kept = [{"first": [np.zeros(shape)], "second": [np.full(shape, starts[-1])]} for shape in SHAPES]
    for step in range(STEPS):
        gradients = [rng.standard_normal(shape, np.float32) for shape in SHAPES]
        controls = step_controls(recipe, LR, step)
        kernels.call("update", [number, controls, *fixed, *gradients, *weights, *state], [empty(1)])
        for i, gradient in enumerate(gradients):
            decaying = replace(recipe, weight_decay=DECAYS[i])
            update(decaying, step + 1, LR * FACTORS[i], wanted[i], [gradient.astype(np.float64)], kept[i])
    kernels.set_threads(0)
    return weights, [weight for (weight,) in wanted]


@pytest.mark.parametrize("rule", list(SLOTS))
def test_steps_equal_the_definition(rule: str) -> None:
    for got, wanted in zip(*steps(rule, 2), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", list(SLOTS))
def test_the_number_of_threads_changes_no_bit(rule: str) -> None:
    alone, _ = steps(rule, 1)
    for threads in (2, 3):
        assert all(map(np.array_equal, alone, steps(rule, threads)[0]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: [np.array([4], np.int32), *t[1:]], "no rule has the number 4"),
        (lambda t: [*t[:-1], np.zeros(3, np.float32)], "first state 2 must have the gradient's 6 values, got 3"),
        (lambda t: t[:-1], "must have|expects more tensors"),
        (lambda t: [np.array([2], np.int32), *t[1:]], "expects more tensors|second state"),
        (lambda t: [*t[:5], t[5].astype(np.float64), *t[6:]], "gradient must be float32, got float64"),
    ],
)
def test_what_does_not_fit_is_refused(change: object, says: str) -> None:
    two = [np.ones(1, np.float32), np.ones((2, 3), np.float32)]
    constants = [np.ones(5, np.float32), np.zeros(2, np.float32), np.ones(2, np.float32)]
    tensors = [np.array([0], np.int32), np.ones(6, np.float32), *constants, *two, *two, *two]
    kernels.call("update", tensors, [empty(1)])
    assert callable(change)
    with pytest.raises(TrainError, match=says):
        kernels.call("update", change(tensors), [empty(1)])
