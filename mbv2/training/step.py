"""One training step as one graph: forward, loss, gradients, update, averaged weights.

Nothing in it draws random numbers or keeps a counter: the dropout mask, the rates and the corrections that depend
on the step come in as tensors, so that a step is a pure function of the state and its inputs.
"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from mbv2.recipe import Recipe
from mbv2.training.loss import Loss
from mbv2.training.optimizer import Optimizer

_DROPOUT_STREAM = 0xD0  # keeps the mask's random numbers apart from every other use of the seed


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


# Functions over one parameter, mapped over all of them as those of the optimizer.


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


class RankMean(nn.Cell):
    """Averages gradients, BatchNorm's moving statistics and some scalars over the ranks.

    All in one exchange: many small ones would wait for the network many times.

    Args:
        trained: The parameters that the gradients are of.
        statistics: The moving statistics, changed in place.
        ranks: Number of processes.
    """

    def __init__(self, trained: ms.ParameterTuple, statistics: ms.ParameterTuple, ranks: int) -> None:
        super().__init__(auto_prefix=False)
        self.trained, self.statistics, self.ranks = trained, statistics, ranks
        self.has_statistics = len(statistics) > 0
        self.all_reduce, self.cutter, self.map = ops.AllReduce(), ops.Slice(), ops.HyperMap()
        self.statistics_sizes, self.sizes = _sizes(statistics), _sizes(trained)
        self.statistics_starts = _starts(self.statistics_sizes, 0)
        self.starts = _starts(self.sizes, sum(self.statistics_sizes))

    def construct(self, gradients: Any, loss: Any, weight: Any, stop: Any) -> Any:
        """Return the mean gradients and the means of the three scalars."""
        flat = ops.concat((ops.concat(self.map(_flattened, gradients)), ops.stack((loss, weight, stop))))
        if self.has_statistics:
            flat = ops.concat((ops.concat(self.map(_flattened, self.statistics)), flat))
        flat = self.all_reduce(flat) * (1.0 / self.ranks)
        cut = ops.partial(_cut, self.cutter, flat)
        averaged = self.map(cut, self.starts, self.sizes, self.trained)
        if self.has_statistics:
            parts = self.map(cut, self.statistics_starts, self.statistics_sizes, self.statistics)
            flat = ops.depend(flat, self.map(ops.assign, self.statistics, parts))
        return averaged, flat[-3], flat[-2], flat[-1]


class TrainStep(nn.Cell):
    """A whole training step.

    Args:
        net: The network, with ``features`` and ``classify``.
        recipe: Loss, optimizer and averaging.
        classes: Number of classes.
        average: The network that holds the averaged weights, or None where the recipe averages none.
        teacher: A network in evaluation mode whose guesses are part of the target, or None.
        head_only: The step takes pooled features instead of images, and trains the head alone.
        ranks: Number of processes that step together: gradients, loss and BatchNorm's statistics are averaged over
            them, so that every rank holds the same state after a step.
        class_counts: Training images of each class, where the recipe weights classes.

    With ``accumulate_steps`` over 1 a step only adds its gradients up; :class:`ApplyAccumulated` updates the weights.
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
        class_counts: Sequence[int] = (),
    ) -> None:
        super().__init__(auto_prefix=False)
        self.clip_norm, self.clip_tensor = recipe.clip_norm, ms.Tensor(recipe.clip_norm, ms.float32)
        self.map = ops.HyperMap()
        self.trained = ms.ParameterTuple(trained_parameters(net, head_only=head_only))
        head = head_names(net) if recipe.backbone_lr_factor != 1 else frozenset()
        self.optimizer = Optimizer(recipe, self.trained, head, native=getattr(net, "kernels", "") == "native")
        self.distills, self.temperature = teacher is not None, recipe.distill_temperature
        self.teacher: Any = teacher
        self.loss = Loss(
            net, recipe, classes, class_counts=class_counts, distills=teacher is not None, head_only=head_only
        )
        self.gradient = ops.value_and_grad(self.loss, None, self.trained)
        self.accumulate_steps = recipe.accumulate_steps
        if self.accumulate_steps > 1:
            self.accumulated = self.trained.clone(prefix="accumulated", init="zeros")
            if self.loss.divides:
                zero = ms.Tensor(np.zeros(1, np.float32))
                self.accumulated_weight = ms.Parameter(zero, name="accumulated.image_weight")
        self.averages = average is not None
        if average is not None:
            own, kept = net.parameters_dict(), average.parameters_dict()
            self.live = ms.ParameterTuple([own[name.removeprefix("ema.")] for name in kept])
            self.average = ms.ParameterTuple(list(kept.values()))
        self.ranks = ranks
        if ranks > 1:
            fixed = [p for p in net.get_parameters() if not p.requires_grad]  # BatchNorm's moving statistics
            self.rank_mean = RankMean(self.trained, ms.ParameterTuple(fixed if recipe.freeze == "none" else []), ranks)
        self.set_train(True)
        if teacher is not None:
            teacher.set_train(False)

    def construct(self, inputs: Any, mask: Any, label: Any, mix_label: Any, mix_weight: Any, controls: Any) -> Any:
        """Run the step.

        Args:
            inputs: uint8 (N, H, W, 3), or float32 (N, C) pooled features for the head alone.
            mask: float32 (N, C), the dropout mask.
            label: int32 (N,).
            mix_label: int32 (N,), the second label of mixed images; ``label`` again otherwise.
            mix_weight: float32 (N,), the share of ``label``.
            controls: float32 (6,), see :data:`~mbv2.training.optimizer.CONTROLS`.

        Returns:
            float32 (3,): the loss before the update, the global norm of the gradient (0 where it is not clipped, or
            only added up), and the share of ranks that ask to stop.
        """
        taught = controls  # stands for the teacher's logits where there is none
        if self.distills:
            taught = self.teacher.classify(self.teacher.features(inputs)) / self.temperature
        loss, gradients = self.gradient(inputs, mask, label, mix_label, mix_weight, taught)
        weight, stop = controls[4], controls[4]  # the weight counts only where the loss divides by it
        if self.loss.divides:
            weight = self.loss.image_weight(label)
        if self.ranks > 1:
            gradients, loss, weight, stop = self.rank_mean(gradients, loss, weight, stop)
        if self.loss.divides:
            loss = loss / weight
        if self.accumulate_steps > 1:
            done = self._accumulate(gradients, weight, controls[5])
            return ops.depend(ops.stack((loss, ops.zeros_like(loss), stop)), done)
        if self.loss.divides:
            gradients = self.map(ops.partial(_scaled, 1.0 / weight), gradients)
        norm, done = self.update(gradients, controls)
        return ops.depend(ops.stack((loss, norm, stop)), done)

    def _accumulate(self, gradients: Any, weight: Any, keep: Any) -> Any:
        done = self.map(ops.partial(_added, keep), self.accumulated, gradients)
        if self.loss.divides:
            done = ops.depend(_added(keep, self.accumulated_weight, ops.reshape(weight, (1,))), done)
        return done

    def update_accumulated(self, controls: Any) -> Any:
        """Update the weights from the mean of the gradients added up; return its norm."""
        share = 1.0 / self.accumulate_steps
        if self.loss.divides:
            share = 1.0 / self.accumulated_weight
        gradients = self.map(ops.partial(_scaled, share), self.accumulated)
        norm, done = self.update(gradients, controls)
        return ops.depend(norm, done)

    def update(self, gradients: Any, controls: Any) -> Any:
        """Clip, change the weights and average them; return the norm and the updates' values."""
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

    def state(self) -> dict[str, ms.Parameter]:
        """Return by name what a resumed run must have besides the network's own parameters."""
        averages = list(self.average) if self.averages else []
        sums = list(self.accumulated) if self.accumulate_steps > 1 else []
        if sums and self.loss.divides:
            sums.append(self.accumulated_weight)
        return {parameter.name: parameter for parameter in [*self.optimizer.slots(), *sums, *averages]}


class ApplyAccumulated(nn.Cell):
    """The update that follows every ``accumulate_steps`` steps: a graph of its own."""

    def __init__(self, step: TrainStep) -> None:
        super().__init__(auto_prefix=False)
        self.step = step

    def construct(self, controls: Any) -> Any:
        """Update the weights; return the float32 norm of the mean gradient, 0 where it is not clipped."""
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


def head_names(net: nn.Cell) -> frozenset[str]:
    """Return the names of the classifier's parameters."""
    return frozenset(parameter.name for parameter in net.classifier.get_parameters())


def trained_parameters(net: nn.Cell, *, head_only: bool) -> list[ms.Parameter]:
    """List the parameters that a run trains, in the network's order."""
    head = head_names(net) if head_only else frozenset()
    return [p for p in net.trainable_params() if not head_only or p.name in head]
