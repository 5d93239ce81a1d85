"""MobileNetV2: one definition, whichever operators run it.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv:1801.04381), table 2.

Parameters have the same names and layouts (OIHW) on the C++ operators of `mbv2.kernels` and on MindSpore's own, so
that a checkpoint moves between them::

    stem.conv.weight                        stem.bn.{gamma,beta,moving_mean,moving_variance}
    blocks.I.{expand,depthwise,project}.conv.weight   blocks.I.{expand,depthwise,project}.bn....
    head.conv.weight                        head.bn....
    classifier.weight                       classifier.bias

Block 0 has no `expand`.
"""

from dataclasses import dataclass

import mindspore as ms
from mindspore import nn, ops
from mindspore.common.initializer import HeNormal, Normal, initializer

from imnet_prep.errors import RecipeError, TrainError
from mbv2 import kernels as native
from mbv2.kernels import operators
from mbv2.network.native import NativeBlock, NativeHead
from mbv2.recipe import PADDINGS, PRECISIONS
from mbv2.runtime import runtime

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
KERNELS = ("auto", "native", "standard")
WIDTH_RANGE = (0.35, 1.4)

# Table 2 of the paper: expansion, channels, repeats, stride of the first.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What fixes the network's function.

    Args:
        classes: Number of labels.
        width: Multiplier of the channels, 0.35 to 1.4.
        dropout: Probability of dropping a pooled feature in training; the training step applies it.
        padding: "symmetric" (1 on each side, as PyTorch and mindcv) or "same" (TensorFlow's: none before and 1 after
            at stride 2 on an even size).
        mean: Subtracted from RGB in 0..1.
        std: Divides RGB in 0..1 after that.
        bn_eps: Added to the variance.
        bn_momentum: Share of the old moving statistics that stays at each step (MindSpore's sense).

    Raises:
        RecipeError: A value is outside what the network can take.
    """

    classes: int
    width: float = 1.0
    dropout: float = 0.2  # the paper's
    padding: str = "symmetric"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    bn_eps: float = 1e-5
    bn_momentum: float = 0.9

    def __post_init__(self) -> None:
        low, high = WIDTH_RANGE
        for name, valid, expected in (
            ("classes", self.classes >= 1, "at least 1"),
            ("width", low <= self.width <= high, f"{low} to {high}"),
            ("dropout", 0 <= self.dropout < 1, "0 up to, not including, 1"),
            ("padding", self.padding in PADDINGS, " or ".join(PADDINGS)),
            ("mean", len(self.mean) == 3, "three numbers, of RGB in 0..1"),
            ("std", len(self.std) == 3 and min(self.std) > 0, "three positive numbers, of RGB in 0..1"),
            ("bn_eps", self.bn_eps > 0, "more than 0"),
            ("bn_momentum", 0 <= self.bn_momentum < 1, "0 up to, not including, 1"),
        ):
            if not valid:
                raise RecipeError(f"model option {name}", expected=expected, got=repr(getattr(self, name)))


def scaled_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, but never less than 90 % of it.

    Source: the authors' TensorFlow code, `_make_divisible`.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Channels and stride of one inverted residual; `hidden` equals `inputs` where there is no expansion."""

    inputs: int
    hidden: int
    outputs: int
    stride: int

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.inputs == self.outputs


def block_shapes(width: float) -> list[BlockShape]:
    """The 17 inverted residuals at a width multiplier, in order."""
    shapes = []
    channels = scaled_channels(_STEM_CHANNELS * width)
    for expansion, base, repeats, first_stride in _STAGES:
        outputs = scaled_channels(base * width)
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            shapes.append(BlockShape(channels, channels * expansion, outputs, stride))
            channels = outputs
    return shapes


def feature_count(width: float) -> int:
    """Length of the pooled feature vector: the last layer is not made narrower below width 1."""
    return scaled_channels(_HEAD_CHANNELS * max(1.0, width))


class _Convolution(nn.Cell):
    """A convolution's weight (OIHW) and its standard operator on NCHW."""

    def __init__(
        self, inputs: int, outputs: int, *, size: int = 1, stride: int = 1, group: int = 1, padding: str
    ) -> None:
        super().__init__()
        weight = initializer(HeNormal(mode="fan_out"), (outputs, inputs // group, size, size), ms.float32)
        self.weight = ms.Parameter(weight, name="weight")
        mode = {"pad_mode": "same"} if padding == "same" else {"pad_mode": "pad", "pad": size // 2}
        self.convolve = ops.Conv2D(out_channel=outputs, kernel_size=size, stride=stride, group=group, **mode)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.convolve(x, self.weight)


class _Unit(nn.Cell):
    """Convolution, BatchNorm and, where asked, ReLU6, on NCHW; its parameters also serve the C++ operators."""

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        *,
        size: int = 1,
        stride: int = 1,
        group: int = 1,
        relu6: bool = True,
    ) -> None:
        super().__init__()
        self.conv = _Convolution(inputs, outputs, size=size, stride=stride, group=group, padding=config.padding)
        self.bn = nn.BatchNorm2d(num_features=outputs, eps=config.bn_eps, momentum=config.bn_momentum)
        self.relu6 = relu6

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        x = self.bn(self.conv(x))
        return ops.relu6(x) if self.relu6 else x


class _Block(nn.Cell):
    """Inverted residual: expand 1x1, depthwise 3x3, project 1x1 without activation, and the shortcut."""

    def __init__(self, config: ModelConfig, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        self.expands = shape.hidden != shape.inputs
        if self.expands:
            self.expand = _Unit(config, shape.inputs, shape.hidden)
        self.depthwise = _Unit(config, shape.hidden, shape.hidden, size=3, stride=shape.stride, group=shape.hidden)
        self.project = _Unit(config, shape.hidden, shape.outputs, relu6=False)
        self.residual = shape.residual

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        hidden = self.expand(x) if self.expands else x
        y = self.project(self.depthwise(hidden))
        return x + y if self.residual else y


class _Classifier(nn.Cell):
    """Pooled features to logits; weight (classes, features)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = ms.Parameter(
            initializer(Normal(sigma=0.01, mean=0.0), (classes, features), ms.float32), name="weight"
        )
        self.bias = ms.Parameter(initializer("zeros", (classes,), ms.float32), name="bias")
        self.multiply = ops.MatMul(transpose_b=True)
        self.add = ops.BiasAdd()

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.add(self.multiply(x, self.weight), self.bias)


class MobileNetV2(nn.Cell):
    """The network, from uint8 pixels to logits.

    Args:
        config: What fixes its function.
        kernels: "native" for the C++ operators, "standard" for MindSpore's own, "auto" for the C++ operators where
            they are built and the device is a CPU.
        precision: How a training step keeps the convolutions' outputs and their gradients within blocks: "float32", or
            "bfloat16", with the C++ operators alone. Weights, statistics, sums and what blocks hand to each other are
            float32.
        inference: What 1x1 convolutions multiply in evaluation mode: the same choice.

    Raises:
        RecipeError: An unknown choice of kernels or precision.
        TrainError: "native" or "bfloat16" where the C++ operators cannot be used.
    """

    def __init__(
        self, config: ModelConfig, *, kernels: str = "auto", precision: str = "float32", inference: str = "float32"
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = _choose_kernels(kernels)
        for chosen in (precision, inference):
            _check_precision(chosen, self.kernels)
        shapes = block_shapes(config.width)
        self.feature_count = feature_count(config.width)
        self.stem = _Unit(config, 3, shapes[0].inputs, size=3, stride=2)
        self.blocks = nn.CellList([_Block(config, shape) for shape in shapes])
        self.head = _Unit(config, shapes[-1].outputs, self.feature_count)
        self.classifier = _Classifier(self.feature_count, config.classes)
        # (pixel - mean * 255) / (std * 255)
        self.pixel_mean = ms.Tensor([255 * m for m in config.mean], ms.float32)
        self.pixel_scale = ms.Tensor([1 / (255 * s) for s in config.std], ms.float32)
        names = [(parameter, name) for name, parameter in self.parameters_and_names()]
        if self.kernels == "native":
            numbers = operators.numbers(config.bn_eps, config.bn_momentum, config.mean, config.std)
            same = config.padding == "same"
            first, *blocks = self.blocks
            how = (numbers, precision, inference)
            self.native_first = NativeBlock(first, *how, same=same, stem=self.stem)
            self.native_blocks = nn.CellList([NativeBlock(block, *how, same=same) for block in blocks])
            self.native_head = NativeHead(self.head, *how)
        for parameter, name in names:  # a Cell that shares another's parameters renames them
            parameter.name = name

    def features(self, image: ms.Tensor) -> ms.Tensor:
        """Pooled features.

        Args:
            image: uint8 (N, H, W, 3), RGB.

        Returns:
            float32 (N, feature_count).
        """
        if self.kernels == "native":
            x = self.native_first(image)
            for native_block in self.native_blocks:
                x = native_block(x)
            return self.native_head(x)
        x = (ops.cast(image, ms.float32) - self.pixel_mean) * self.pixel_scale
        x = self.stem(ops.transpose(x, (0, 3, 1, 2)))
        for block in self.blocks:
            x = block(x)
        return ops.mean(self.head(x), (2, 3))

    def classify(self, features: ms.Tensor) -> ms.Tensor:
        """Logits, float32 (N, classes), of pooled features (N, feature_count)."""
        return self.classifier(features)

    def construct(self, image: ms.Tensor) -> ms.Tensor:
        """Logits, float32 (N, classes), of uint8 images (N, H, W, 3) in RGB."""
        return self.classify(self.features(image))

    def freeze_batchnorm(self) -> None:
        """Keep BatchNorm's statistics in training too; its gamma and beta still train."""
        for _, cell in self.cells_and_names():
            if isinstance(cell, nn.BatchNorm2d):
                cell.use_batch_statistics = False
            elif isinstance(cell, NativeBlock | NativeHead):
                cell.frozen = True


def _choose_kernels(kernels: str) -> str:
    if kernels not in KERNELS:
        raise RecipeError("kernels", expected=" or ".join(KERNELS), got=repr(kernels))
    usable = native.available() and ms.get_context("device_target") == "CPU"
    if kernels == "native" and not usable:
        raise TrainError("the C++ operators cannot be used", got=native.describe(), remedy="use kernels='standard'")
    if kernels == "standard" or not usable:
        return "standard"
    native.set_threads(runtime().threads)  # a container's quota and msrun's ranks leave fewer than the library sees
    return "native"


def _check_precision(precision: str, kernels: str) -> None:
    if precision not in PRECISIONS:
        raise RecipeError("precision", expected=" or ".join(PRECISIONS), got=repr(precision))
    if precision != "float32" and kernels != "native":
        raise TrainError(
            f"precision {precision}",
            expected="the C++ operators, which alone have it",
            got="MindSpore's own operators" if native.available() else native.describe(),
            remedy="use precision=float32",
        )
