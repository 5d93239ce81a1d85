"""The network: its options and parameters, and that the C++ operators and MindSpore's own are one definition."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from imnet_prep.errors import RecipeError, TrainError
from mbv2 import kernels
from mbv2.model import MobileNetV2, ModelConfig, block_shapes, feature_count

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())
CONFIG = ModelConfig(10, width=0.35, dropout=0.0)


@pytest.mark.parametrize(
    "field",
    [{"classes": 0}, {"width": 0.3}, {"width": 1.5}, {"dropout": 1.0}, {"padding": "valid"}, {"std": (1.0, 0.0, 1.0)}],
)
def test_options_out_of_range_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(field))):
        ModelConfig(**{"classes": 10, **field})


@pytest.mark.parametrize(
    ("width", "parameters"),
    [(0.35, 1_677_128), (0.5, 1_968_680), (0.75, 2_636_424), (1.0, 3_504_872), (1.3, 5_386_792), (1.4, 6_108_776)],
)
def test_parameter_counts_are_the_published_ones(width: float, parameters: int) -> None:
    blocks = block_shapes(width)
    features, stem = feature_count(width), blocks[0].inputs
    count = stem * (27 + 2) + (features * (blocks[-1].outputs + 2)) + (features + 1) * 1000
    for block in blocks:
        if block.hidden != block.inputs:
            count += block.hidden * (block.inputs + 2)
        count += block.hidden * (9 + 2) + block.outputs * (block.hidden + 2)
    assert count == parameters


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(RecipeError, match="auto or native or standard"):
        MobileNetV2(CONFIG, kernels="fast")


def images(count: int, size: int, seed: int = 0) -> ms.Tensor:
    return ms.Tensor(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


class LossGradient(nn.Cell):
    """Loss and gradients of a batch, as one graph."""

    def __init__(self, net: MobileNetV2, batch: int) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.label = ms.Tensor(np.arange(batch, dtype=np.int32) % 10)
        self.gradient = ops.value_and_grad(self.loss, None, ms.ParameterTuple(net.trainable_params()))

    def loss(self, image: ms.Tensor) -> ms.Tensor:
        return ops.cross_entropy(self.net(image), self.label)

    def construct(self, image: ms.Tensor) -> Any:
        return self.gradient(image)


class Twins:
    """The same weights on both kinds of operators, a training step of each compiled once."""

    batch, size = 32, 64

    def __init__(self, padding: str) -> None:
        config = ModelConfig(10, width=0.35, dropout=0.0, padding=padding)
        self.standard = MobileNetV2(config, kernels="standard")
        self.native = MobileNetV2(config, kernels="native")
        self.steps = [LossGradient(net, self.batch) for net in (self.standard, self.native)]

    def align(self) -> None:
        """Give the C++ operators the weights and statistics of the standard ones."""
        for ours, theirs in zip(self.native.get_parameters(), self.standard.get_parameters(), strict=True):
            assert ours.name == theirs.name
            ours.set_data(ms.Tensor(theirs.asnumpy()))


@pytest.fixture(scope="module", params=["symmetric", "same"])
def twins(request: pytest.FixtureRequest) -> Twins:
    return Twins(request.param)


@needs_kernels
def test_both_kinds_of_operators_have_the_same_parameters(twins: Twins) -> None:
    for ours, theirs in zip(twins.native.get_parameters(), twins.standard.get_parameters(), strict=True):
        assert (ours.name, ours.shape, ours.requires_grad) == (theirs.name, theirs.shape, theirs.requires_grad)
    names = [p.name for p in twins.native.trainable_params()]
    assert names == [p.name for p in twins.standard.trainable_params()]
    assert {"stem.conv.weight", "blocks.3.expand.bn.gamma", "head.bn.beta", "classifier.bias"} <= set(names)


def relative_errors(got: Sequence[ms.Tensor], expected: Sequence[ms.Tensor]) -> list[float]:
    """Of each gradient tensor, in norm. Left out are those that are rounding alone: a projection's beta goes through a
    linear map into the next BatchNorm, which takes it out again."""
    norms = [float(np.linalg.norm(e.asnumpy())) for e in expected]
    pairs = zip(got, expected, norms, strict=True)
    return [float(np.linalg.norm(g.asnumpy() - e.asnumpy())) / n for g, e, n in pairs if n > 1e-5 * max(norms)]


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("twins", ["symmetric"], indirect=True)
def test_a_whole_step_agrees_at_states_of_a_run_on_standard_operators(twins: Twins) -> None:
    """Loss, gradients and moving statistics from the same weights, along a short run.

    ReLU6's gradient jumps at its bounds: where one value in a million lands on the other side, a gradient moves by a
    thousandth of its norm. The measure is therefore what standard operators do themselves when each weight moves by
    1e-6, about what rounding makes of a sum of some hundred products. `benchmarks/step_states.py` prints both.
    """
    twins.standard.set_train(True)
    twins.native.set_train(True)
    standard, native = twins.steps
    random = np.random.default_rng(0)
    for state in range(3):
        twins.align()
        weights = [parameter.asnumpy() for parameter in twins.standard.get_parameters()]
        image = images(twins.batch, twins.size, state)
        loss, gradients = standard(image)
        native_loss, native_gradients = native(image)
        assert abs(float(native_loss) / float(loss) - 1) < 1e-5
        for ours, theirs in zip(twins.native.get_parameters(), twins.standard.get_parameters(), strict=True):
            np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-4, atol=1e-5)
        for parameter, weight in zip(twins.standard.get_parameters(), weights, strict=True):
            nudge = random.uniform(-1e-6, 1e-6, weight.shape).astype(np.float32)
            parameter.set_data(ms.Tensor(weight * (1 + nudge)))
        nudged = relative_errors(standard(image)[1], gradients)
        errors = relative_errors(native_gradients, gradients)
        assert np.median(errors) < 1e-3 + 4 * np.median(nudged)
        assert max(errors) < 1e-3 + 4 * max(nudged)
        for parameter, weight in zip(twins.standard.get_parameters(), weights, strict=True):
            parameter.set_data(ms.Tensor(weight))
        for parameter, gradient in zip(twins.standard.trainable_params(), gradients, strict=True):
            parameter.set_data(ms.Tensor(parameter.asnumpy() - 0.05 * gradient.asnumpy()))


@needs_kernels
def test_inference_agrees_with_folded_batchnorm(twins: Twins) -> None:
    twins.align()
    twins.standard.set_train(False)
    twins.native.set_train(False)
    for count, size in ((3, 64), (1, 33)):
        image = images(count, size)
        expected = twins.standard(image).asnumpy()
        np.testing.assert_allclose(twins.native(image).asnumpy(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [pytest.param("native", marks=needs_kernels), "standard"])
def test_frozen_batchnorm_keeps_its_statistics_while_its_weights_train(kind: str) -> None:
    net = MobileNetV2(CONFIG, kernels=kind)
    net.freeze_batchnorm()
    net.set_train(False)
    image = images(2, 32)
    evaluated = net.features(image).asnumpy()
    net.set_train(True)
    gamma = net.blocks[1].expand.bn.gamma

    def total() -> ms.Tensor:
        return ops.sum(net.features(image))

    before = [p.asnumpy().copy() for p in net.get_parameters()]
    value, gradient = ops.value_and_grad(total, None, gamma)()
    assert float(value) == pytest.approx(evaluated.sum(), rel=1e-4)
    assert np.abs(gradient.asnumpy()).max() > 0
    for old, parameter in zip(before, net.get_parameters(), strict=True):
        np.testing.assert_array_equal(old, parameter.asnumpy())


@needs_kernels
def test_the_operators_refuse_what_is_not_uint8_rgb() -> None:
    net = MobileNetV2(CONFIG, kernels="native")
    net.set_train(False)
    with pytest.raises(Exception, match="4"):
        net(ms.Tensor(np.zeros((1, 32, 32, 4), np.uint8)))


def test_the_environment_hides_the_operators() -> None:
    code = (
        "from mbv2 import kernels; from mbv2.model import MobileNetV2, ModelConfig;"
        "print(kernels.available(), MobileNetV2(ModelConfig(2, width=0.35)).kernels, kernels.describe())"
    )
    environment = {**os.environ, kernels.ENVIRONMENT: "standard"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("False standard standard operators (")


def test_native_where_there_are_none_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", kernels.LIBRARY.with_name("absent.so"))
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    with pytest.raises(TrainError, match=r"install a C\+\+17 compiler"):
        MobileNetV2(CONFIG, kernels="native")
