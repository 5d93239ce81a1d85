"""One training step as one graph: forward, loss, gradients, update, averaged weights.

Nothing in it draws random numbers or keeps a counter: the dropout mask, the rates and the corrections that depend
on the step come in as tensors, so that a step is a pure function of the state and its inputs.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from mbv2.recipe import Recipe

_DROPOUT_STREAM = 0xD0  # keeps the mask's random numbers apart from every other use of the seed
# The scalars a step takes, in order. ``keep`` is 0 where a new sum of gradients begins, see Recipe.accumulate_steps.
CONTROLS = ("lr", "momentum_correction", "square_correction", "ema_decay", "stop", "keep")


def dropout_mask(seed: int, step: int, shape: tuple[int, int], rate: float) -> NDArray[np.float32]:
    """Draw the mask of a step, keyed by (seed, step) and nothing else.

    Returns:
        float32 of ``shape``: 0 where dropped, ``1 / (1 - rate)`` where kept.
    """
    if rate == 0:
        return np.ones(shape, np.float32)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _DROPOUT_STREAM, step])))
    keep = generator.random(shape, dtype=np.float32) >= rate
    return keep.astype(np.float32) / np.float32(1 - rate)


def step_controls(recipe: Recipe, lr: float, step: int, *, stop: bool = False) -> NDArray[np.float32]:
    """Compute the scalars of :data:`CONTROLS` for a step (from 0), in float64 before rounding."""
    count = step // recipe.accumulate_steps + 1  # the update that this step is part of
    ema = min(
        recipe.ema_decay, (1 + count) / (10 + count)
    )  # short runs: do not average in the initial weights for long
    values = [
        lr,
        1 - recipe.momentum**count,
        1 - recipe.rms_decay**count,
        ema,
        stop,
        step % recipe.accumulate_steps > 0,
    ]
    return np.array(values, np.float32)


# Functions over one weight, mapped over all of them by HyperMap: a Python loop over 158 weights is unrolled into a
# graph that is deeper than MindSpore's compiler takes.


def _decayed(decay: float, weight: Any, gradient: Any) -> Any:
    return gradient + decay * weight if decay > 0 else gradient


def _nesterov(momentum: float, controls: Any, weight: Any, gradient: Any, first: Any) -> Any:
    # Not ops.ApplyMomentum(use_nesterov=True): its CPU kernel differs (tests/mbv2/training/test_step.py).
    velocity = momentum * first + gradient
    change = controls[0] * (gradient + momentum * velocity)
    return ops.assign(first, velocity), ops.assign(weight, weight - change)


def _adamw(constants: Any, controls: Any, decay: float, weight: Any, gradient: Any, first: Any, second: Any) -> Any:
    momentum, rms_decay, epsilon = constants
    mean = momentum * first + (1.0 - momentum) * gradient
    square = rms_decay * second + (1.0 - rms_decay) * gradient * gradient
    update = (mean / controls[1]) / (ops.sqrt(square / controls[2]) + epsilon)
    new = weight - controls[0] * (update + decay * weight)
    return ops.assign(first, mean), ops.assign(second, square), ops.assign(weight, new)


def _rmsprop(constants: Any, controls: Any, decay: float, weight: Any, gradient: Any, first: Any, second: Any) -> Any:
    momentum, rms_decay, epsilon = constants
    total = _decayed(decay, weight, gradient)
    square = rms_decay * second + (1.0 - rms_decay) * total * total
    velocity = momentum * first + controls[0] * total * ops.rsqrt(square + epsilon)
    return ops.assign(second, square), ops.assign(first, velocity), ops.assign(weight, weight - velocity)


def _average(controls: Any, average: Any, live: Any) -> Any:
    return ops.assign(average, average * controls[3] + live * (1.0 - controls[3]))


def _added(keep: Any, total: Any, gradient: Any) -> Any:
    return ops.assign(total, total * keep + gradient)


def _square_sum(gradient: Any) -> Any:
    return ops.sum(gradient * gradient)


def _scaled(factor: Any, gradient: Any) -> Any:
    return gradient * factor


def _flattened(value: Any) -> Any:
    return ops.reshape(value, (-1,))


def _cut(cutter: Any, flat: Any, start: int, size: int, like: Any) -> Any:
    # Not ops.split into 158 pieces: that takes six times as long to compile.
    return ops.reshape(cutter(flat, (start,), (size,)), like.shape)


def _sizes(parameters: Any) -> tuple[int, ...]:
    return tuple(int(np.prod(parameter.shape)) for parameter in parameters)


def _starts(sizes: tuple[int, ...], first: int) -> tuple[int, ...]:
    return tuple(first + sum(sizes[:number]) for number in range(len(sizes)))


class Optimizer(nn.Cell):
    """Updates weights in place from their gradients; its state is in parameters named ``<slot>.<weight>``.

    Weight decay skips one-dimensional parameters: BatchNorm's gamma and beta, and biases.

    Args:
        recipe: Names the rule and its constants.
        weights: The parameters to train.

    Source:
        Nesterov as in Sutskever et al. 2013; AdamW: Loshchilov & Hutter 2019, algorithm 2; RMSProp as in TensorFlow,
        with the epsilon under the root.
    """

    def __init__(self, recipe: Recipe, weights: ms.ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.weights = weights
        self.rule = recipe.optimizer
        self.decays = tuple(recipe.weight_decay if len(w.shape) > 1 else 0.0 for w in weights)
        self.first = weights.clone(prefix="momentum", init="zeros")
        self.has_second = self.rule in ("adamw", "rmsprop")
        if self.has_second:
            start = "zeros" if self.rule == "adamw" else "ones"  # TensorFlow's RMSProp starts its mean square at one
            self.second = weights.clone(prefix="square", init=start)
        self.constants = (recipe.momentum, recipe.rms_decay, recipe.epsilon)
        self.momentum = ms.Tensor(recipe.momentum, ms.float32)
        self.heavy_ball = ops.ApplyMomentum()
        self.map = ops.HyperMap()

    def construct(self, gradients: Any, controls: Any) -> Any:
        """Update every weight.

        Args:
            gradients: Tuple of float32 tensors, shaped as ``weights``.
            controls: float32 (6,), see :data:`CONTROLS`.

        Returns:
            What the updates give, for others to depend on.
        """
        if self.rule == "adamw":
            rule = ops.partial(_adamw, self.constants, controls)
            return self.map(rule, self.decays, self.weights, gradients, self.first, self.second)
        if self.rule == "rmsprop":
            rule = ops.partial(_rmsprop, self.constants, controls)
            return self.map(rule, self.decays, self.weights, gradients, self.first, self.second)
        gradients = self.map(_decayed, self.decays, self.weights, gradients)
        if self.rule == "nesterov":
            rule = ops.partial(_nesterov, self.constants[0], controls)
            return self.map(rule, self.weights, gradients, self.first)
        rule = ops.partial(self._apply_momentum, controls[0])
        return self.map(rule, self.weights, gradients, self.first)

    def _apply_momentum(self, lr: Any, weight: Any, gradient: Any, velocity: Any) -> Any:
        return self.heavy_ball(weight, velocity, lr, gradient, self.momentum)

    def slots(self) -> list[ms.Parameter]:
        """List the state's parameters."""
        return [*self.first, *(self.second if self.has_second else ())]


class TrainStep(nn.Cell):
    """A whole training step.

    Args:
        net: The network, with ``features`` and ``classify``.
        recipe: Loss, optimiser and averaging.
        classes: Number of classes.
        average: The network that holds the averaged weights, or None where the recipe averages none.
        teacher: A network in evaluation mode whose guesses are part of the target, or None.
        head_only: The step takes pooled features instead of images, and trains the head alone.
        ranks: Number of processes that step together: gradients, loss and BatchNorm's statistics are averaged over
            them, so that every rank holds the same state after a step.

    With ``accumulate_steps`` over 1 a step only adds its gradients up; :class:`ApplyAccumulated` updates the weights.

    Source:
        Distillation: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2.
    """

    def __init__(
        self,
        net: nn.Cell,
        recipe: Recipe,
        classes: int,
        *,
        average: nn.Cell | None = None,
        teacher: nn.Cell | None = None,
        head_only: bool = False,
        ranks: int = 1,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.head_only = head_only
        self.classes = classes
        self.smoothing, self.clip_norm = recipe.label_smoothing, recipe.clip_norm
        self.clip_tensor = ms.Tensor(recipe.clip_norm, ms.float32)
        self.map = ops.HyperMap()
        self.trained = ms.ParameterTuple(trained_parameters(net, head_only=head_only))
        self.optimizer = Optimizer(recipe, self.trained)
        self.gradient = ops.value_and_grad(self.loss, None, self.trained)
        self.accumulate_steps = recipe.accumulate_steps
        if self.accumulate_steps > 1:
            self.accumulated = self.trained.clone(prefix="accumulated", init="zeros")
        self.distills = teacher is not None
        self.teacher: Any = teacher
        self.distill_weight, self.temperature = recipe.distill_weight, recipe.distill_temperature
        self.averages = average is not None
        if average is not None:
            own, kept = net.parameters_dict(), average.parameters_dict()
            self.live = ms.ParameterTuple([own[name.removeprefix("ema.")] for name in kept])
            self.average = ms.ParameterTuple(list(kept.values()))
        self.ranks = ranks
        if ranks > 1:
            self.all_reduce = ops.AllReduce()
            fixed = [p for p in net.get_parameters() if not p.requires_grad]  # BatchNorm's moving statistics
            self.has_statistics = recipe.freeze == "none"
            self.statistics = ms.ParameterTuple(fixed if self.has_statistics else [])
            self.statistics_sizes, self.sizes = _sizes(self.statistics), _sizes(self.trained)
            self.statistics_starts = _starts(self.statistics_sizes, 0)
            self.starts = _starts(self.sizes, sum(self.statistics_sizes))
            self.cutter = ops.Slice()
        self.set_train(True)
        if teacher is not None:
            teacher.set_train(False)

    def loss(self, inputs: Any, mask: Any, label: Any, mix_label: Any, mix_weight: Any, taught: Any) -> Any:
        """Return the mean cross-entropy against smoothed, possibly mixed, labels, and against a teacher's guesses."""
        pooled = inputs if self.head_only else self.net.features(inputs)
        logits = self.net.classify(pooled * mask)
        log_p = ops.log_softmax(logits, 1)
        weight = ops.expand_dims(mix_weight, 1)
        target = weight * self._one_hot(label) + (1.0 - weight) * self._one_hot(mix_label)
        target = (1.0 - self.smoothing) * target + self.smoothing / self.classes
        loss = -ops.mean(ops.sum(target * log_p, 1))
        if self.distills:
            soft = ops.log_softmax(logits / self.temperature, 1)
            aim = ops.softmax(taught, 1)
            apart = ops.mean(ops.sum(aim * (ops.log_softmax(taught, 1) - soft), 1))
            loss = (1.0 - self.distill_weight) * loss + self.distill_weight * self.temperature**2 * apart
        return loss

    def _one_hot(self, label: Any) -> Any:
        return ops.cast(ops.equal(ops.expand_dims(label, 1), ops.arange(self.classes).astype(ms.int32)), ms.float32)

    def construct(self, inputs: Any, mask: Any, label: Any, mix_label: Any, mix_weight: Any, controls: Any) -> Any:
        """Run the step.

        Args:
            inputs: uint8 (N, H, W, 3), or float32 (N, C) pooled features for the head alone.
            mask: float32 (N, C), the dropout mask.
            label: int32 (N,).
            mix_label: int32 (N,), the second label of mixed images; ``label`` again otherwise.
            mix_weight: float32 (N,), the share of ``label``.
            controls: float32 (6,), see :data:`CONTROLS`.

        Returns:
            float32 (3,): the loss before the update, the global norm of the gradient (0 where it is not clipped, or
            only added up), and the share of ranks that ask to stop.
        """
        taught = controls  # stands for the teacher's logits where there is none
        if self.distills:
            taught = self.teacher.classify(self.teacher.features(inputs)) / self.temperature
        loss, gradients = self.gradient(inputs, mask, label, mix_label, mix_weight, taught)
        stop = controls[4]
        if self.ranks > 1:
            loss, stop, gradients = self._average_over_ranks(loss, stop, gradients)
        if self.accumulate_steps > 1:
            done = self.map(ops.partial(_added, controls[5]), self.accumulated, gradients)
            return ops.depend(ops.stack((loss, ops.zeros_like(loss), stop)), done)
        norm, done = self.update(gradients, controls)
        return ops.depend(ops.stack((loss, norm, stop)), done)

    def update(self, gradients: Any, controls: Any) -> Any:
        """Clip, change the weights and average them; give the norm, and what the updates give."""
        norm = ops.zeros_like(controls[0])
        if self.clip_norm > 0:
            norm = ops.sqrt(ops.addn(self.map(_square_sum, gradients)))
            gradients = self.map(ops.partial(_scaled, self.clip_norm / ops.maximum(norm, self.clip_tensor)), gradients)
        done = self.optimizer(gradients, controls)
        if self.averages:
            done = ops.depend(
                self.map(ops.partial(_average, ops.depend(controls, done)), self.average, self.live), done
            )
        return norm, done

    def update_accumulated(self, controls: Any) -> Any:
        """Update the weights from the mean of the gradients added up; give their norm."""
        gradients = self.map(ops.partial(_scaled, 1.0 / self.accumulate_steps), self.accumulated)
        norm, done = self.update(gradients, controls)
        return ops.depend(norm, done)

    def _average_over_ranks(self, loss: Any, stop: Any, gradients: Any) -> Any:
        """Average in one exchange: many small ones would wait for the network many times."""
        last = ops.stack((loss, stop))
        flat = ops.concat((ops.concat(self.map(_flattened, gradients)), last))
        if self.has_statistics:
            flat = ops.concat((ops.concat(self.map(_flattened, self.statistics)), flat))
        flat = self.all_reduce(flat) * (1.0 / self.ranks)
        cut = ops.partial(_cut, self.cutter, flat)
        averaged = self.map(cut, self.starts, self.sizes, self.trained)
        if self.has_statistics:
            parts = self.map(cut, self.statistics_starts, self.statistics_sizes, self.statistics)
            flat = ops.depend(flat, self.map(ops.assign, self.statistics, parts))
        return flat[-2], flat[-1], averaged

    def state(self) -> dict[str, ms.Parameter]:
        """Return by name what a resumed run must have besides the network's own parameters."""
        averages = list(self.average) if self.averages else []
        sums = list(self.accumulated) if self.accumulate_steps > 1 else []
        return {parameter.name: parameter for parameter in [*self.optimizer.slots(), *sums, *averages]}


class ApplyAccumulated(nn.Cell):
    """The update that follows every ``accumulate_steps`` steps: a graph of its own."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__(auto_prefix=False)
        self.step = step

    def construct(self, controls: Any) -> Any:
        """Update the weights; give the float32 norm of the mean gradient, 0 where it is not clipped."""
        return self.step.update_accumulated(controls)


class PooledFeatures(nn.Cell):
    """The backbone alone: images to pooled features."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, image: Any) -> Any:
        """Return float32 (N, C) of uint8 (N, H, W, 3)."""
        return self.net.features(image)


class Head(nn.Cell):
    """The head alone: pooled features to logits."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, pooled: Any) -> Any:
        """Return float32 (N, classes) of float32 (N, C)."""
        return self.net.classify(pooled)


def trained_parameters(net: nn.Cell, *, head_only: bool) -> list[ms.Parameter]:
    """List the parameters that a run trains, in the network's order."""
    parameters = list(net.trainable_params())
    if not head_only:
        return parameters
    head = {id(p) for p in net.classifier.get_parameters()}
    return [p for p in parameters if id(p) in head]
