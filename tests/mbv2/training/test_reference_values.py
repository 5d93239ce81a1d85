"""Schedules, optimizers and losses against what PyTorch and timm gave (``tests/mbv2/reference_values``)."""

import json
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mbv2.recipe import Recipe
from mbv2.training.optimizer import step_controls
from mbv2.training.schedule import learning_rate
from mbv2.training.step import ApplyAccumulated, TrainStep

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "reference_values" / "training.json").read_bytes())
TRAININGS = REFERENCE["trainings"]
LONG = ("nesterov", "adamw")


def names(cases: list[dict[str, Any]], *fields: str) -> list[str]:
    """Name each case by what it is about."""
    return ["-".join(str(case["recipe"][field]) for field in fields if field in case["recipe"]) for case in cases]


@pytest.mark.parametrize("case", REFERENCE["schedules"], ids=names(REFERENCE["schedules"], "schedule"))
def test_rates_are_those_of_pytorch(case: dict[str, Any]) -> None:
    recipe = Recipe(**case["recipe"])
    found = [learning_rate(recipe, step, REFERENCE["steps_per_epoch"], 64) for step in range(len(case["rates"]))]
    np.testing.assert_allclose(found, case["rates"], rtol=1e-6)


class Linear(nn.Cell):
    """A matrix with a bias."""

    def __init__(self, name: str) -> None:
        super().__init__()
        for part in ("weight", "bias"):
            value = np.array(REFERENCE["start"][f"{name}.{part}"], np.float32)
            setattr(self, part, ms.Parameter(ms.Tensor(value), name=f"{name}.{part}"))

    def construct(self, value: ms.Tensor) -> ms.Tensor:
        return ms.ops.matmul(value, self.weight) + self.bias


class LinearNet(nn.Cell):
    """A linear backbone and a linear classifier."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.backbone, self.classifier = Linear("backbone"), Linear("classifier")

    def features(self, image: ms.Tensor) -> ms.Tensor:
        return self.backbone(image)

    def classify(self, pooled: ms.Tensor) -> ms.Tensor:
        return self.classifier(pooled)


def step_of(net: LinearNet, recipe: Recipe, ranks: int = 1) -> TrainStep:
    counts = REFERENCE["class_counts"]
    return TrainStep(net, recipe, len(counts), class_counts=counts, ranks=ranks)


def tensors(batch: dict[str, Any], recipe: Recipe, rows: slice = slice(None)) -> list[ms.Tensor]:
    """Return what the step takes of a batch."""
    label = np.array(batch["label"], np.int32)[rows]
    mix_label, share = label, np.ones(len(label), np.float32)
    if recipe.mixup_alpha:
        mix_label = np.array(batch["mix_label"], np.int32)[rows]
        share = np.array(batch["mix_weight"], np.float32)[rows]
    mask = np.ones((len(label), len(REFERENCE["start"]["classifier.weight"])), np.float32)
    inputs = np.array(batch["inputs"], np.float32)[rows]
    return [ms.Tensor(value) for value in (inputs, mask, label, mix_label, share)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    # make test takes those two from tests/mbv2/training/test_step.py alone, which knows each optimizer's definition.
    [pytest.param(case, marks=[pytest.mark.long] * (case["recipe"]["optimizer"] in LONG)) for case in TRAININGS],
    ids=names(TRAININGS, "optimizer", "backbone_lr_factor", "class_weights", "mixup_alpha", "label_smoothing_over"),
)
def test_steps_are_those_of_pytorch(case: dict[str, Any]) -> None:
    recipe, net = Recipe(dropout=0, **case["recipe"]), LinearNet()
    step, losses = step_of(net, recipe), []
    for number, batch in enumerate(REFERENCE["batches"]):
        controls = ms.Tensor(step_controls(recipe, recipe.lr, number))
        losses.append(float(step(*tensors(batch, recipe), controls).asnumpy()[0]))
    np.testing.assert_allclose(losses, case["losses"], rtol=1e-6, atol=1e-6)
    for name, parameter in net.parameters_dict().items():
        np.testing.assert_allclose(parameter.asnumpy(), case["weights"][name], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mixup_alpha", [0.0, pytest.param(0.2, marks=pytest.mark.long)])
def test_weighted_classes_accumulated_over_steps_equal_one_step_with_all_images(mixup_alpha: float) -> None:
    case = {**TRAININGS[2]["recipe"], "class_weights": "balanced", "mixup_alpha": mixup_alpha, "clip_norm": 0.3}
    whole, split = Recipe(**case), Recipe(**case, accumulate_steps=2)
    nets = LinearNet(), LinearNet()
    one, parts = step_of(nets[0], whole), step_of(nets[1], split)
    update = ApplyAccumulated(parts)
    for number, batch in enumerate(REFERENCE["batches"][:3]):
        one(*tensors(batch, whole), ms.Tensor(step_controls(whole, 0.1, number)))
        for half in (0, 1):
            controls = ms.Tensor(step_controls(split, 0.1, 2 * number + half))
            parts(*tensors(batch, split, slice(3 * half, 3 * half + 3)), controls)
        update(controls)
    for first, second in zip(nets[0].get_parameters(), nets[1].get_parameters(), strict=True):
        np.testing.assert_allclose(first.asnumpy(), second.asnumpy(), rtol=1e-5, atol=1e-6)
    assert ("accumulated.image_weight" in parts.state()) == (not mixup_alpha)


def accumulated(rank: int, ranks: int) -> list[np.ndarray[Any, Any]]:
    """Return the weights after two updates of two steps, of which this rank takes its share of the rows."""
    fields = {"class_weights": "balanced", "clip_norm": 0.3, "accumulate_steps": 2, **TRAININGS[2]["recipe"]}
    recipe, net = Recipe(**fields), LinearNet()
    step, share = step_of(net, recipe, ranks), len(REFERENCE["batches"][0]["label"]) // ranks
    update = ApplyAccumulated(step)
    for number, batch in enumerate(REFERENCE["batches"][:4]):
        controls = ms.Tensor(step_controls(recipe, 0.1, number))
        step(*tensors(batch, recipe, slice(rank * share, (rank + 1) * share)), controls)
        if number % 2:
            update(controls)
    return [parameter.asnumpy() for parameter in net.get_parameters()]
