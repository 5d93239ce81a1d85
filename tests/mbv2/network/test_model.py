"""The network: its options and parameters, and that the C++ operators and MindSpore's own are one definition."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops
from numpy.typing import NDArray

from imnet_prep.errors import RecipeError, TrainError
from mbv2 import kernels
from mbv2.network.model import MobileNetV2, ModelConfig, block_shapes, feature_count
from mbv2.runtime import Runtime
from tests.mbv2.blocks import Floats
from tests.mbv2.reference import Network
from tests.mbv2.small_network import STAGES
from tests.mbv2.twins import LossGradient, load_values, native_sides, parameter_values, standard_sides

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())
CONFIG = ModelConfig(10, width=0.35, dropout=0.0)
LONG_WHOLE = pytest.param("symmetric whole", marks=pytest.mark.long)


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


class Twins:
    """The same weights on both kinds of operators, a training step of each compiled once."""

    batch = 16

    def __init__(self, padding: str, depth: str) -> None:
        self.size, self.within = (64, 1e-3) if depth == "whole" else (32, 1e-4)
        config = ModelConfig(10, width=0.35, dropout=0.0, padding=padding)
        with pytest.MonkeyPatch.context() as patch:
            if depth == "small":
                patch.setattr("mbv2.network.model._STAGES", STAGES)
            self.standard = MobileNetV2(config, kernels="standard")
            self.native = MobileNetV2(config, kernels="native")
        self.steps = [LossGradient(net) for net in (self.standard, self.native)]
        self.names = [parameter.name for parameter in self.standard.trainable_params()]

    def align(self) -> None:
        """Copy the weights and statistics of the standard operators to the C++ ones."""
        load_values(self.native, parameter_values(self.standard))

    def run(self, number: int, image: NDArray[np.uint8], label: NDArray[np.int32]) -> tuple[float, dict[str, Floats]]:
        """Loss and gradients by name, of the standard (0) or the C++ operators (1)."""
        loss, gradients = self.steps[number](ms.Tensor(image), ms.Tensor(label))
        return float(loss), {name: g.asnumpy() for name, g in zip(self.names, gradients, strict=True)}


@pytest.fixture(scope="module", params=["symmetric small", "same small"])
def twins(request: pytest.FixtureRequest) -> Twins:
    return Twins(*request.param.split())


@needs_kernels
def test_both_kinds_of_operators_have_the_same_parameters(twins: Twins) -> None:
    for ours, theirs in zip(twins.native.get_parameters(), twins.standard.get_parameters(), strict=True):
        assert (ours.name, ours.shape, ours.requires_grad) == (theirs.name, theirs.shape, theirs.requires_grad)
    names = [p.name for p in twins.native.trainable_params()]
    assert names == [p.name for p in twins.standard.trainable_params()]
    assert {"stem.conv.weight", "blocks.2.expand.bn.gamma", "head.bn.beta", "classifier.bias"} <= set(names)


def norm(value: NDArray[Any]) -> float:
    return float(np.linalg.norm(value))


def assert_close(got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], within: float) -> None:
    """Each gradient tensor to so much in norm. Left out are those that are rounding alone: a projection's beta goes
    through a linear map into the next BatchNorm, which takes it out again."""
    floor = 1e-5 * max(norm(value) for value in expected.values())
    judged = {name for name, value in expected.items() if norm(value) > floor}
    assert len(judged) > 0.7 * len(expected)
    for name in judged:
        assert norm(got[name] - expected[name]) < within * norm(expected[name]), name


@needs_kernels
@pytest.mark.long
@pytest.mark.parametrize("twins", ["symmetric whole"], indirect=True)
def test_a_whole_step_agrees_at_states_of_a_run_on_standard_operators(twins: Twins) -> None:
    """Loss, gradients and moving statistics from the same weights, along a short run.

    ReLU6's gradient jumps at its bounds, and one value in a million lies within rounding of one. The operators' own
    share of a gradient's difference is therefore judged apart from that of values that lie on different pieces of ReLU6
    (flips): float64 says what exactly these change. `benchmarks/step_states.py` prints it for whole runs.
    """
    twins.standard.set_train(True)
    twins.native.set_train(True)
    random = np.random.default_rng(0)
    label = np.arange(twins.batch, dtype=np.int32) % 10
    for step in range(5):
        weights = parameter_values(twins.standard)
        image = random.integers(0, 256, (twins.batch, twins.size, twins.size, 3), dtype=np.uint8)
        loss, gradients = twins.run(0, image, label)
        if step in (2, 4):
            load_values(twins.native, weights)
            native_loss, native_gradients = twins.run(1, image, label)
            assert abs(native_loss / loss - 1) < 1e-5
            for ours, theirs in zip(twins.native.get_parameters(), twins.standard.get_parameters(), strict=True):
                np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-4, atol=1e-5)
            load_values(twins.native, weights)
            load_values(twins.standard, weights)
            there = standard_sides(twins.standard, image), native_sides(twins.native, image)
            reference = Network(weights, [block.shape for block in twins.native.blocks])
            as_standard = reference.step(image, label, forced=there[0])[1]
            as_native = reference.step(image, label, forced=there[1])[1]
            assert_close(native_gradients, as_native, twins.within)
            assert_close(
                native_gradients,
                {name: value + as_native[name] - as_standard[name] for name, value in gradients.items()},
                twins.within,
            )
            for unit in reference.units:  # a flip is rounding, never a value far from the bounds
                if unit.relu6:
                    flipped = unit.v[there[0][unit.name] != there[1][unit.name]]
                    assert (np.minimum(np.abs(flipped), np.abs(flipped - 6)) < 1e-4).all()
        load_values(twins.standard, {name: value - 0.05 * gradients.get(name, 0) for name, value in weights.items()})


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("twins", ["symmetric small", LONG_WHOLE], indirect=True)
def test_gradients_agree_directly_where_no_value_is_near_a_bound_of_relu6(twins: Twins) -> None:
    twins.standard.set_train(True)
    twins.native.set_train(True)
    random = np.random.default_rng(1)
    values = parameter_values(twins.standard)
    for name, value in values.items():
        if name.endswith("bn.beta"):
            values[name] = random.normal(0, 0.5, value.shape).astype(np.float32)
    image = random.integers(0, 256, (twins.batch, twins.size, twins.size, 3), dtype=np.uint8)
    label = np.arange(twins.batch, dtype=np.int32) % 10
    reference = Network(values, [block.shape for block in twins.native.blocks])
    assert reference.leave_room(image) > 1e-5
    for unit in reference.units:
        values[f"{unit.name}.bn.beta"] = reference.weights[f"{unit.name}.bn.beta"].astype(np.float32)
    load_values(twins.standard, values)
    load_values(twins.native, values)
    there = standard_sides(twins.standard, image), native_sides(twins.native, image)
    for name, side in there[0].items():
        np.testing.assert_array_equal(side, there[1][name])
    load_values(twins.standard, values)
    (loss, gradients), (native_loss, native_gradients) = (twins.run(number, image, label) for number in (0, 1))
    assert abs(native_loss / loss - 1) < 1e-5
    assert_close(native_gradients, gradients, twins.within)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("twins", ["symmetric small", "same small", LONG_WHOLE], indirect=True)
def test_inference_agrees_with_folded_batchnorm(twins: Twins) -> None:
    twins.align()
    twins.standard.set_train(False)
    twins.native.set_train(False)
    for count, size in ((3, 64), (1, 33)):
        image = images(count, size)
        expected = twins.standard(image).asnumpy()
        within = 1e-2 * twins.within * np.abs(expected).max()
        np.testing.assert_allclose(twins.native(image).asnumpy(), expected, atol=within)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("native", marks=needs_kernels), "standard"])
def test_frozen_batchnorm_keeps_its_statistics_while_its_weights_train(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbv2.network.model._STAGES", STAGES)
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


@needs_kernels
def test_the_operators_use_the_threads_that_this_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbv2.network.model.runtime", lambda: Runtime("CPU", 3))
    try:
        assert MobileNetV2(CONFIG).kernels == "native"
        assert kernels.threads() == 3
    finally:
        kernels.set_threads(0)


@pytest.mark.slow
def test_the_environment_hides_the_operators() -> None:
    code = (
        "from mbv2 import kernels; from mbv2.network.model import MobileNetV2, ModelConfig;"
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
