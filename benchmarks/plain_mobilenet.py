"""MobileNetV2 as mindcv builds it, from MindSpore's own layers, in the step of the other contenders; written anew.

`train_cpu.py --standard` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mbv2.network.model import IMAGENET_MEAN, IMAGENET_STD, BlockShape, block_shapes, feature_count
from mbv2.recipe import Recipe


def build(classes: int) -> Any:
    """The network, width 1.0, with what `mbv2.training.step.TrainStep` asks of one."""
    import mindspore as ms
    from mindspore import nn, ops

    def unit(
        inputs: int, outputs: int, size: int = 1, stride: int = 1, group: int = 1, *, relu6: bool = True
    ) -> list[Any]:
        convolution = nn.Conv2d(
            in_channels=inputs,
            out_channels=outputs,
            kernel_size=size,
            stride=stride,
            pad_mode="pad",
            padding=size // 2,
            group=group,
            has_bias=False,
        )
        norm = nn.BatchNorm2d(num_features=outputs, eps=1e-5, momentum=0.9)
        return [convolution, norm, nn.ReLU6()] if relu6 else [convolution, norm]

    class Block(nn.Cell):  # type: ignore[misc]
        def __init__(self, shape: BlockShape) -> None:
            super().__init__()
            layers = unit(shape.inputs, shape.hidden) if shape.hidden != shape.inputs else []
            layers += unit(shape.hidden, shape.hidden, 3, shape.stride, shape.hidden)
            self.layers = nn.SequentialCell([*layers, *unit(shape.hidden, shape.outputs, relu6=False)])
            self.residual = shape.residual

        def construct(self, x: Any) -> Any:
            return x + self.layers(x) if self.residual else self.layers(x)

    class Plain(nn.Cell):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            shapes = block_shapes(1.0)
            self.feature_count = feature_count(1.0)
            last = unit(shapes[-1].outputs, self.feature_count)
            blocks = [Block(shape) for shape in shapes]
            self.layers = nn.SequentialCell([*unit(3, shapes[0].inputs, 3, 2), *blocks, *last])
            self.classifier = nn.Dense(in_channels=self.feature_count, out_channels=classes)
            self.mean = ms.Tensor([255 * m for m in IMAGENET_MEAN], ms.float32)
            self.scale = ms.Tensor([1 / (255 * s) for s in IMAGENET_STD], ms.float32)

        def features(self, image: Any) -> Any:
            x = (ops.cast(image, ms.float32) - self.mean) * self.scale
            return ops.mean(self.layers(ops.transpose(x, (0, 3, 1, 2))), (2, 3))

        def classify(self, pooled: Any) -> Any:
            return self.classifier(pooled)

    return Plain()


def prepare(image_size: int, batch_size: int) -> Callable[[], Any]:
    """Build the network and return a function that runs one training step to its end."""
    import mindspore as ms

    from mbv2.training.optimizer import step_controls
    from mbv2.training.step import TrainStep, dropout_mask

    random, recipe, classes = np.random.default_rng(0), Recipe(), 1000
    net = build(classes)
    net.set_train(True)
    step = TrainStep(net, recipe, classes)
    image = ms.Tensor(random.integers(0, 256, (batch_size, image_size, image_size, 3), dtype=np.uint8))
    label = ms.Tensor(random.integers(0, classes, batch_size, dtype=np.int32))
    mask = ms.Tensor(dropout_mask(0, 0, (batch_size, net.feature_count), recipe.dropout))
    weight = ms.Tensor(np.ones(batch_size, np.float32))
    controls = ms.Tensor(step_controls(recipe, 0.01, 0))
    return lambda: step(image, mask, label, label, weight, controls).asnumpy()
