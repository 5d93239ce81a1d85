"""Each C++ operator against float64 NumPy, at odd sizes, both paddings and pools of one to three threads."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep.errors import TrainError
from mbv2 import kernels
from tests.mbv2.blocks import MOMENTUM, NUMBERS, Floats, empty, switches
from tests.mbv2.reference import (
    EPS,
    MEAN,
    STD,
    Array,
    batchnorm_grad,
    depthwise,
    depthwise_grad_data,
    depthwise_grad_weights,
    inside,
    normalised,
    windows,
)

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.describe())

CLOSE, CLOSE_WEIGHTS = 1e-5, 1e-4  # largest difference over largest value


@pytest.fixture(params=[1, 2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[int]:
    kernels.set_threads(request.param)
    yield request.param
    kernels.set_threads(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, np.float32)


def difference(got: Floats, expected: Array) -> float:
    return float(np.abs(got.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-30))


SIZES = [(1, 1, 1), (1, 2, 5), (3, 7, 8), (2, 14, 33)]


@pytest.mark.parametrize(("stride", "same"), list(itertools.product((1, 2), (0, 1))))
def test_depthwise_and_its_gradients_equal_the_definition(
    pool: int, rng: np.random.Generator, stride: int, same: int
) -> None:
    for (n, h, w), c in itertools.product(SIZES, (8, 24, 40, 144)):
        x, weights = normal(rng, n, h, w, c), normal(rng, c, 1, 3, 3)
        y = empty(n, -(-h // stride), -(-w // stride), c)
        dy, dx, dw = normal(rng, *y.shape), empty(*x.shape), empty(*weights.shape)
        options = [switches(stride=stride, same=same), NUMBERS]
        kernels.call("depthwise", [x, weights, *options], [y])
        kernels.call("depthwise_grad_data", [dy, weights, *options], [dx])
        kernels.call("depthwise_grad_weights", [dy, x, *options], [dw])
        x64, w64, dy64 = x.astype(np.float64), weights.astype(np.float64), dy.astype(np.float64)
        assert difference(y, depthwise(x64, w64, stride, same)) < CLOSE
        assert difference(dx, depthwise_grad_data(dy64, w64, x.shape, stride, same)) < CLOSE
        assert difference(dw, depthwise_grad_weights(dy64, x64, stride, same)) < CLOSE_WEIGHTS


def test_pointwise_and_its_gradients_equal_the_matrix_product(pool: int, rng: np.random.Generator) -> None:
    for (n, h, w), inputs, outputs in itertools.product(SIZES, (8, 16, 24, 56, 144), (8, 24, 32, 40, 112, 320)):
        x, weights = normal(rng, n, h, w, inputs), normal(rng, outputs, inputs, 1, 1)
        y, dx, dw = empty(n, h, w, outputs), empty(*x.shape), empty(*weights.shape)
        dy = normal(rng, *y.shape)
        kernels.call("pointwise", [x, weights], [y])
        kernels.call("pointwise_grad", [dy, x, weights], [dx, dw])
        x64, w64, dy64 = x.astype(np.float64), weights.astype(np.float64)[:, :, 0, 0], dy.astype(np.float64)
        assert difference(y, x64 @ w64.T) < CLOSE
        assert difference(dx, dy64 @ w64) < CLOSE
        assert difference(dw[:, :, 0, 0], np.einsum("nhwo,nhwi->oi", dy64, x64)) < CLOSE_WEIGHTS


@pytest.mark.parametrize("same", [0, 1])
def test_stem_normalises_bytes_and_convolves(pool: int, rng: np.random.Generator, same: int) -> None:
    for (n, h, w), outputs in itertools.product([*SIZES, (2, 32, 9)], (16, 24, 32, 48)):
        image = rng.integers(0, 256, (n, h, w, 3), dtype=np.uint8)
        weights = normal(rng, outputs, 3, 3, 3)
        y, dw = empty(n, -(-h // 2), -(-w // 2), outputs), empty(*weights.shape)
        dy = normal(rng, *y.shape)
        options = [switches(kind=0, stride=2, same=same), NUMBERS]
        kernels.call("stem", [image, weights, *options], [y])
        kernels.call("stem_grad_weights", [dy, image, *options], [dw])
        seen = windows((image / 255 - np.array(MEAN)) / np.array(STD), 2, same)
        w64 = weights.astype(np.float64)
        expected = np.sum([v @ w64[:, :, k // 3, k % 3].T for k, v in enumerate(seen)], axis=0)
        assert difference(y, expected) < CLOSE
        taps = [np.einsum("nhwo,nhwc->oc", dy.astype(np.float64), v) for v in seen]
        assert difference(dw, np.stack(taps, 2).reshape(weights.shape)) < CLOSE_WEIGHTS


@pytest.mark.parametrize("relu6", [0, 1])
def test_batchnorm_trains_and_infers(pool: int, rng: np.random.Generator, relu6: int) -> None:
    for (n, h, w), c in itertools.product([(1, 2, 5), (3, 7, 8), (2, 14, 33)], (8, 24, 144)):
        x = normal(rng, n, h, w, c) * 2 + 3
        gamma, beta, mean = normal(rng, c), normal(rng, c) * 3, normal(rng, c)
        variance = np.abs(normal(rng, c)) + np.float32(0.5)
        y, saved, new_mean, new_variance = empty(*x.shape), empty(4, c), empty(c), empty(c)
        options = [switches(kind=relu6), NUMBERS]
        kernels.call("batchnorm_train", [x, gamma, beta, mean, variance, *options], [y, saved, new_mean, new_variance])
        x64, count = x.astype(np.float64), n * h * w
        linear = normalised(x64)[0] * gamma + beta
        assert difference(y, np.clip(linear, 0, 6) if relu6 else linear) < CLOSE
        assert difference(new_mean, MOMENTUM * mean + (1 - MOMENTUM) * x64.mean((0, 1, 2))) < CLOSE
        unbiased = x64.var((0, 1, 2)) * count / (count - 1)
        assert difference(new_variance, MOMENTUM * variance + (1 - MOMENTUM) * unbiased) < CLOSE

        dy, dx, dgamma, dbeta = normal(rng, *x.shape), empty(*x.shape), empty(c), empty(c)
        kernels.call("batchnorm_grad", [dy, x, saved, *options], [dx, dgamma, dbeta])
        expected = batchnorm_grad(dy * (inside(linear) if relu6 else 1.0), x64, gamma.astype(np.float64))
        assert difference(dx, expected[0]) < CLOSE
        assert difference(dgamma, expected[1]) < CLOSE_WEIGHTS
        assert difference(dbeta, expected[2]) < CLOSE_WEIGHTS

        kernels.call("batchnorm_infer", [x, gamma, beta, mean, variance, *options], [y])
        linear = (x64 - mean) / np.sqrt(variance.astype(np.float64) + EPS) * gamma + beta
        assert difference(y, np.clip(linear, 0, 6) if relu6 else linear) < CLOSE


def test_batchnorm_keeps_its_precision_far_from_zero(rng: np.random.Generator) -> None:
    x = normal(rng, 4, 9, 9, 16) * np.float32(0.1) + 100
    ones, zeros = np.ones(16, np.float32), np.zeros(16, np.float32)
    y, saved, mean, variance = empty(*x.shape), empty(4, 16), empty(16), empty(16)
    kernels.call(
        "batchnorm_train", [x, ones, zeros, zeros, ones, switches(kind=0), NUMBERS], [y, saved, mean, variance]
    )
    # The inputs themselves are known to 4e-6 of their spread here; sums of squares around zero would lose all digits.
    assert difference(y, normalised(x.astype(np.float64))[0]) < 1e-4


def test_residual_add(pool: int, rng: np.random.Generator) -> None:
    a, b = normal(rng, 3, 5, 7, 24), normal(rng, 3, 5, 7, 24)
    out = empty(*a.shape)
    kernels.call("add", [a, b], [out])
    np.testing.assert_array_equal(out, a + b)


class Block:
    """One inverted residual: its tensors for the operators, and its float64 reference."""

    def __init__(
        self, rng: np.random.Generator, size: tuple[int, ...], channels: tuple[int, int, int], stride: int
    ) -> None:
        inputs, self.hidden, self.outputs = channels
        self.stride, self.residual = stride, int(stride == 1 and inputs == self.outputs)
        self.x = normal(rng, *size, inputs)
        weights = [
            normal(rng, *s)
            for s in ((self.hidden, inputs, 1, 1), (self.hidden, 1, 3, 3), (self.outputs, self.hidden, 1, 1))
        ]
        self.weights = [w * np.float32(0.5) for w in weights]
        widths = (self.hidden, self.hidden, self.outputs)
        self.norms = [
            [normal(rng, c) + 1, normal(rng, c) + 1, normal(rng, c), np.abs(normal(rng, c)) + 1] for c in widths
        ]
        self.options = [switches(stride=stride, residual=self.residual), NUMBERS]
        n, h, w = size
        self.z = (n, -(-h // stride), -(-w // stride), self.outputs)
        self.filtered = (*self.z[:3], self.hidden)

    def inputs(self) -> list[NDArray[np.generic]]:
        pairs = zip(self.weights, self.norms, strict=True)
        return [self.x, *itertools.chain.from_iterable([w, *n] for w, n in pairs), *self.options]

    def train(self) -> list[Floats]:
        hidden, outputs = self.hidden, self.outputs
        shapes: list[tuple[int, ...]] = [self.z, (*self.x.shape[:3], hidden), self.filtered, self.z]
        shapes += [
            (4, hidden),
            (4, hidden),
            (4, outputs),
            (hidden,),
            (hidden,),
            (hidden,),
            (hidden,),
            (outputs,),
            (outputs,),
        ]
        out = [empty(*s) for s in shapes]
        kernels.call("block_train", self.inputs(), out)
        return out

    def grad(self, dz: Floats, out: list[Floats]) -> list[Floats]:
        grads = [empty(*self.x.shape)]
        for w in self.weights:
            grads += [empty(*w.shape), empty(w.shape[0]), empty(w.shape[0])]
        kernels.call("block_grad", [dz, self.x, *out[1:7], *self.weights, *self.options], grads)
        return grads

    def reference(self, dz: Array) -> tuple[Array, list[Array]]:
        x = self.x.astype(np.float64)
        w1, wd, w3 = (w.astype(np.float64) for w in self.weights)
        gammas, betas = ([n[i].astype(np.float64) for n in self.norms] for i in (0, 1))
        y1 = x @ w1[:, :, 0, 0].T
        v1 = normalised(y1)[0] * gammas[0] + betas[0]
        y2 = depthwise(np.clip(v1, 0, 6), wd, self.stride, 0)
        v2 = normalised(y2)[0] * gammas[1] + betas[1]
        y3 = np.clip(v2, 0, 6) @ w3[:, :, 0, 0].T
        z = normalised(y3)[0] * gammas[2] + betas[2] + (x if self.residual else 0)
        d3, dgamma3, dbeta3 = batchnorm_grad(dz, y3, gammas[2])
        dw3 = np.einsum("nhwo,nhwi->oi", d3, np.clip(v2, 0, 6)).reshape(w3.shape)
        d2, dgamma2, dbeta2 = batchnorm_grad(d3 @ w3[:, :, 0, 0] * inside(v2), y2, gammas[1])
        dwd = depthwise_grad_weights(d2, np.clip(v1, 0, 6), self.stride, 0)
        back = depthwise_grad_data(d2, wd, y1.shape, self.stride, 0) * inside(v1)
        d1, dgamma1, dbeta1 = batchnorm_grad(back, y1, gammas[0])
        dw1 = np.einsum("nhwo,nhwi->oi", d1, x).reshape(w1.shape)
        dx = d1 @ w1[:, :, 0, 0] + (dz if self.residual else 0)
        return z, [dx, dw1, dgamma1, dbeta1, dwd, dgamma2, dbeta2, dw3, dgamma3, dbeta3]


@pytest.mark.parametrize(
    ("size", "channels", "stride"),
    [
        ((2, 7, 9), (16, 96, 16), 1),
        ((1, 9, 6), (24, 144, 32), 2),
        ((3, 5, 5), (8, 48, 24), 1),
        ((4, 2, 3), (160, 240, 160), 1),
    ],
)
def test_a_whole_block_trains_as_its_parts(
    pool: int, rng: np.random.Generator, size: tuple[int, ...], channels: tuple[int, int, int], stride: int
) -> None:
    block = Block(rng, size, channels, stride)
    out = block.train()
    dz = normal(rng, *block.z)
    z, grads = block.reference(dz.astype(np.float64))
    assert difference(out[0], z) < CLOSE
    for got, expected in zip(block.grad(dz, out), grads, strict=True):
        assert difference(got, expected) < CLOSE_WEIGHTS


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 7, 7), (1, 33, 20), (3, 4, 50)])
def test_block_inference_folds_batchnorm(
    pool: int, rng: np.random.Generator, size: tuple[int, ...], stride: int
) -> None:
    block = Block(rng, size, (24, 144, 24), stride)
    z = empty(*block.z)
    kernels.call("block_infer", block.inputs(), [z])

    def norm(y: Array, i: int) -> Array:
        gamma, beta, mean, variance = (v.astype(np.float64) for v in block.norms[i])
        return (y - mean) / np.sqrt(variance + EPS) * gamma + beta

    x = block.x.astype(np.float64)
    w1, wd, w3 = (w.astype(np.float64) for w in block.weights)
    hidden = np.clip(norm(x @ w1[:, :, 0, 0].T, 0), 0, 6)
    hidden = np.clip(norm(depthwise(hidden, wd, stride, 0), 1), 0, 6)
    expected = norm(hidden @ w3[:, :, 0, 0].T, 2) + (x if block.residual else 0)
    assert difference(z, expected) < CLOSE


def test_the_same_bits_at_the_same_thread_count(pool: int) -> None:
    results = []
    for _ in range(2):
        block = Block(np.random.default_rng(3), (3, 15, 13), (24, 144, 24), 1)
        out = block.train()
        results.append([*out, *block.grad(out[0], out)])
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


def test_frozen_statistics_are_used_and_kept(rng: np.random.Generator) -> None:
    block = Block(rng, (2, 5, 5), (8, 48, 8), 1)
    block.options[0] = switches(residual=1, frozen=1)
    out, z = block.train(), empty(*block.z)
    for i, (_, _, mean, variance) in enumerate(block.norms):
        np.testing.assert_array_equal(out[7 + 2 * i], mean)
        np.testing.assert_array_equal(out[8 + 2 * i], variance)
    kernels.call("block_infer", block.inputs(), [z])
    assert difference(out[0], z.astype(np.float64)) < CLOSE


def test_nan_is_not_hidden_by_relu6(rng: np.random.Generator) -> None:
    block = Block(rng, (1, 4, 4), (8, 48, 8), 1)
    block.x[0, 1, 1, 0] = np.nan
    assert np.isnan(block.train()[0]).all()


def test_wrong_shapes_and_types_are_refused(rng: np.random.Generator) -> None:
    x, w, y = normal(rng, 1, 4, 4, 12), normal(rng, 12, 1, 3, 3), empty(1, 4, 4, 12)
    options = [switches(), NUMBERS]
    cases: list[tuple[str, list[NDArray[np.generic]], list[NDArray[np.generic]], str]] = [
        ("depthwise", [x, w, *options], [y], "multiple of 8, got 12"),
        ("depthwise", [x.astype(np.float64), w, *options], [y], "float32, got float64"),
        ("depthwise", [x[0], w, *options], [y], "4 dimensions"),
        ("depthwise", [normal(rng, 1, 4, 4, 8), normal(rng, 8, 1, 3, 3)], [], "missing switches"),
        (
            "add",
            [normal(rng, 1, 2, 2, 8), normal(rng, 1, 2, 3, 8)],
            [empty(1, 2, 2, 8)],
            r"\(1, 2, 2, 8\), got \(1, 2, 3, 8\)",
        ),
        (
            "stem",
            [normal(rng, 1, 4, 4, 3), normal(rng, 8, 3, 3, 3), *options],
            [empty(1, 2, 2, 8)],
            "uint8, got float32",
        ),
        ("add", [empty(1, 0, 2, 8), empty(1, 0, 2, 8)], [empty(1, 0, 2, 8)], "empty"),
        ("add", [empty(1, 1, 2, 8)] * 2, [empty(1, 1, 2, 8)] * 2, "expects 3 tensors, got 4"),
        ("no_such_operator", [], [], "no operator called"),
    ]
    for name, inputs, outputs, message in cases:
        with pytest.raises(TrainError, match=message):
            kernels.call(name, inputs, outputs)


def test_strided_arrays_are_refused(rng: np.random.Generator) -> None:
    a = normal(rng, 2, 4, 4, 16)[..., ::2]
    with pytest.raises(TrainError, match="contiguous"):
        kernels.call("add", [a, a], [empty(2, 4, 4, 8)])


def test_describe_names_instruction_set_and_threads() -> None:
    assert kernels.describe().startswith("C++ operators (")
    assert f"{kernels.threads()} threads" in kernels.describe()


def with_instruction_set(name: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that uses an instruction set."""
    environment = {**os.environ, kernels.ISA_ENVIRONMENT: name}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=250, check=False
    )


DESCRIBE = "from mbv2 import kernels; print(kernels.describe())"


def test_an_unknown_instruction_set_is_refused() -> None:
    done = with_instruction_set("sse9", "-c", DESCRIBE)
    assert done.returncode == 1
    assert "MBV2_ISA=sse9 cannot be used; expected one of amx, avx512bf16, avx512, avx2, neon, baseline" in done.stderr


@pytest.mark.parametrize(
    ("name", "which"),
    [
        pytest.param(name, which, marks=mark)
        for which, mark in (("not slow", pytest.mark.slow), ("", pytest.mark.long))
        for name in kernels.INSTRUCTION_SETS
    ],
)
def test_the_operators_are_right_with_every_instruction_set_of_this_processor(name: str, which: str) -> None:
    if name == kernels.instruction_set():
        return  # the other tests run with it
    if with_instruction_set(name, "-c", DESCRIBE).returncode:
        pytest.skip(f"this processor has no {name}")
    files = Path(__file__).parent.glob("test_kernels*.py")
    leave_out = ["-k", "not with_every_instruction_set"]
    done = with_instruction_set(
        name, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, *leave_out, *map(str, files)
    )
    assert done.returncode == 0, done.stdout[-3000:]


THREADS = """
import resource, threading
from imnet_prep.errors import TrainError
from mbv2 import kernels
kernels.threads()
resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))  # no room for the stacks of so many threads
try:
    kernels.set_threads(4000)
except TrainError as error:
    print(error, kernels.threads() > 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_threads_that_the_system_does_not_start_are_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=60, check=False)
    assert "the system starts no more threads; expected 4000" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("True")
