"""What an operator says when it refuses its inputs reaches the user through MindSpore."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from imnet_prep.errors import TrainError
from mbv2 import kernels
from mbv2.kernels import operators
from mbv2.scoring.score import network_predict


class Block(nn.Cell):
    """One block in inference, with a stride that its operator may not know."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.block = operators.block_infer(stem=False, stride=1)
        self.switches = operators.switches(stride=stride)
        self.numbers = operators.numbers(1e-5, 0.9, (0, 0, 0), (1, 1, 1))
        self.inputs = [ms.Tensor(np.ones(shape, np.float32)) for shape in self.shapes()]

    @staticmethod
    def shapes() -> list[tuple[int, ...]]:
        norm = [(16,)] * 4
        return [(16, 8, 1, 1), *norm, (16, 1, 3, 3), *norm, (8, 16, 1, 1), *[(8,)] * 4]

    def construct(self, x: Any) -> Any:
        return self.block(x, *self.inputs, self.switches, self.numbers)


@pytest.mark.skipif(not kernels.available(), reason="the C++ operators are not built")
def test_an_operator_s_refusal_is_said_once() -> None:
    image = np.ones((1, 4, 4, 8), np.float32)
    assert network_predict(Block(1))(image).shape == (1, 4, 4, 8)
    with pytest.raises(TrainError, match=r"^operator block_infer: stride must be 1 or 2, got 3; MBV2_KERNELS=standard"):
        network_predict(Block(3))(image)
    with pytest.raises(RuntimeError, match="of another kind"), kernels.explained():
        raise RuntimeError("of another kind")
