"""The network on both kinds of operators: a training step of each, and where each puts its values on ReLU6."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from mbv2.network.model import MobileNetV2
from tests.mbv2.blocks import BlockCall, Floats, head_train, sides_of
from tests.mbv2.reference import Sides, sides


class LossGradient(nn.Cell):
    """Loss and gradients of a batch, as one graph."""

    def __init__(self, net: MobileNetV2, smoothing: float = 0.0) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.smoothing = smoothing
        self.gradient = ops.value_and_grad(self.loss, None, ms.ParameterTuple(net.trainable_params()))

    def loss(self, image: ms.Tensor, label: ms.Tensor) -> ms.Tensor:
        return ops.cross_entropy(self.net(image), label, label_smoothing=self.smoothing)

    def construct(self, image: ms.Tensor, label: ms.Tensor) -> Any:
        return self.gradient(image, label)


def parameter_values(net: MobileNetV2) -> dict[str, Floats]:
    """Copies of all parameters and statistics, by name."""
    return {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}


def load_values(net: MobileNetV2, values: dict[str, Floats]) -> None:
    """Set all parameters and statistics."""
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(values[parameter.name]))


def standard_sides(net: MobileNetV2, image: NDArray[np.uint8]) -> dict[str, Sides]:
    """Which piece of ReLU6 the standard operators put each value on, by unit, (N, H, W, C); moves the statistics."""
    found: dict[str, Sides] = {}

    def run(unit: Any, name: str, x: Any) -> Any:
        x = unit.bn(unit.conv(x))
        if not unit.relu6:
            return x
        found[name] = sides(x.asnumpy().transpose(0, 2, 3, 1))
        return ops.relu6(x)

    x = (ops.cast(ms.Tensor(image), ms.float32) - net.pixel_mean) * net.pixel_scale
    x = run(net.stem, "stem", ops.transpose(x, (0, 3, 1, 2)))
    for i, block in enumerate(net.blocks):
        start = x
        if block.expands:
            x = run(block.expand, f"blocks.{i}.expand", x)
        x = run(block.depthwise, f"blocks.{i}.depthwise", x)
        x = run(block.project, f"blocks.{i}.project", x)
        x = x + start if block.residual else x
    run(net.head, "head", x)
    return found


def native_sides(net: MobileNetV2, image: NDArray[np.uint8]) -> dict[str, Sides]:
    """The same of the C++ operators, from what they store; nothing is moved."""
    found: dict[str, Sides] = {}
    values = parameter_values(net)
    x: NDArray[Any] = image
    for i, block in enumerate(net.blocks):
        first = f"blocks.{i}.expand" if i else "stem"
        call = BlockCall(
            block.shape, (first, f"blocks.{i}.depthwise", f"blocks.{i}.project"), int(net.config.padding == "same")
        )
        made = call.train(values, x)
        found |= call.sides(made)
        x = made[0]
    head = head_train(values, x)
    found["head"] = sides_of(head[1], head[2])
    return found
