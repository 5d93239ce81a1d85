"""MindSpore operators made of the C++ library: a whole inverted residual each, with its gradient.

One operator runs 1x1 expansion, depthwise 3x3 and 1x1 projection with their BatchNorms; the first takes the image and
runs the stem and block 0; the last runs the head and the pooling. Within one, normalised activations are never stored:
whoever reads a convolution's output normalises it while loading. Activations between operators are channels-last and
float32; the convolutions' outputs, which are kept for the gradient, and the gradients there are float32 or bfloat16.
"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ops

from imnet_prep.errors import TrainError
from mbv2 import kernels

_STEM, _EXPAND = 0, 1
_STORED = {"float32": ms.float32, "bfloat16": ms.bfloat16}
Shape = Sequence[int]


def _name(name: str, precision: str) -> str:
    """The function of the library."""
    suffix = "" if precision == "float32" else f"_{precision}"
    return f"{kernels.LIBRARY}:mbv2_{name}{suffix}"


def _custom(
    name: str, precision: str, shapes: Any, outputs: int, stored: Sequence[int] = (), bprop: Any = None
) -> ops.Custom:
    """Operator `name` with `outputs` outputs, whose shapes `shapes` gives from the inputs'.

    All are float32 but the `stored` ones, which are of the precision.
    """
    types = tuple(_STORED[precision] if at in stored else ms.float32 for at in range(outputs))
    return ops.Custom(_name(name, precision), shapes, types, "aot", bprop)


def switches(
    *, stem: bool = False, stride: int = 1, same: bool = False, residual: bool = False, frozen: bool = False
) -> ms.Tensor:
    """The options of an operator that are whole numbers; see `src/operands.h`."""
    values = [_STEM if stem else _EXPAND, stride, int(same), int(residual), int(frozen), 0, 0, 0]
    return ms.Tensor(np.array(values, np.int32))


def numbers(eps: float, momentum: float, mean: Sequence[float], std: Sequence[float]) -> ms.Tensor:
    """The options of an operator that are real numbers: mean and std are of RGB in 0..1."""
    values = [eps, momentum, *(255 * m for m in mean), *(1 / (255 * s) for s in std)]
    return ms.Tensor(np.array(values, np.float32))


def _halved(size: int, stride: int) -> int:
    return -(-size // stride)


def _check(what: str, x: Shape, channels: int) -> None:
    if len(x) != 4 or x[3] != channels:
        raise TrainError(f"{what} of the C++ operators", expected=f"a shape (N, H, W, {channels})", got=str(tuple(x)))


class BlockShapes:
    """The shapes of a block operator's outputs, from those of its inputs."""

    def __init__(self, *, stem: bool, stride: int) -> None:
        self.stem, self.stride = stem, stride

    def maps(self, x: Shape, w1: Shape, w3: Shape) -> tuple[list[int], list[int], list[int]]:
        """The hidden layer before and after the depthwise filter, and the block's output."""
        _check("input", x, 3 if self.stem else w1[1])
        batch, height, width = x[0], x[1], x[2]
        if self.stem:
            height, width = _halved(height, 2), _halved(width, 2)
        below = [_halved(height, self.stride), _halved(width, self.stride)]
        return [batch, height, width, w1[0]], [batch, *below, w1[0]], [batch, *below, w3[0]]

    def train(self, *s: Shape) -> tuple[list[int], ...]:
        y1, y2, z = self.maps(s[0], s[1], s[11])
        hidden, outputs = y1[3], z[3]
        saved = ([4, hidden], [4, hidden], [4, outputs])
        return (z, y1, y2, z, *saved, [hidden], [hidden], [hidden], [hidden], [outputs], [outputs])

    def infer(self, *s: Shape) -> list[int]:
        return self.maps(s[0], s[1], s[11])[2]

    def grad(self, *s: Shape) -> tuple[list[int], ...]:
        x, w1, wd, w3 = s[1], s[8], s[9], s[10]
        hidden, outputs = w1[0], w3[0]
        parameters = (list(w1), [hidden], [hidden], list(wd), [hidden], [hidden], list(w3), [outputs], [outputs])
        return parameters if self.stem else (list(x), *parameters)


def block_train(*, stem: bool, stride: int, precision: str = "float32") -> ops.Custom:
    """Training forward of one block; `precision` ("float32" or "bfloat16") is that of the stored convolution outputs.

    Inputs: x or image; then weight, gamma, beta, moving mean, moving variance of each of the three convolutions;
    switches; numbers. Outputs: z, three stored convolution outputs, three saved BatchNorms, and three pairs of new
    moving statistics.
    """
    shapes = BlockShapes(stem=stem, stride=stride)
    prefix = "stem_block" if stem else "block"
    gradient = _custom(f"{prefix}_grad", precision, shapes.grad, 9 if stem else 10)
    zeros = ops.ZerosLike()

    # fmt: off
    def bprop(
        x: Any, w1: Any, g1: Any, b1: Any, m1: Any, v1: Any, wd: Any, g2: Any, b2: Any, m2: Any, v2: Any,
        w3: Any, g3: Any, b3: Any, m3: Any, v3: Any, ints: Any, floats: Any, out: Any, dout: Any,
    ) -> Any:
        # fmt: on
        d = gradient(dout[0], x, out[1], out[2], out[3], out[4], out[5], out[6], w1, wd, w3, ints, floats)
        if stem:
            d = (zeros(x), d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7], d[8])
        first = (d[0], d[1], d[2], d[3], zeros(m1), zeros(v1))
        second = (d[4], d[5], d[6], zeros(m2), zeros(v2))
        third = (d[7], d[8], d[9], zeros(m3), zeros(v3))
        return first + second + third + (zeros(ints), zeros(floats))

    return _custom(f"{prefix}_train", precision, shapes.train, 13, (1, 2, 3), bprop)


def block_infer(*, stem: bool, stride: int, precision: str = "float32") -> ops.Custom:
    """Inference of one block, BatchNorm folded into the weights; inputs as `block_train`, output z.

    `precision` is that of what 1x1 convolutions multiply, where the processor multiplies bfloat16.
    """
    shapes = BlockShapes(stem=stem, stride=stride)
    name = "stem_block_infer" if stem else "block_infer"
    return ops.Custom(_name(name, precision), shapes.infer, ms.float32, "aot")


def _head_train_shapes(*s: Shape) -> tuple[list[int], ...]:
    x, w = s[0], s[1]
    _check("head input", x, w[1])
    return [x[0], w[0]], [*x[:3], w[0]], [4, w[0]], [w[0]], [w[0]]


def _head_grad_shapes(*s: Shape) -> tuple[list[int], ...]:
    x, w = s[1], s[4]
    return list(x), list(w), [w[0]], [w[0]]


def _head_infer_shape(*s: Shape) -> list[int]:
    _check("head input", s[0], s[1][1])
    return [s[0][0], s[1][0]]


def head_train(precision: str = "float32") -> ops.Custom:
    """Head convolution, BatchNorm, ReLU6 and pooling; `precision` is that of the stored convolution output.

    Inputs: x, weight, gamma, beta, moving mean, moving variance, switches, numbers. Outputs: pooled (N, features), the
    stored convolution output, the saved BatchNorm, the new moving statistics.
    """
    gradient = _custom("head_grad", precision, _head_grad_shapes, 4)
    zeros = ops.ZerosLike()

    def bprop(x: Any, w: Any, g: Any, b: Any, m: Any, v: Any, ints: Any, floats: Any, out: Any, dout: Any) -> Any:
        d = gradient(dout[0], x, out[1], out[2], w, ints, floats)
        return d[0], d[1], d[2], d[3], zeros(m), zeros(v), zeros(ints), zeros(floats)

    return _custom("head_train", precision, _head_train_shapes, 5, (1,), bprop)


def head_infer(precision: str = "float32") -> ops.Custom:
    """Inference of the head; inputs as `head_train`, output pooled; `precision` as of `block_infer`."""
    return ops.Custom(_name("head_infer", precision), _head_infer_shape, ms.float32, "aot")


def update() -> ops.Custom:
    """Return one step of an optimizer, for all weights at once.

    Inputs: the number of the rule (int32), the step's controls, constants, of each weight its decay and the factor of
    its rate; then all gradients, all weights and the state of all weights. Output: float32 (1,), for others to depend
    on.

    Weights and state are changed in place, which MindSpore does not know of. It is sound where nothing else in the
    graph writes them, and whatever reads them either comes before a gradient or depends on the output.
    """
    return ops.Custom(_name("update", "float32"), lambda *shapes: [1], ms.float32, "aot")
