"""The training step against the same arithmetic in float64 NumPy."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from numpy.typing import NDArray

from mbv2 import kernels as operators
from mbv2.network.model import MobileNetV2, ModelConfig
from mbv2.recipe import Recipe
from mbv2.training.optimizer import step_controls
from mbv2.training.step import ApplyAccumulated, TrainStep, dropout_mask
from tests.mbv2.reference import update

CLASSES, FEATURES, BATCH, STEPS = 4, 6, 5, 4
Array = NDArray[np.float64]
needs_kernels = pytest.mark.skipif(not operators.available(), reason=operators.describe())


class Head(nn.Cell):
    """The least network that a step takes: a matrix (decays) and a bias (does not)."""

    def __init__(self, prefix: str = "", kernels: str = "standard") -> None:
        super().__init__()
        self.kernels = kernels  # those that update it
        rng = np.random.default_rng(0)
        weight = rng.normal(size=(FEATURES, CLASSES)).astype(np.float32)
        self.weight = ms.Parameter(ms.Tensor(weight), name=f"{prefix}weight")
        self.bias = ms.Parameter(ms.Tensor(np.full(CLASSES, 0.5, np.float32)), name=f"{prefix}bias")

    def features(self, image: ms.Tensor) -> ms.Tensor:
        return image

    def classify(self, pooled: ms.Tensor) -> ms.Tensor:
        return ms.ops.matmul(pooled, self.weight) + self.bias


def softmax(logits: Array) -> Array:
    p = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(p / p.sum(1, keepdims=True))


def reference_loss(
    recipe: Recipe, weights: list[Array], inputs: tuple[Any, ...], teacher: list[Array] | None = None
) -> tuple[float, list[Array]]:
    """Return the loss and its gradients."""
    pooled, mask, label, mix_label, mix_weight = inputs
    x = pooled.astype(np.float64) * mask
    logits = x @ weights[0] + weights[1]
    p = softmax(logits)
    eye = np.eye(CLASSES)
    target = mix_weight[:, None] * eye[label] + (1 - mix_weight[:, None]) * eye[mix_label]
    target = (1 - recipe.label_smoothing) * target + recipe.label_smoothing / CLASSES
    slope = (p - target) / len(x)
    loss = float(-(target * np.log(p)).sum(1).mean())
    if teacher is not None:
        share, heat = recipe.distill_weight, recipe.distill_temperature
        soft = softmax(logits / heat)
        taught = softmax((pooled.astype(np.float64) @ teacher[0] + teacher[1]) / heat)
        apart = float((taught * (np.log(taught) - np.log(soft))).sum(1).mean())
        loss = (1 - share) * loss + share * heat**2 * apart
        slope = (1 - share) * slope + share * heat * (soft - taught) / len(x)
    return loss, [x.T @ slope, slope.sum(0)]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            Recipe(optimizer="sgd", weight_decay=0.1, dropout=0.5, label_smoothing=0.1), marks=pytest.mark.slow
        ),
        pytest.param(Recipe(optimizer="nesterov", weight_decay=0.1, clip_norm=0.3), marks=pytest.mark.slow),
        pytest.param(
            Recipe(optimizer="adamw", weight_decay=0.1, beta1=0.8, beta2=0.99, ema_decay=0.9), marks=pytest.mark.slow
        ),
        pytest.param(
            Recipe(optimizer="rmsprop", weight_decay=0.1, epsilon=1e-3, ema_decay=0.9), marks=pytest.mark.long
        ),
        pytest.param(
            Recipe(distill_from="teacher.ckpt", distill_weight=0.7, distill_temperature=3, dropout=0.5),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sgd", "nesterov", "adamw", "rmsprop", "distilled"],
)
@pytest.mark.parametrize("kernels", ["standard", pytest.param("native", marks=needs_kernels)])
def test_steps_equal_the_definition(recipe: Recipe, kernels: str) -> None:
    rng = np.random.default_rng(1)
    net = Head(kernels=kernels)
    average = Head("ema.") if recipe.ema_decay else None
    teacher, taught = None, None
    if recipe.distill_from:
        taught = [rng.normal(size=(FEATURES, CLASSES)), rng.normal(size=CLASSES)]
        teacher = Head("teacher.")
        for parameter, value in zip((teacher.weight, teacher.bias), taught, strict=True):
            parameter.set_data(ms.Tensor(value.astype(np.float32)))
            parameter.requires_grad = False
    step = TrainStep(net, recipe, CLASSES, average=average, teacher=teacher)
    weights: list[Array] = [net.weight.asnumpy().astype(np.float64), net.bias.asnumpy().astype(np.float64)]
    averages = [weight.copy() for weight in weights]
    ones = 1.0 if recipe.optimizer == "rmsprop" else 0.0
    state = {"first": [np.zeros_like(w) for w in weights], "second": [np.full_like(w, ones) for w in weights]}
    for number in range(STEPS):
        pooled = rng.normal(size=(BATCH, FEATURES)).astype(np.float32)
        mask = dropout_mask(7, number, (BATCH, FEATURES), recipe.dropout)
        labels = rng.integers(0, CLASSES, (2, BATCH)).astype(np.int32)
        share = rng.random(BATCH).astype(np.float32)
        lr = 0.1 / (number + 1)
        controls = step_controls(recipe, lr, number)
        inputs = (pooled, mask, labels[0], labels[1], share)
        loss, grads = reference_loss(recipe, weights, inputs, taught)
        got = step(*(ms.Tensor(value) for value in (*inputs, controls))).asnumpy()
        if recipe.clip_norm:
            norm = float(np.sqrt(sum((grad**2).sum() for grad in grads)))
            assert got[1] == pytest.approx(norm, rel=1e-4)
            grads = [grad * min(1.0, recipe.clip_norm / norm) for grad in grads]
        update(recipe, number + 1, lr, weights, grads, state)
        averages = [controls[3] * a + (1 - controls[3]) * w for a, w in zip(averages, weights, strict=True)]
        assert got[0] == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(net.weight.asnumpy(), weights[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(net.bias.asnumpy(), weights[1], rtol=1e-4, atol=1e-6)
    if average is not None:
        np.testing.assert_allclose(average.weight.asnumpy(), averages[0], rtol=1e-4, atol=1e-6)


def test_the_backbone_is_all_but_the_classifier() -> None:
    net = MobileNetV2(ModelConfig(3, width=0.35), kernels="standard")
    step = TrainStep(net, Recipe(backbone_lr_factor=0.1), 3)
    rates = {weight.name: factor for weight, factor in zip(step.trained, step.optimizer.factors, strict=True)}
    assert {name for name, factor in rates.items() if factor == 1} == {"classifier.weight", "classifier.bias"}
    assert set(rates.values()) == {0.1, 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["standard", pytest.param("native", marks=needs_kernels)])
def test_accumulated_steps_equal_one_with_the_whole_batch(kernels: str) -> None:
    """Two and a half updates of two steps: the last step alone changes nothing."""
    split = Recipe(optimizer="adamw", accumulate_steps=2, clip_norm=0.3, ema_decay=0.9, weight_decay=0.1)
    whole = Recipe(optimizer="adamw", clip_norm=0.3, ema_decay=0.9, weight_decay=0.1)
    nets, averages = (Head(kernels=kernels), Head(kernels=kernels)), (Head("ema."), Head("ema."))
    steps = [TrainStep(n, r, CLASSES, average=a) for n, r, a in zip(nets, (split, whole), averages, strict=True)]
    apply = ApplyAccumulated(steps[0])
    rng = np.random.default_rng(4)
    for number in range(5):
        pooled = rng.normal(size=(2 * BATCH, FEATURES)).astype(np.float32)
        label = rng.integers(0, CLASSES, 2 * BATCH).astype(np.int32)
        inputs = (pooled, np.ones_like(pooled), label, label, np.ones(2 * BATCH, np.float32))
        halves = [tuple(ms.Tensor(value[part]) for value in inputs) for part in np.split(np.arange(2 * BATCH), 2)]
        first, second = (ms.Tensor(step_controls(split, 0.1, 2 * number + half)) for half in (0, 1))
        if number == 4:
            steps[0](*halves[0], first)
            break
        losses = [
            steps[0](*half, controls).asnumpy()[0] for half, controls in zip(halves, (first, second), strict=True)
        ]
        norm = float(apply(second).asnumpy())
        got = steps[1](*(ms.Tensor(value) for value in inputs), ms.Tensor(step_controls(whole, 0.1, number))).asnumpy()
        assert got[0] == pytest.approx(np.mean(losses), rel=1e-5)
        assert got[1] == pytest.approx(norm, rel=1e-4)
    for one, two in zip((nets[0], averages[0]), (nets[1], averages[1]), strict=True):
        np.testing.assert_allclose(one.weight.asnumpy(), two.weight.asnumpy(), rtol=1e-4, atol=1e-6)
    assert np.abs(nets[0].weight.asnumpy() - averages[0].weight.asnumpy()).max() > 1e-3


def test_dropout_mask_depends_on_seed_and_step_alone() -> None:
    first = dropout_mask(3, 5, (64, 1280), 0.2)
    assert np.array_equal(first, dropout_mask(3, 5, (64, 1280), 0.2))
    assert not np.array_equal(first, dropout_mask(3, 6, (64, 1280), 0.2))
    assert not np.array_equal(first, dropout_mask(4, 5, (64, 1280), 0.2))


def test_dropout_mask_keeps_the_mean() -> None:
    mask = dropout_mask(0, 0, (64, 1280), 0.2)
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1) / np.float32(0.8)}
    assert mask.mean() == pytest.approx(1.0, abs=0.01)
    assert (dropout_mask(0, 0, (2, 3), 0) == 1).all()
