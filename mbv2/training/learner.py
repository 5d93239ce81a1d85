"""The networks of a run and its compiled graphs: train on a batch, predict, and list what is saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from imnet_prep.types import Batch
from mbv2.data import AnyBatch, RunData, batch_inputs
from mbv2.network.model import MobileNetV2
from mbv2.runtime import runtime
from mbv2.scoring.score import Predict, Scores, network_predict, score_batches, sum_over_ranks
from mbv2.training.optimizer import step_controls
from mbv2.training.options import RunOptions
from mbv2.training.ranks import sum_floats
from mbv2.training.step import ApplyAccumulated, Head, TrainStep, dropout_mask
from mbv2.weights.checkpoint import AVERAGE_PREFIX, Checkpoint, Tensors, load_parameters, parameter_tensors
from mbv2.weights.pretrained import load_pretrained, load_teacher, network_config


class Learner:
    """What learns.

    Args:
        options: Of the run.
        classes: Names of the records' classes, in label order.
        class_counts: Training images of each class.
        start: The weights to start from, or None for new ones drawn from the seed.

    Attributes:
        config: The network's configuration.
        net: The network that trains.
        average: The one that holds the averaged weights, or None where the recipe averages none.
        head_only: Whether only the head trains, on pooled features.
    """

    def __init__(
        self, options: RunOptions, classes: tuple[str, ...], class_counts: tuple[int, ...], start: Checkpoint | None
    ) -> None:
        recipe = self.recipe = options.recipe
        self.seed, self.rank, self.ranks = options.seed, runtime().rank, runtime().ranks
        self.head_only = recipe.freeze == "backbone"
        self.config = network_config(recipe, len(classes), start)
        ms.set_seed(options.seed)
        self.net = MobileNetV2(self.config, kernels=options.kernels, precision=recipe.precision)
        if start is not None:
            load_pretrained(self.net, start, classes)
        if recipe.freeze == "bn":
            self.net.freeze_batchnorm()
        self.average = self._averaged(options.kernels) if recipe.ema_decay else None
        teacher = None
        if recipe.distill_from:
            teacher = load_teacher(Path(recipe.distill_from), classes, kernels=options.kernels)
        self._step = TrainStep(
            self.net,
            recipe,
            self.config.classes,
            average=self.average,
            teacher=teacher,
            head_only=self.head_only,
            ranks=self.ranks,
            class_counts=class_counts,
        )
        self._apply_accumulated = ApplyAccumulated(self._step) if recipe.accumulate_steps > 1 else None

    def _averaged(self, kernels: str) -> MobileNetV2:
        average = MobileNetV2(self.config, kernels=kernels)
        load_parameters(average.get_parameters(), parameter_tensors(self.net.get_parameters()), "average")
        average.set_train(False)
        for parameter in average.get_parameters():
            parameter.name = f"{AVERAGE_PREFIX}{parameter.name}"
        return average

    def train(self, batch: AnyBatch, step: int, lr: float, *, stop: bool) -> tuple[Any, Any]:
        """Train on one batch.

        Args:
            batch: Of the recipe's size.
            step: Number of the step in the whole run, from 0.
            lr: The learning rate.
            stop: Whether this rank asks all to stop.

        Returns:
            What :class:`TrainStep` gives, and where the step ends in the update of several steps the norm of their
            gradient, else None. Both are still being computed.
        """
        rows = len(batch)
        shape = (rows * self.ranks, self.net.feature_count)  # two ranks with 16 images drop what one with 32 does
        mask = dropout_mask(self.seed, step, shape, self.recipe.dropout)[self.rank * rows : (self.rank + 1) * rows]
        mix_label, weight = batch.label, np.ones(rows, np.float32)
        if isinstance(batch, Batch) and batch.mix_label is not None and batch.mix_weight is not None:
            mix_label, weight = batch.mix_label, batch.mix_weight
        controls = step_controls(self.recipe, lr, step, stop=stop)
        inputs = (batch_inputs(batch), mask, batch.label, mix_label, weight, controls)
        result = self._step(*(ms.Tensor(value) for value in inputs))
        if self._apply_accumulated is None or (step + 1) % self.recipe.accumulate_steps:
            return result, None
        return result, self._apply_accumulated(ms.Tensor(controls))

    def predict(self, *, live: bool = False) -> Predict:
        """Return what is scored: the averaged weights where there are any, or the live ones, in evaluation mode."""
        net = self.net if live or self.average is None else self.average
        net.set_train(False)
        return network_predict(Head(net) if self.head_only else net)

    def evaluate(self, data: RunData, *, live: bool, stop: Callable[[], bool]) -> Scores:
        """Score the averaged weights or the live ones, see :meth:`predict`, on the validation split.

        Raises:
            Interrupted: ``stop`` said so.
        """
        assert data.val is not None
        try:
            return score_batches(
                self.predict(live=live),
                data.val.epoch(0),
                classes=self.config.classes,
                batch_size=self.recipe.batch_size,
                total=data.val_images,
                left_out=lambda: data.left_out(sum_floats),
                reduce=sum_over_ranks,
                stop=stop,
            )
        finally:
            self.net.set_train(True)

    def state(self) -> list[Any]:
        """List every parameter of ``last.ckpt``."""
        return [*self.net.get_parameters(), *self._step.state().values()]

    def weights(self) -> Tensors:
        """Copy the weights of ``best.ckpt``: the averaged ones where there are any."""
        net = self.net if self.average is None else self.average
        tensors = parameter_tensors(net.get_parameters())
        return {name.removeprefix(AVERAGE_PREFIX): value for name, value in tensors.items()}
