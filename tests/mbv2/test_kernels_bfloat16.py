"""The operators that store convolution outputs as bfloat16.

What is stored is the rounded sum, and what is computed from it is what float64 computes from it. Where the processor
multiplies bfloat16, 1x1 convolutions round their operands too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mbv2 import kernels
from mbv2.network.model import BlockShape
from tests.mbv2 import reference
from tests.mbv2.blocks import BlockCall, Floats, head_grad, head_infer, head_train, sides_of, widened
from tests.mbv2.reference import Array, Unit
from tests.mbv2.test_kernels_widths import BLOCKS, FIRST_BLOCKS, HEADS, difference, normal, parameters

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())

PAIRS = kernels.instruction_set() in ("amx", "avx512bf16")  # whose products take bfloat16, and no subnormal numbers
# Largest difference over largest value: gradients are rounded twice on their way, by 2e-3 each, and with PAIRS so is
# what they are multiplied by.
CLOSE = 2.5e-2 if PAIRS else 1.5e-2
EXPANDED, STEM = ("expand", "depthwise", "project"), ("stem", "depthwise", "project")


@pytest.fixture(autouse=True)
def pools() -> Iterator[None]:
    yield
    kernels.set_threads(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(22)


def rounded(x: Floats) -> NDArray[np.uint16]:
    """The nearest bfloat16, ties to the even one; NaN stays NaN."""
    bits = x.view(np.uint32).astype(np.uint64)
    up = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), ((bits >> 16) | 0x40).astype(np.uint16), up)


def operand(x: Array) -> Array:
    """What a 1x1 convolution multiplies."""
    return widened(rounded(x.astype(np.float32))).astype(np.float64) if PAIRS else x


def convolved(unit: Unit, x: Array) -> Array:
    """The unit's convolution of what it multiplies, in float64."""
    if unit.kind != "pointwise":
        return unit.convolved(x)
    weights = {name: operand(value) if name.endswith("conv.weight") else value for name, value in unit.weights.items()}
    return Unit("pointwise", unit.name, weights, relu6=unit.relu6).convolved(operand(x))


def test_rounding_of_every_kind_of_number(rng: np.random.Generator) -> None:
    """An identity as the first weights makes the stored output that of the input."""
    special = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 3e-45, -1e-40, 3.4e38, -3.4e38, 1.17e-38, 6.0]
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x3F80FFFF, 0x7F7FFFFF, 0x7F800001], np.uint32)
    random = rng.integers(0, 1 << 32, 8 * 512 - len(special) - len(ties), dtype=np.uint32)
    x = np.concatenate([np.array(special, np.float32), ties.view(np.float32), random.view(np.float32)])
    x = np.where(np.isfinite(x) | (np.arange(len(x)) < 40), x, np.float32(1)).reshape(1, 1, 512, 8)
    for at in range(8):  # alone, as NaN and infinity spoil a sum in which they are multiplied by zero
        weights = np.zeros((8, 8, 1, 1), np.float32)
        weights[at, at] = 1
        alone = np.where(np.arange(8) == at, x, np.float32(0))
        values = parameters(rng, {"expand": (8, 8, 1, 1), "depthwise": (8, 1, 3, 3), "project": (8, 8, 1, 1)})
        call = BlockCall(BlockShape(8, 8, 8, 1), EXPANDED, precision="bfloat16")
        stored = call.train({**values, "expand.conv.weight": weights}, alone)[1][..., at]
        with np.errstate(invalid="ignore"):
            sums = x[..., at] + np.float32(0)  # as in the product, where -0 becomes 0
            if PAIRS:
                sums = np.where(np.abs(sums) < np.finfo(np.float32).tiny, np.float32(0), sums)
        assert np.array_equal(np.isnan(widened(stored)), np.isnan(sums))
        fine = ~np.isnan(sums)
        assert np.array_equal(stored[fine], rounded(sums)[fine])


def activated(unit: Unit, saved: Floats) -> Array:
    """What the next convolution reads: with the BatchNorm that the operator saved, on the side where it was."""
    v = unit.y * saved[2] + saved[3]
    return np.where(unit.side == 1, v, np.where(unit.side == 2, 6.0, 0.0)) if unit.relu6 else v


def check(call: BlockCall, units: list[Unit], values: dict[str, Floats], x: NDArray[Any], rng: Any) -> None:
    made = call.train(values, x)
    whole = BlockCall(call.shape, call.units, call.same).train(values, x)
    assert [made[i].dtype.name for i in range(4)] == ["float32", "uint16", "uint16", "uint16"]
    if call.stem or not PAIRS:
        assert np.array_equal(made[1], rounded(whole[1])), "the first convolution reads what the float32 operator reads"
    dz = normal(rng, *made[0].shape)
    sides, start = call.sides(made), reference.pixels(x) if call.stem else x.astype(np.float64)
    a = start
    for unit, y, saved in zip(units, call.outputs(made), made[4:7], strict=True):
        exact = convolved(unit, a)
        ulp = np.abs(exact) * 2.0**-8 + np.abs(exact).max() * 1e-5
        assert (np.abs(y - exact) <= ulp).all(), unit.name
        unit.x, unit.y, unit.side = a, y.astype(np.float64), sides.get(unit.name, unit.side)
        a = activated(unit, saved)
    residual = call.shape.residual and not call.stem
    assert difference(made[0], a + start if residual else a) < CLOSE
    grads: dict[str, Any] = {}
    d = dz.astype(np.float64)
    for unit in reversed(units):
        d = unit.backward(d, grads)
    if not call.stem:
        grads["x"] = d + dz if residual else d
    for name, value in call.grad(values, x, made, dz).items():
        assert difference(value, grads[name]) < CLOSE, (call.shape, name)
    inferred, whole_inferred = call.infer(values, x), BlockCall(call.shape, call.units, call.same).infer(values, x)
    assert difference(inferred, whole_inferred.astype(np.float64)) < CLOSE
    assert np.array_equal(inferred, whole_inferred) != PAIRS, "float32 where the processor multiplies nothing else"


@pytest.mark.slow
@pytest.mark.parametrize("same", [0, 1])
def test_whole_blocks(rng: np.random.Generator, same: int) -> None:
    sizes = itertools.cycle([((2, 5, 3), 1), ((1, 7, 9), 2), ((3, 6, 5), 3)])
    for (inputs, hidden, outputs, stride), (size, threads) in zip(BLOCKS[same::4], sizes, strict=False):
        kernels.set_threads(threads)
        shapes = {"expand": (hidden, inputs, 1, 1), "depthwise": (hidden, 1, 3, 3), "project": (outputs, hidden, 1, 1)}
        values, x = parameters(rng, shapes), normal(rng, *size, inputs)
        weights = {name: value.astype(np.float64) for name, value in values.items()}
        units = [
            Unit("pointwise", "expand", weights),
            Unit("depthwise", "depthwise", weights, stride, same=same),
            Unit("pointwise", "project", weights, relu6=False),
        ]
        call = BlockCall(BlockShape(inputs, hidden, outputs, stride), EXPANDED, same, "bfloat16")
        check(call, units, values, x, rng)


def test_whole_first_blocks(rng: np.random.Generator) -> None:
    for number, (inputs, hidden, outputs, stride) in enumerate(FIRST_BLOCKS):
        kernels.set_threads(1 + number % 3)
        shapes = {"stem": (hidden, 3, 3, 3), "depthwise": (hidden, 1, 3, 3), "project": (outputs, hidden, 1, 1)}
        values = parameters(rng, shapes)
        weights = {name: value.astype(np.float64) for name, value in values.items()}
        units = [
            Unit("stem", "stem", weights),
            Unit("depthwise", "depthwise", weights, stride),
            Unit("pointwise", "project", weights, relu6=False),
        ]
        call = BlockCall(BlockShape(inputs, hidden, outputs, stride), STEM, precision="bfloat16")
        check(call, units, values, rng.integers(0, 256, (2, 13, 10, 3), dtype=np.uint8), rng)


def test_whole_heads(rng: np.random.Generator) -> None:
    for inputs, outputs in HEADS[:2]:
        values, x = parameters(rng, {"head": (outputs, inputs, 1, 1)}), normal(rng, 3, 3, 5, inputs)
        made, dpooled = head_train(values, x, "bfloat16"), normal(rng, 3, outputs)
        if not PAIRS:
            assert np.array_equal(made[1], rounded(head_train(values, x)[1]))
        head = Unit("pointwise", "head", {name: value.astype(np.float64) for name, value in values.items()})
        y = widened(made[1])
        exact = convolved(head, x.astype(np.float64))
        assert (np.abs(y - exact) <= np.abs(exact) * 2.0**-8 + np.abs(exact).max() * 1e-5).all()
        head.x, head.y, head.side = x.astype(np.float64), y.astype(np.float64), sides_of(y, made[2])
        a = activated(head, made[2])
        assert difference(made[0], a.mean((1, 2))) < CLOSE
        grads: dict[str, Any] = {}
        spread = np.broadcast_to(dpooled[:, None, None, :].astype(np.float64) / 15, y.shape)
        grads["x"] = head.backward(spread, grads)
        for name, value in head_grad(values, x, made, dpooled, "bfloat16").items():
            assert difference(value, grads[name]) < CLOSE, (outputs, name)
        assert difference(head_infer(values, x, "bfloat16"), head_infer(values, x).astype(np.float64)) < CLOSE
