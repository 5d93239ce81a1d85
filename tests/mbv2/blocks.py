"""The block and head operators, called on NumPy arrays; parameters by name as `mbv2.network.model` names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbv2 import kernels
from mbv2.network.model import BlockShape
from tests.mbv2.reference import EPS, MEAN, STD, Sides, sides

Floats = NDArray[np.float32]
Values = Mapping[str, Floats]
MOMENTUM = 0.9
NUMBERS = np.array([EPS, MOMENTUM, *(255 * m for m in MEAN), *(1 / (255 * s) for s in STD)], np.float32)
_UNIT = ("conv.weight", "bn.gamma", "bn.beta", "bn.moving_mean", "bn.moving_variance")


def switches(*, kind: int = 1, stride: int = 1, same: int = 0, residual: int = 0, frozen: int = 0) -> NDArray[np.int32]:
    return np.array([kind, stride, same, residual, frozen, 0, 0, 0], np.int32)


def empty(*shape: int) -> Floats:
    return np.full(shape, np.nan, np.float32)  # what an operator forgets to write shows


def stored(precision: str, *shape: int) -> NDArray[Any]:
    """Memory for a convolution's output: NumPy has no bfloat16, so its bits are uint16."""
    return empty(*shape) if precision == "float32" else np.full(shape, 0x7FC1, np.uint16)


def widened(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def sides_of(y: Floats, saved: Floats) -> Sides:
    """Where an operator puts a stored convolution output on ReLU6; in float64 the product is exact, as in its code."""
    return sides(y.astype(np.float64) * saved[2] + saved[3])


def named(operator: str, precision: str) -> str:
    """The operator's name for a precision."""
    return operator if precision == "float32" else f"{operator}_{precision}"


@dataclass(frozen=True)
class BlockCall:
    """One inverted residual with the names of its three units; the first may be the stem, on an image."""

    shape: BlockShape
    units: Sequence[str]
    same: int = 0
    precision: str = "float32"

    @property
    def stem(self) -> bool:
        return self.units[0] == "stem"

    def _name(self, what: str) -> str:
        return named(f"stem_block_{what}" if self.stem else f"block_{what}", self.precision)

    def _options(self) -> list[NDArray[Any]]:
        residual = int(self.shape.residual and not self.stem)
        return [switches(kind=1 - self.stem, stride=self.shape.stride, same=self.same, residual=residual), NUMBERS]

    def _inputs(self, values: Values, x: NDArray[Any]) -> list[NDArray[Any]]:
        return [x, *(values[f"{unit}.{name}"] for unit in self.units for name in _UNIT), *self._options()]

    def maps(self, x: NDArray[Any]) -> list[tuple[int, ...]]:
        """Shapes of z and the three stored convolution outputs."""
        n, h, w = (len(x), -(-x.shape[1] // 2), -(-x.shape[2] // 2)) if self.stem else x.shape[:3]
        below = (n, -(-h // self.shape.stride), -(-w // self.shape.stride))
        hidden, out = self.shape.hidden, self.shape.outputs
        return [(*below, out), (n, h, w, hidden), (*below, hidden), (*below, out)]

    def train(self, values: Values, x: NDArray[Any]) -> list[NDArray[Any]]:
        """z, three stored outputs, three saved BatchNorms, three pairs of moving statistics."""
        hidden, out = self.shape.hidden, self.shape.outputs
        small = [(4, hidden), (4, hidden), (4, out), (hidden,), (hidden,), (hidden,), (hidden,), (out,), (out,)]
        z, *maps = self.maps(x)
        made = [empty(*z), *(stored(self.precision, *shape) for shape in maps), *(empty(*shape) for shape in small)]
        kernels.call(self._name("train"), self._inputs(values, x), made)
        return made

    def sides(self, made: Sequence[NDArray[Any]]) -> dict[str, Sides]:
        """Of the two units with ReLU6, from what `train` gave."""
        return {unit: sides_of(self.outputs(made)[i], made[4 + i]) for i, unit in enumerate(self.units[:2])}

    def outputs(self, made: Sequence[NDArray[Any]]) -> list[Floats]:
        """The three stored convolution outputs, from what `train` gave."""
        return [widened(y) if y.dtype == np.uint16 else y for y in made[1:4]]

    def grad(self, values: Values, x: NDArray[Any], made: Sequence[NDArray[Any]], dz: Floats) -> dict[str, Floats]:
        """The parameters' gradients by name, and the input's as `x` (not the stem's)."""
        weights = [values[f"{unit}.conv.weight"] for unit in self.units]
        grads = {} if self.stem else {"x": empty(*x.shape)}
        for unit, weight in zip(self.units, weights, strict=True):
            grads[f"{unit}.conv.weight"] = empty(*weight.shape)
            grads[f"{unit}.bn.gamma"], grads[f"{unit}.bn.beta"] = empty(len(weight)), empty(len(weight))
        kernels.call(self._name("grad"), [dz, x, *made[1:7], *weights, *self._options()], list(grads.values()))
        return grads

    def infer(self, values: Values, x: NDArray[Any]) -> Floats:
        z = empty(*self.maps(x)[0])
        kernels.call(self._name("infer"), self._inputs(values, x), [z])
        return z


def _head_inputs(values: Values, x: Floats) -> list[NDArray[Any]]:
    return [x, *(values[f"head.{name}"] for name in _UNIT), switches(), NUMBERS]


def head_train(values: Values, x: Floats, precision: str = "float32") -> list[NDArray[Any]]:
    """Pooled features, the stored output, the saved BatchNorm, the moving statistics."""
    out = len(values["head.conv.weight"])
    made = [empty(len(x), out), stored(precision, *x.shape[:3], out), empty(4, out), empty(out), empty(out)]
    kernels.call(named("head_train", precision), _head_inputs(values, x), made)
    return made


def head_grad(
    values: Values, x: Floats, made: Sequence[NDArray[Any]], dpooled: Floats, precision: str = "float32"
) -> dict[str, Floats]:
    weight = values["head.conv.weight"]
    grads = {"x": empty(*x.shape), "head.conv.weight": empty(*weight.shape)}
    grads |= {name: empty(len(weight)) for name in ("head.bn.gamma", "head.bn.beta")}
    kernels.call(
        named("head_grad", precision),
        [dpooled, x, *made[1:3], weight, switches(), NUMBERS],
        list(grads.values()),
    )
    return grads


def head_infer(values: Values, x: Floats, precision: str = "float32") -> Floats:
    pooled = empty(len(x), len(values["head.conv.weight"]))
    kernels.call(named("head_infer", precision), _head_inputs(values, x), [pooled])
    return pooled
