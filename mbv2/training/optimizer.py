"""The optimizers: one function each, from a weight and its gradient to the changed weight and state.

Where the CPU's C++ operators run, one of these takes their place, for all weights at once: MindSpore would start some
hundred operators of its own for a step, which takes longer than what they compute.
"""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from mbv2.recipe import Recipe

# The scalars a step takes, in order. ``keep`` is 0 where a new sum of gradients begins, see Recipe.accumulate_steps.
CONTROLS = ("lr", "mean_correction", "square_correction", "ema_decay", "stop", "keep")
# The state that each rule keeps beside a weight, and its value at the start.
SLOTS = {
    "sgd": {"momentum": "zeros"},
    "nesterov": {"momentum": "zeros"},
    "adamw": {"momentum": "zeros", "square": "zeros"},
    "rmsprop": {"momentum": "zeros", "square": "ones"},  # TensorFlow's RMSProp starts its mean square at one
}


def step_controls(recipe: Recipe, lr: float, step: int, *, stop: bool = False) -> NDArray[np.float32]:
    """Compute the scalars of :data:`CONTROLS` for a step (from 0), in float64 before rounding."""
    count = step // recipe.accumulate_steps + 1  # the update that this step is part of
    ema = min(recipe.ema_decay, (1 + count) / (10 + count))  # short runs: the initial weights do not stay for long
    adding = step % recipe.accumulate_steps > 0
    return np.array([lr, 1 - recipe.beta1**count, 1 - recipe.beta2**count, ema, stop, adding], np.float32)


# Functions over one weight, mapped over all of them by HyperMap: a Python loop over 158 weights is unrolled into a
# graph that is deeper than MindSpore's compiler takes. ``decay`` and ``factor`` are constants of the weight: its weight
# decay, and its rate as a factor of the run's.


def _rate(controls: Any, factor: float) -> Any:
    return controls[0] if factor == 1 else controls[0] * factor


def _decayed(decay: float, weight: Any, gradient: Any) -> Any:
    return gradient + decay * weight if decay > 0 else gradient


def _sgd(
    heavy_ball: Any, momentum: Any, controls: Any, decay: float, factor: float, weight: Any, gradient: Any, first: Any
) -> Any:
    return heavy_ball(weight, first, _rate(controls, factor), _decayed(decay, weight, gradient), momentum)


def _nesterov(
    momentum: float, controls: Any, decay: float, factor: float, weight: Any, gradient: Any, first: Any
) -> Any:
    # Not ops.ApplyMomentum(use_nesterov=True): its CPU kernel differs (tests/mbv2/training/test_step.py).
    total = _decayed(decay, weight, gradient)
    velocity = momentum * first + total
    change = _rate(controls, factor) * (total + momentum * velocity)
    return ops.assign(first, velocity), ops.assign(weight, weight - change)


def _adamw(
    constants: Any, controls: Any, decay: float, factor: float, weight: Any, gradient: Any, first: Any, second: Any
) -> Any:
    beta1, beta2, epsilon = constants
    mean = beta1 * first + (1.0 - beta1) * gradient
    square = beta2 * second + (1.0 - beta2) * gradient * gradient
    update = (mean / controls[1]) / (ops.sqrt(square / controls[2]) + epsilon)
    new = weight - _rate(controls, factor) * (update + decay * weight)
    return ops.assign(first, mean), ops.assign(second, square), ops.assign(weight, new)


def _rmsprop(
    constants: Any, controls: Any, decay: float, factor: float, weight: Any, gradient: Any, first: Any, second: Any
) -> Any:
    momentum, rms_decay, epsilon = constants
    total = _decayed(decay, weight, gradient)
    square = rms_decay * second + (1.0 - rms_decay) * total * total
    velocity = momentum * first + _rate(controls, factor) * total * ops.rsqrt(square + epsilon)
    return ops.assign(second, square), ops.assign(first, velocity), ops.assign(weight, weight - velocity)


class Optimizer(nn.Cell):
    """Updates weights in place from their gradients; its state is in parameters named ``<slot>.<weight>``.

    Weight decay skips one-dimensional parameters: BatchNorm's gamma and beta, and biases.

    Args:
        recipe: Names the rule and its constants.
        weights: The parameters to train.
        head: Names of those of the classifier, which ``backbone_lr_factor`` leaves alone.
        native: Use the C++ operator.

    Source:
        Nesterov as in Sutskever et al. 2013; AdamW: Loshchilov & Hutter 2019, algorithm 2; RMSProp as in TensorFlow,
        with the epsilon under the root.
    """

    def __init__(
        self, recipe: Recipe, weights: ms.ParameterTuple, head: frozenset[str], *, native: bool = False
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weights = weights
        self.rule = recipe.optimizer
        self.decays = tuple(recipe.weight_decay if len(w.shape) > 1 else 0.0 for w in weights)
        self.factors = tuple(1.0 if w.name in head else recipe.backbone_lr_factor for w in weights)
        slots = [weights.clone(prefix=name, init=start) for name, start in SLOTS[self.rule].items()]
        self.first, self.has_second = slots[0], len(slots) > 1
        if self.has_second:
            self.second = slots[1]
        self.betas = (recipe.beta1, recipe.beta2, recipe.epsilon)
        self.constants = (recipe.momentum, recipe.rms_decay, recipe.epsilon)
        self.momentum = ms.Tensor(recipe.momentum, ms.float32)
        self.heavy_ball = ops.ApplyMomentum()
        self.map = ops.HyperMap()
        self.native = native
        if native:
            from mbv2.kernels import operators

            self.update = operators.update()
            self.number = ms.Tensor(np.array([list(SLOTS).index(self.rule)], np.int32))
            one, two, epsilon = self.betas if self.rule == "adamw" else self.constants
            self.scalars = ms.Tensor(np.array([one, two, epsilon, 1 - one, 1 - two], np.float32))
            self.decay_values = ms.Tensor(np.array(self.decays, np.float32))
            self.factor_values = ms.Tensor(np.array(self.factors, np.float32))

    def construct(self, gradients: Any, controls: Any) -> Any:
        """Update every weight.

        Args:
            gradients: Tuple of float32 tensors, shaped as ``weights``.
            controls: float32 (6,), see :data:`CONTROLS`.

        Returns:
            What the updates give, for others to depend on.
        """
        decays, factors, weights = self.decays, self.factors, self.weights
        if self.native:
            about = (self.number, controls, self.scalars, self.decay_values, self.factor_values)
            state = self.first + self.second if self.has_second else self.first
            return self.update(*about, *gradients, *weights, *state)
        if self.rule == "adamw":
            adamw = ops.partial(_adamw, self.betas, controls)
            return self.map(adamw, decays, factors, weights, gradients, self.first, self.second)
        if self.rule == "rmsprop":
            rmsprop = ops.partial(_rmsprop, self.constants, controls)
            return self.map(rmsprop, decays, factors, weights, gradients, self.first, self.second)
        if self.rule == "nesterov":
            nesterov = ops.partial(_nesterov, self.constants[0], controls)
            return self.map(nesterov, decays, factors, weights, gradients, self.first)
        sgd = ops.partial(_sgd, self.heavy_ball, self.momentum, controls)
        return self.map(sgd, decays, factors, weights, gradients, self.first)

    def slots(self) -> list[ms.Parameter]:
        """List the state's parameters."""
        return [*self.first, *(self.second if self.has_second else ())]
