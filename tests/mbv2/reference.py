"""The obvious definitions of MobileNetV2's parts, and of a whole training step, in float64 NumPy on (N, H, W, C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbv2.recipe import Recipe

Array = NDArray[np.float64]
Sides = NDArray[np.int8]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-5


def before(size: int, stride: int, same: int) -> int:
    """Zeros put before a row or column of `size`: 1, or TensorFlow's SAME."""
    return max((-(-size // stride) - 1) * stride + 3 - size, 0) // 2 if same else 1


def windows(x: Array, stride: int, same: int) -> list[Array]:
    """For each of the 9 taps the input value under it, at every output pixel."""
    n, h, w, c = x.shape
    top, left = before(h, stride, same), before(w, stride, same)
    padded = np.zeros((n, h + 4, w + 4, c))
    padded[:, top : top + h, left : left + w] = x
    down, right = (-(-h // stride) - 1) * stride + 1, (-(-w // stride) - 1) * stride + 1
    return [padded[:, y : y + down : stride, z : z + right : stride] for y in range(3) for z in range(3)]


def depthwise(x: Array, w: Array, stride: int, same: int) -> Array:
    taps = windows(x, stride, same)
    total = np.zeros_like(taps[0])
    for k, v in enumerate(taps):
        total += v * w[:, 0, k // 3, k % 3]
    return total


def depthwise_grad_data(dy: Array, w: Array, shape: tuple[int, ...], stride: int, same: int) -> Array:
    n, h, wide, c = shape
    top, left = before(h, stride, same), before(wide, stride, same)
    padded = np.zeros((n, h + 4, wide + 4, c))
    down, right = (dy.shape[1] - 1) * stride + 1, (dy.shape[2] - 1) * stride + 1
    for k in range(9):
        padded[:, k // 3 : k // 3 + down : stride, k % 3 : k % 3 + right : stride] += dy * w[:, 0, k // 3, k % 3]
    return padded[:, top : top + h, left : left + wide]


def depthwise_grad_weights(dy: Array, x: Array, stride: int, same: int) -> Array:
    taps = [(v * dy).sum((0, 1, 2)) for v in windows(x, stride, same)]
    return np.stack(taps, 1).reshape(-1, 1, 3, 3)


def outer(dy: Array, x: Array) -> Array:
    """The sum over all pixels of dy x', (outputs, inputs)."""
    return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def pixels(image: NDArray[np.uint8]) -> Array:
    """Bytes as the network sees them."""
    return np.asarray((image / 255 - np.array(MEAN)) / np.array(STD))


def stem(x: Array, w: Array, same: int) -> Array:
    """The 3x3 convolution of stride 2 of normalised pixels (N, H, W, 3); w (O, 3, 3, 3)."""
    taps = windows(x, 2, same)
    total = np.zeros((*taps[0].shape[:3], len(w)))
    for k, v in enumerate(taps):
        total += v @ w[:, :, k // 3, k % 3].T
    return total


def stem_grad_weights(dy: Array, x: Array, same: int) -> Array:
    taps = [outer(dy, v) for v in windows(x, 2, same)]
    return np.stack(taps, 2).reshape(dy.shape[-1], 3, 3, 3)


def normalised(x: Array) -> tuple[Array, Array]:
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    inverse = 1 / np.sqrt(variance + EPS)
    return (x - mean) * inverse, inverse


def inside(v: Array) -> Array:
    """ReLU6's derivative."""
    return ((v > 0) & (v < 6)).astype(np.float64)


def batchnorm_grad(dy: Array, x: Array, gamma: Array) -> tuple[Array, Array, Array]:
    hat, inverse = normalised(x)
    count = x.size // x.shape[-1]
    dgamma, dbeta = (dy * hat).sum((0, 1, 2)), dy.sum((0, 1, 2))
    return gamma * inverse / count * (count * dy - dbeta - hat * dgamma), dgamma, dbeta


def sides(v: NDArray[Any]) -> Sides:
    """Which piece of ReLU6 each value lies on: 0 below, 1 between its bounds, 2 above."""
    return (v > 0).astype(np.int8) + (v >= 6)


Look = Callable[["Unit"], None]


@dataclass
class Unit:
    """Convolution, BatchNorm and perhaps ReLU6; `forward` keeps what `backward` needs."""

    kind: str  # stem, pointwise or depthwise
    name: str
    weights: Mapping[str, Array]
    stride: int = 1
    relu6: bool = True
    same: int = 0
    x: Array = field(default_factory=lambda: np.empty(0))
    y: Array = field(default_factory=lambda: np.empty(0))
    v: Array = field(default_factory=lambda: np.empty(0))
    side: Sides = field(default_factory=lambda: np.empty(0, np.int8))

    def get(self, name: str) -> Array:
        return self.weights[f"{self.name}.{name}"]

    def convolved(self, x: Array) -> Array:
        w = self.get("conv.weight")
        if self.kind == "stem":
            return stem(x, w, self.same)
        if self.kind == "depthwise":
            return depthwise(x, w, self.stride, self.same)
        return np.asarray(x @ w[:, :, 0, 0].T)

    def forward(self, x: Array, side: Sides | None = None, look: Look = lambda unit: None) -> Array:
        """With `side` given, each value is put on that piece of ReLU6 instead of its own."""
        self.x, self.y = x, self.convolved(x)
        self.v = normalised(self.y)[0] * self.get("bn.gamma") + self.get("bn.beta")
        look(self)
        if not self.relu6:
            return self.v
        self.side = sides(self.v) if side is None else side
        return np.where(self.side == 1, self.v, np.where(self.side == 2, 6.0, 0.0))

    def backward(self, da: Array, grads: dict[str, Array]) -> Array:
        """From the gradient at the output; adds the parameters' to `grads` (not of the stem's input)."""
        w = self.get("conv.weight")
        dv = da * (self.side == 1) if self.relu6 else da
        dy, grads[f"{self.name}.bn.gamma"], grads[f"{self.name}.bn.beta"] = batchnorm_grad(
            dv, self.y, self.get("bn.gamma")
        )
        if self.kind == "stem":
            grads[f"{self.name}.conv.weight"] = stem_grad_weights(dy, self.x, self.same)
            return np.empty(0)
        if self.kind == "depthwise":
            grads[f"{self.name}.conv.weight"] = depthwise_grad_weights(dy, self.x, self.stride, self.same)
            return depthwise_grad_data(dy, w, self.x.shape, self.stride, self.same)
        grads[f"{self.name}.conv.weight"] = outer(dy, self.x).reshape(w.shape)
        return np.asarray(dy @ w[:, :, 0, 0])


class Network:
    """A whole MobileNetV2 in training, without dropout.

    Args:
        weights: Parameters by name, as `mbv2.network.model` names them.
        blocks: `mbv2.network.model.block_shapes` of its width.
        same: 1 for TensorFlow's padding.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]], blocks: Sequence[Any], same: int = 0) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}

        def unit(kind: str, name: str, stride: int = 1, relu6: bool = True) -> Unit:
            return Unit(kind, name, self.weights, stride, relu6, same)

        self.stem, self.head = unit("stem", "stem"), unit("pointwise", "head")
        self.blocks = []
        for i, shape in enumerate(blocks):
            units = [unit("pointwise", f"blocks.{i}.expand")] if shape.hidden != shape.inputs else []
            units.append(unit("depthwise", f"blocks.{i}.depthwise", shape.stride))
            units.append(unit("pointwise", f"blocks.{i}.project", relu6=False))
            self.blocks.append((units, shape.residual))
        self.units = [self.stem, *(u for units, _ in self.blocks for u in units), self.head]

    def features(self, image: NDArray[np.uint8], forced: Mapping[str, Sides], look: Look = lambda unit: None) -> Array:
        """The head's activations; `look` is called with each unit before its values are used."""
        x = self.stem.forward(pixels(image), forced.get("stem"), look)
        for units, residual in self.blocks:
            start = x
            for unit in units:
                x = unit.forward(x, forced.get(unit.name), look)
            x = x + start if residual else x
        return self.head.forward(x, forced.get("head"), look)

    def leave_room(self, image: NDArray[np.uint8], reach: float = 0.02) -> float:
        """Move each beta by up to `reach` so that no value lies near a bound of ReLU6; give the least distance."""
        room = [reach]

        def look(unit: Unit) -> None:
            if not unit.relu6:
                return
            beta = unit.get("bn.beta")
            for c in range(len(beta)):
                v = unit.v[..., c].ravel()
                near = np.sort(np.concatenate([[-reach, reach], v[np.abs(v) < reach], v[np.abs(v - 6) < reach] - 6]))
                widest = int(np.diff(near).argmax())
                beta[c] -= (near[widest] + near[widest + 1]) / 2
                room.append((near[widest + 1] - near[widest]) / 2)
            beta[:] = beta.astype(np.float32)
            unit.v = normalised(unit.y)[0] * unit.get("bn.gamma") + beta

        self.features(image, {}, look)
        return float(min(room))

    def step(
        self,
        image: NDArray[np.uint8],
        label: NDArray[np.int32],
        smoothing: float = 0.0,
        forced: Mapping[str, Sides] | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """Mean cross-entropy and the gradient of each parameter, by name.

        Args:
            image: (N, H, W, 3).
            label: (N,).
            smoothing: Label smoothing.
            forced: The piece of ReLU6 to put each value on, by unit, as another implementation had it.
        """
        pooled = self.features(image, forced or {}).mean((1, 2))
        w, classes = self.weights["classifier.weight"], len(self.weights["classifier.bias"])
        logits = pooled @ w.T + self.weights["classifier.bias"]
        log_p = logits - logits.max(1, keepdims=True)
        log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
        target = np.eye(classes)[label] * (1 - smoothing) + smoothing / classes
        slope = (np.exp(log_p) - target) / len(label)
        grads: dict[str, Array] = {"classifier.weight": slope.T @ pooled, "classifier.bias": slope.sum(0)}
        size = self.head.y.shape
        spread = np.broadcast_to((slope @ w)[:, None, None, :] / (size[1] * size[2]), size)
        d = self.head.backward(spread, grads)
        for units, residual in reversed(self.blocks):
            end = d
            for unit in reversed(units):
                d = unit.backward(d, grads)
            d = d + end if residual else d
        self.stem.backward(d, grads)
        return float(-(target * log_p).sum(1).mean()), grads


def update(
    recipe: Recipe, step: int, lr: float, weights: list[Array], grads: list[Array], state: dict[str, list[Array]]
) -> None:
    """Take a step of an optimizer from the gradients: change the lists of weights and state, as it is defined."""
    for i, grad in enumerate(grads):
        decay = recipe.weight_decay if weights[i].ndim > 1 else 0.0
        first, second = state["first"], state["second"]
        if recipe.optimizer == "adamw":
            first[i] = recipe.beta1 * first[i] + (1 - recipe.beta1) * grad
            second[i] = recipe.beta2 * second[i] + (1 - recipe.beta2) * grad**2
            mean, square = first[i] / (1 - recipe.beta1**step), second[i] / (1 - recipe.beta2**step)
            weights[i] = weights[i] - lr * (mean / (np.sqrt(square) + recipe.epsilon) + decay * weights[i])
            continue
        grad = grad + decay * weights[i]  # noqa: PLW2901
        if recipe.optimizer == "rmsprop":
            second[i] = recipe.rms_decay * second[i] + (1 - recipe.rms_decay) * grad**2
            first[i] = recipe.momentum * first[i] + lr * grad / np.sqrt(second[i] + recipe.epsilon)
            weights[i] = weights[i] - first[i]
            continue
        first[i] = recipe.momentum * first[i] + grad
        change = grad + recipe.momentum * first[i] if recipe.optimizer == "nesterov" else first[i]
        weights[i] = weights[i] - lr * change
