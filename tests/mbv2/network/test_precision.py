"""The network with bfloat16 activations: what it stores, how near it stays to float32, and where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from imnet_prep.errors import RecipeError, TrainError
from mbv2 import kernels
from mbv2.kernels import operators
from mbv2.network.model import MobileNetV2, ModelConfig
from mbv2.recipe import Recipe
from tests.mbv2.twins import LossGradient, load_values, parameter_values

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())
CONFIG = ModelConfig(10, width=0.35, dropout=0.0)


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(RecipeError, match="float32 or bfloat16"):
        MobileNetV2(CONFIG, precision="float16")


def test_standard_operators_have_no_bfloat16() -> None:
    with pytest.raises(TrainError, match=r"bfloat16.*the C\+\+ operators.*precision=float32"):
        MobileNetV2(CONFIG, kernels="standard", precision="bfloat16")


def test_a_frozen_backbone_has_no_activations_to_store() -> None:
    with pytest.raises(RecipeError, match="precision"):
        Recipe(freeze="backbone", precision="bfloat16")


@needs_kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_convolutions_outputs_are_stored_as_asked(precision: str) -> None:
    class Forward(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.operator = operators.block_train(stem=False, stride=1, precision=precision)

        def construct(self, *inputs: Any) -> Any:
            return self.operator(*inputs)

    def unit(*shape: int) -> list[ms.Tensor]:
        ones, zeros = np.ones(shape[0], np.float32), np.zeros(shape[0], np.float32)
        return [ms.Tensor(value) for value in (np.ones(shape, np.float32), ones, zeros, zeros, ones)]

    x = ms.Tensor(np.random.default_rng(0).normal(size=(2, 4, 4, 8)).astype(np.float32))
    units = [*unit(16, 8, 1, 1), *unit(16, 1, 3, 3), *unit(8, 16, 1, 1)]
    options = operators.switches(), operators.numbers(1e-5, 0.9, (0.5,) * 3, (0.2,) * 3)
    made = Forward()(x, *units, *options)
    stored = getattr(ms, precision)
    assert [value.dtype for value in made] == [ms.float32, stored, stored, stored, *[ms.float32] * 9]


def cosine(one: Sequence[ms.Tensor], other: Sequence[ms.Tensor]) -> float:
    a, b = (np.concatenate([value.asnumpy().ravel() for value in values]) for values in (one, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@needs_kernels
@pytest.mark.usefixtures("small_network")
def test_inference_takes_the_products_that_are_asked_for() -> None:
    image = ms.Tensor(np.random.default_rng(2).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    nets = [
        MobileNetV2(CONFIG, kernels="native"),
        MobileNetV2(CONFIG, kernels="native", precision="bfloat16"),
        MobileNetV2(CONFIG, kernels="native", inference="bfloat16"),
    ]
    for net in nets[1:]:
        load_values(net, parameter_values(nets[0]))
    exact, trained_so, near = (net.set_train(False).features(image).asnumpy() for net in nets)
    assert np.array_equal(trained_so, exact), "how a step stores its activations does not touch inference"
    assert not np.array_equal(near, exact)
    assert np.abs(near - exact).max() < 2e-2 * np.abs(exact).max()


@needs_kernels
@pytest.mark.usefixtures("small_network")
@pytest.mark.slow
def test_a_step_is_near_that_in_float32() -> None:
    random = np.random.default_rng(1)
    image = ms.Tensor(random.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8))
    label = ms.Tensor(random.integers(0, 10, 16, dtype=np.int32))
    nets = [MobileNetV2(CONFIG, kernels="native", precision=precision) for precision in ("float32", "bfloat16")]
    load_values(nets[1], parameter_values(nets[0]))
    for net in nets:
        net.set_train()
    (loss, exact), (near, gradients) = (LossGradient(net)(image, label) for net in nets)
    assert float(near) == pytest.approx(float(loss), rel=5e-3)
    assert float(near) != float(loss)
    assert cosine(gradients, exact) > 0.998
    parts = [cosine([one], [other]) for one, other in zip(gradients, exact, strict=True)]
    assert np.median(parts) > 0.98  # a projection's beta has no gradient but rounding
