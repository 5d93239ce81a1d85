"""The C++ operators against float64 NumPy at the channel counts of every width: odd sizes, 1x1 maps, batch 1, both
paddings, pools of one to three threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mbv2 import kernels
from mbv2.network.model import BlockShape, block_shapes, feature_count
from tests.mbv2 import reference
from tests.mbv2.blocks import (
    MOMENTUM,
    NUMBERS,
    BlockCall,
    Floats,
    empty,
    head_grad,
    head_infer,
    head_train,
    sides_of,
    switches,
)
from tests.mbv2.reference import EPS, Array, Unit

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())

WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.1, 1.3, 1.4)
POOLS = (1, 2, 3)
CLOSE, CLOSE_WEIGHTS = 1e-5, 1e-4  # largest difference over largest value
SIZES = ((1, 1, 1), (2, 5, 3), (1, 7, 9))  # images, height, width
some_widths = pytest.mark.parametrize(
    "widths", [(0.35, 0.75, 1.4), pytest.param(WIDTHS, marks=pytest.mark.long)], ids=["few", "all"]
)
Shapes = list[tuple[int, int, int, int]]  # inputs, hidden, outputs, stride


def blocks(widths: Sequence[float]) -> Shapes:
    return sorted({(s.inputs, s.hidden, s.outputs, s.stride) for width in widths for s in block_shapes(width)[1:]})


def first_blocks(widths: Sequence[float]) -> Shapes:
    return sorted({(s.inputs, s.hidden, s.outputs, s.stride) for s in (block_shapes(w)[0] for w in widths)})


def heads(widths: Sequence[float]) -> list[tuple[int, int]]:
    return sorted({(block_shapes(width)[-1].outputs, feature_count(width)) for width in widths})


BLOCKS, FIRST_BLOCKS, HEADS = blocks(WIDTHS), first_blocks(WIDTHS), heads(WIDTHS)


@pytest.fixture(autouse=True)
def pools() -> Iterator[None]:
    yield
    kernels.set_threads(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(21)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, np.float32)


def difference(got: Floats, expected: Array) -> float:
    return float(np.abs(got.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-30))


def wide(*arrays: NDArray[Any]) -> list[Array]:
    return [array.astype(np.float64) for array in arrays]


def test_the_shapes_are_those_of_the_narrowest_and_the_widest_network() -> None:
    assert (8, 48, 8, 1) in BLOCKS
    assert (224, 1344, 448, 1) in BLOCKS
    assert HEADS[0] == (112, 1280)
    assert HEADS[-1] == (448, 1792)


@pytest.mark.parametrize(("stride", "same"), list(itertools.product((1, 2), (0, 1))))
def test_depthwise(rng: np.random.Generator, stride: int, same: int) -> None:
    hidden = sorted({shape[1] for shape in BLOCKS + FIRST_BLOCKS if shape[3] == stride})
    options = [switches(stride=stride, same=same), NUMBERS]
    for c, (n, h, w) in itertools.product(hidden, SIZES):
        x, weights = normal(rng, n, h, w, c), normal(rng, c, 1, 3, 3)
        dy = normal(rng, n, -(-h // stride), -(-w // stride), c)
        x64, w64, dy64 = wide(x, weights, dy)
        expected = (
            reference.depthwise(x64, w64, stride, same),
            reference.depthwise_grad_data(dy64, w64, x.shape, stride, same),
            reference.depthwise_grad_weights(dy64, x64, stride, same),
        )
        for threads in POOLS:
            kernels.set_threads(threads)
            y, dx, dw = empty(*dy.shape), empty(*x.shape), empty(*weights.shape)
            kernels.call("depthwise", [x, weights, *options], [y])
            kernels.call("depthwise_grad_data", [dy, weights, *options], [dx])
            kernels.call("depthwise_grad_weights", [dy, x, *options], [dw])
            assert difference(y, expected[0]) < CLOSE
            assert difference(dx, expected[1]) < CLOSE
            assert difference(dw, expected[2]) < CLOSE_WEIGHTS


@pytest.mark.slow
@some_widths
def test_pointwise(rng: np.random.Generator, widths: Sequence[float]) -> None:
    pairs = {(s[0], s[1]) for s in blocks(widths)} | {(s[1], s[2]) for s in blocks(widths) + first_blocks(widths)}
    pairs |= set(heads(widths))
    for (inputs, outputs), (n, h, w) in itertools.product(sorted(pairs), SIZES):
        x, weights, dy = normal(rng, n, h, w, inputs), normal(rng, outputs, inputs, 1, 1), normal(rng, n, h, w, outputs)
        x64, w64, dy64 = wide(x, weights[:, :, 0, 0], dy)
        expected = (x64 @ w64.T, dy64 @ w64, reference.outer(dy64, x64))
        for threads in POOLS:
            kernels.set_threads(threads)
            y, dx, dw = empty(*dy.shape), empty(*x.shape), empty(*weights.shape)
            kernels.call("pointwise", [x, weights], [y])
            kernels.call("pointwise_grad", [dy, x, weights], [dx, dw])
            assert difference(y, expected[0]) < CLOSE
            assert difference(dx, expected[1]) < CLOSE
            assert difference(dw[:, :, 0, 0], expected[2]) < CLOSE_WEIGHTS


@pytest.mark.slow
@some_widths
@pytest.mark.parametrize("relu6", [0, 1])
def test_batchnorm(rng: np.random.Generator, relu6: int, widths: Sequence[float]) -> None:
    options = [switches(kind=relu6), NUMBERS]
    channels = {c for shape in blocks(widths) + first_blocks(widths) for c in shape[:3]} | {c for _, c in heads(widths)}
    for c, (n, h, w) in itertools.product(sorted(channels), SIZES):
        x, dy = normal(rng, n, h, w, c) * 2 + 3, normal(rng, n, h, w, c)
        gamma, beta, mean = normal(rng, c), normal(rng, c) * 3, normal(rng, c)
        variance = np.abs(normal(rng, c)) + np.float32(0.5)
        x64, dy64, gamma64 = wide(x, dy, gamma)
        hat = reference.normalised(x64)[0]
        linear, count = hat * gamma + beta, n * h * w
        masked = dy64 * (reference.inside(linear) if relu6 else 1.0)
        dx64, dgamma64, dbeta64 = reference.batchnorm_grad(masked, x64, gamma64)
        unbiased = x64.var((0, 1, 2)) * count / max(1, count - 1)
        for threads in POOLS:
            kernels.set_threads(threads)
            y, saved, new_mean, new_variance = empty(*x.shape), empty(4, c), empty(c), empty(c)
            dx, dgamma, dbeta = empty(*x.shape), empty(c), empty(c)
            outputs = [y, saved, new_mean, new_variance]
            kernels.call("batchnorm_train", [x, gamma, beta, mean, variance, *options], outputs)
            kernels.call("batchnorm_grad", [dy, x, saved, *options], [dx, dgamma, dbeta])
            assert difference(y, np.clip(linear, 0, 6) if relu6 else linear) < CLOSE
            assert difference(new_mean, MOMENTUM * mean + (1 - MOMENTUM) * x64.mean((0, 1, 2))) < CLOSE
            assert difference(new_variance, MOMENTUM * variance + (1 - MOMENTUM) * unbiased) < CLOSE
            assert difference(dx, dx64) < CLOSE
            assert difference(dgamma, dgamma64) < CLOSE
            assert difference(dbeta, dbeta64) < CLOSE
            kernels.call("batchnorm_infer", [x, gamma, beta, mean, variance, *options], [y])
            moved = (x64 - mean) / np.sqrt(variance.astype(np.float64) + EPS) * gamma + beta
            assert difference(y, np.clip(moved, 0, 6) if relu6 else moved) < CLOSE


def parameters(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    """Values of whole units, by name, whose outputs have about unit size."""
    values = {}
    for unit, shape in shapes.items():
        c = shape[0]
        values[f"{unit}.conv.weight"] = normal(rng, *shape) / np.float32(np.sqrt(np.prod(shape[1:])))
        values[f"{unit}.bn.gamma"], values[f"{unit}.bn.beta"] = normal(rng, c) + 1, normal(rng, c) + 1
        values[f"{unit}.bn.moving_mean"] = normal(rng, c)
        values[f"{unit}.bn.moving_variance"] = np.abs(normal(rng, c)) + np.float32(0.5)
    return values


def inferred(unit: Unit, x: Array) -> Array:
    """The unit with its moving statistics."""
    moved = (unit.convolved(x) - unit.get("bn.moving_mean")) / np.sqrt(unit.get("bn.moving_variance") + EPS)
    moved = moved * unit.get("bn.gamma") + unit.get("bn.beta")
    return np.clip(moved, 0, 6) if unit.relu6 else moved


def check_units(
    units: Sequence[Unit], x: Array, residual: bool, forced: dict[str, reference.Sides], dz: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """z, its inference, and the gradients by name, in float64."""
    start, moved = x, x
    for unit in units:
        x, moved = unit.forward(x, forced.get(unit.name)), inferred(unit, moved)
    grads: dict[str, Array] = {}
    d = dz
    for unit in reversed(units):
        d = unit.backward(d, grads)
    if residual:
        x, moved, d = x + start, moved + start, d + dz
    if d.size:
        grads["x"] = d
    return x, moved, grads


def assert_gradients(got: dict[str, Floats], expected: dict[str, Array], where: object) -> None:
    for name, value in got.items():
        limit = CLOSE if name == "x" else CLOSE_WEIGHTS
        assert difference(value, expected[name]) < limit, (where, name)


@pytest.mark.slow
@pytest.mark.parametrize("same", [0, 1])
def test_whole_blocks(rng: np.random.Generator, same: int) -> None:
    sizes = itertools.cycle([((2, 5, 3), 1), ((1, 7, 9), 2), ((3, 6, 5), 3)])
    for (inputs, hidden, outputs, stride), (size, threads) in zip(BLOCKS, sizes, strict=False):
        kernels.set_threads(threads)
        shape = BlockShape(inputs, hidden, outputs, stride)
        call = BlockCall(shape, ("expand", "depthwise", "project"), same)
        shapes = {"expand": (hidden, inputs, 1, 1), "depthwise": (hidden, 1, 3, 3), "project": (outputs, hidden, 1, 1)}
        values, x = parameters(rng, shapes), normal(rng, *size, inputs)
        made = call.train(values, x)
        dz = normal(rng, *made[0].shape)
        weights = {name: value.astype(np.float64) for name, value in values.items()}
        units = [
            Unit("pointwise", "expand", weights),
            Unit("depthwise", "depthwise", weights, stride, same=same),
            Unit("pointwise", "project", weights, relu6=False),
        ]
        z, moved, grads = check_units(
            units, x.astype(np.float64), shape.residual, call.sides(made), dz.astype(np.float64)
        )
        assert difference(made[0], z) < CLOSE
        assert difference(call.infer(values, x), moved) < CLOSE
        assert_gradients(call.grad(values, x, made, dz), grads, shape)


@pytest.mark.parametrize("same", [0, 1])
def test_whole_first_blocks(rng: np.random.Generator, same: int) -> None:
    for (inputs, hidden, outputs, stride), threads in itertools.product(FIRST_BLOCKS, POOLS):
        kernels.set_threads(threads)
        call = BlockCall(BlockShape(inputs, hidden, outputs, stride), ("stem", "depthwise", "project"), same)
        shapes = {"stem": (hidden, 3, 3, 3), "depthwise": (hidden, 1, 3, 3), "project": (outputs, hidden, 1, 1)}
        values = parameters(rng, shapes)
        image = rng.integers(0, 256, (2, 13, 10, 3), dtype=np.uint8)
        made = call.train(values, image)
        dz = normal(rng, *made[0].shape)
        weights = {name: value.astype(np.float64) for name, value in values.items()}
        units = [
            Unit("stem", "stem", weights, same=same),
            Unit("depthwise", "depthwise", weights, stride, same=same),
            Unit("pointwise", "project", weights, relu6=False),
        ]
        x = reference.pixels(image)
        z, moved, grads = check_units(units, x, False, call.sides(made), dz.astype(np.float64))
        assert difference(made[0], z) < CLOSE
        assert difference(call.infer(values, image), moved) < CLOSE
        assert_gradients(call.grad(values, image, made, dz), grads, outputs)


def test_whole_heads(rng: np.random.Generator) -> None:
    for (inputs, outputs), threads in itertools.product(HEADS, POOLS):
        kernels.set_threads(threads)
        values, x = parameters(rng, {"head": (outputs, inputs, 1, 1)}), normal(rng, 3, 3, 5, inputs)
        made = head_train(values, x)
        dpooled = normal(rng, 3, outputs)
        head = Unit("pointwise", "head", {name: value.astype(np.float64) for name, value in values.items()})
        spread = np.broadcast_to(dpooled[:, None, None, :].astype(np.float64) / 15, made[1].shape)
        forced = {"head": sides_of(made[1], made[2])}
        y, moved, grads = check_units([head], x.astype(np.float64), False, forced, spread)
        assert difference(made[0], y.mean((1, 2))) < CLOSE
        assert difference(head_infer(values, x), moved.mean((1, 2))) < CLOSE
        assert_gradients(head_grad(values, x, made, dpooled), grads, outputs)
