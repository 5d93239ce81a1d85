"""How near each C++ operator comes to this machine's limits: NumPy's sgemm and a copy of memory, measured beside it.

Command::

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.kernel_limits

At the layers of width 1.0, 224 px, batch 32. An operator's rate is given in GFLOP/s and in GB/s of what it has to read
and write once; its share is that of the nearer limit: the larger of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mbv2 import kernels

BATCH = 32
POINTWISE = ((112, 16, 96), (56, 144, 24), (28, 192, 32), (14, 384, 64), (14, 576, 96), (7, 960, 160), (7, 320, 1280))
DEPTHWISE = (
    (112, 32, 1),
    (112, 96, 2),
    (56, 144, 1),
    (28, 192, 1),
    (14, 576, 1),
    (7, 960, 1),
)  # size, channels, stride
NUMBERS = np.array([1e-5, 0.9, 0, 0, 0, 1, 1, 1], np.float32)


def seconds(run: Callable[[], object], least_s: float = 0.3) -> float:
    """The median time of a call, after one that warms up."""
    run()
    times: list[float] = []
    while sum(times) < least_s or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def on_every_core(run: Callable[[int], object]) -> float:
    """The median time in which every core has run its own."""
    threads = kernels.threads()
    with ThreadPoolExecutor(threads) as pool:
        return seconds(lambda: list(pool.map(run, range(threads))))


def sgemm_rate() -> float:
    """GFLOP/s of NumPy's float32 matrix product at a size that suits it, one on every core."""
    size = 1536
    a, b = (np.random.default_rng(i).standard_normal((size, size), np.float32) for i in (0, 1))
    out = [np.empty_like(a) for _ in range(kernels.threads())]
    return kernels.threads() * 2 * size**3 / on_every_core(lambda k: np.matmul(a, b, out=out[k])) / 1e9


def copy_rate() -> float:
    """GB/s read and written by copies far larger than the caches, one on every core."""
    parts = [(np.ones(1 << 25, np.float32), np.empty(1 << 25, np.float32)) for _ in range(kernels.threads())]
    return len(parts) * 2 * parts[0][0].nbytes / on_every_core(lambda k: np.copyto(parts[k][1], parts[k][0])) / 1e9


def rates(
    name: str, inputs: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]], flop: float
) -> tuple[float, float]:
    """GFLOP/s and GB/s of an operator."""
    time_s = seconds(lambda: kernels.call(name, list(inputs), list(outputs)), 0.2)
    return flop / time_s / 1e9, sum(array.nbytes for array in (*inputs, *outputs)) / time_s / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    random = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, np.float32)

    peak, copy = sgemm_rate(), copy_rate()
    print(json.dumps({"kernels": kernels.describe(), "sgemm_gflop_s": round(peak, 1), "copy_gb_s": round(copy, 1)}))
    print("| operator | GFLOP/s | GB/s | share of sgemm | share of copy |\n|---|---|---|---|---|")

    def show(what: str, found: tuple[float, float]) -> None:
        flop, moved = found
        print(f"| {what} | {flop:.0f} | {moved:.1f} | {flop / peak:.0%} | {moved / copy:.0%} |", flush=True)

    for size, inputs, outputs in POINTWISE:
        x, w, y = normal(BATCH, size, size, inputs), normal(outputs, inputs, 1, 1), normal(BATCH, size, size, outputs)
        flop = 2.0 * BATCH * size * size * inputs * outputs
        what = f"1x1, {inputs} to {outputs}, {size} px"
        show(what, rates("pointwise", [x, w], [y], flop))
        show(
            f"{what}, both gradients",
            rates("pointwise_grad", [y, x, w], [np.empty_like(x), np.empty_like(w)], 2 * flop),
        )
    for size, channels, stride in DEPTHWISE:
        x, w = normal(BATCH, size, size, channels), normal(channels, 1, 3, 3)
        y = normal(BATCH, size // stride, size // stride, channels)
        options = [np.array([1, stride, 0, 0, 0, 0, 0, 0], np.int32), NUMBERS]
        show(f"3x3 stride {stride}, {channels}, {size} px", rates("depthwise", [x, w, *options], [y], 18.0 * y.size))
    x = normal(BATCH, 56, 56, 144)
    vectors = [normal(144) for _ in range(3)] + [np.ones(144, np.float32)]
    options = [np.array([1, 1, 0, 0, 0, 0, 0, 0], np.int32), NUMBERS]
    show(
        "BatchNorm and ReLU6 of stored statistics, 144, 56 px",
        rates("batchnorm_infer", [x, *vectors, *options], [np.empty_like(x)], 4.0 * x.size),
    )


if __name__ == "__main__":
    main()
