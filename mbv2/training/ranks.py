"""What several processes under ``msrun`` do together besides a training step."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbv2.runtime import runtime

_HALF = 1 << 12


@cache
def _sum_cell() -> Any:
    from mindspore import nn, ops

    class Sum(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = ops.AllReduce()

        def construct(self, x: Any) -> Any:
            return self.reduce(x)

    return Sum()


def sum_floats(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Add a float32 array up over all ranks; every rank must call it, and gets the sum."""
    if runtime().ranks == 1:
        return values
    import mindspore as ms

    total: NDArray[np.float32] = _sum_cell()(ms.Tensor(values)).asnumpy()
    return total


def sum_counts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add counts up to 2**35 over all ranks, exactly: MindSpore adds up only float32 on a CPU, so in two halves."""
    high, low = values // _HALF, values % _HALF
    halves = sum_floats(np.stack([high, low]).astype(np.float32)).astype(np.int64)
    total: NDArray[np.int64] = halves[0] * _HALF + halves[1]
    return total


def wait_for_all() -> None:
    """Wait until every rank has called it."""
    sum_floats(np.zeros(1, np.float32))
