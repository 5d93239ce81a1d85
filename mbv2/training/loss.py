"""The loss of a training step, and what it divides by."""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from mbv2.recipe import Recipe


def balanced_weights(counts: Sequence[int]) -> NDArray[np.float32]:
    """Return the weight of each class: ``n / (K * n_k)`` for n images of K classes, 0 for a class without images.

    An image weighs 1 on average over the training split.
    """
    found = np.array(counts, np.float64)
    there = found > 0
    return np.where(there, found.sum() / (there.sum() * np.maximum(found, 1)), 0).astype(np.float32)


class Loss(nn.Cell):
    """The mean cross-entropy against smoothed, possibly mixed labels, and the distance from a teacher's guesses.

    Where it ``divides``, it is still to be divided by :meth:`image_weight`, after both are averaged over ranks and
    accumulated steps: the result is then that of one step with all their images.

    Args:
        net: The network, with ``features`` and ``classify``.
        recipe: Smoothing, and the teacher's share and temperature.
        classes: Number of classes.
        class_counts: Training images of each class, where the recipe weights classes.
        distills: There is a teacher.
        head_only: The input is pooled features instead of images.

    Source:
        Distillation: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2. Class weights as
        in PyTorch's CrossEntropyLoss; the teacher's part of an image weighs what its label does.
    """

    def __init__(
        self,
        net: nn.Cell,
        recipe: Recipe,
        classes: int,
        *,
        class_counts: Sequence[int],
        distills: bool,
        head_only: bool,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.head_only, self.distills = head_only, distills
        self.classes = classes
        self.smoothing, self.others = recipe.label_smoothing, max(1, classes - 1)
        self.spares_the_true = recipe.label_smoothing_over == "others"
        self.distill_weight, self.temperature = recipe.distill_weight, recipe.distill_temperature
        self.weighs = recipe.class_weights == "balanced"
        if self.weighs:
            self.class_weights = ms.Tensor(balanced_weights(class_counts))
        # PyTorch divides by the weights of the labels where an image has one label, else by the number of images.
        self.divides = self.weighs and not (recipe.mixup_alpha or recipe.cutmix_alpha)

    def construct(self, inputs: Any, mask: Any, label: Any, mix_label: Any, mix_weight: Any, taught: Any) -> Any:
        """Return the loss.

        Args:
            inputs: uint8 (N, H, W, 3), or float32 (N, C) pooled features.
            mask: float32 (N, C), the dropout mask.
            label: int32 (N,).
            mix_label: int32 (N,).
            mix_weight: float32 (N,), the share of ``label``.
            taught: float32 (N, classes), the teacher's logits over the temperature; any tensor without a teacher.
        """
        pooled = inputs if self.head_only else self.net.features(inputs)
        logits = self.net.classify(pooled * mask)
        log_p = ops.log_softmax(logits, 1)
        share = ops.expand_dims(mix_weight, 1)
        target = share * self._one_hot(label) + (1.0 - share) * self._one_hot(mix_label)
        if self.distills:
            soft = ops.log_softmax(logits / self.temperature, 1)
            apart = ops.sum(ops.softmax(taught, 1) * (ops.log_softmax(taught, 1) - soft), 1)
            if self.weighs:
                apart = apart * ops.sum(target * self.class_weights, 1)
        if self.weighs:
            log_p = log_p * self.class_weights
        loss = -ops.mean(ops.sum(self._smoothed(target) * log_p, 1))
        if self.distills:
            loss = (1.0 - self.distill_weight) * loss + self.distill_weight * self.temperature**2 * ops.mean(apart)
        return loss

    def image_weight(self, label: Any) -> Any:
        """Return the mean weight of a step's images: what the loss and its gradients are divided by."""
        return ops.mean(ops.gather(self.class_weights, label, 0))

    def _smoothed(self, target: Any) -> Any:
        if self.spares_the_true:
            spread = self.smoothing / self.others
            return (1.0 - self.smoothing - spread) * target + spread
        return (1.0 - self.smoothing) * target + self.smoothing / self.classes

    def _one_hot(self, label: Any) -> Any:
        return ops.cast(ops.equal(ops.expand_dims(label, 1), ops.arange(self.classes).astype(ms.int32)), ms.float32)
