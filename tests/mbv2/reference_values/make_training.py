"""Write ``training.json``: what PyTorch and timm give for schedules, optimizers and losses, in float64.

Neither is a dependency of the project. In an environment that has both::

    python tests/mbv2/reference_values/make_training.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.optim import RMSpropTF
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR, StepLR

STEPS_PER_EPOCH, INPUTS, FEATURES, CLASSES, BATCH, STEPS = 10, 5, 4, 3, 6, 5
COUNTS = (50, 20, 5)  # training images of each class


def schedules() -> list[dict[str, Any]]:
    """Return rates at every step of 4 epochs, from 0.4 down, after a warm-up of 1.5 epochs where there is one."""
    total, warmup = 4 * STEPS_PER_EPOCH, 15
    rest = total - warmup
    after: dict[str, tuple[dict[str, Any], Callable[[Any], LRScheduler]]] = {
        "cosine": ({"final_lr_frac": 0.1}, lambda o: CosineAnnealingLR(o, T_max=rest, eta_min=0.04)),
        "linear": ({"final_lr_frac": 0.25}, lambda o: LinearLR(o, 1.0, 0.25, total_iters=rest)),
        "constant": ({}, lambda o: ConstantLR(o, factor=1.0, total_iters=0)),
    }
    found = []
    for name, (fields, rule) in after.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
        rise = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1)
        scheduler = SequentialLR(optimizer, [rise, rule(optimizer)], milestones=[warmup])
        recipe = {"schedule": name, "warmup_epochs": 1.5, "lr": 0.4, "epochs": 4, **fields}
        found.append({"recipe": recipe, "rates": rates(optimizer, scheduler, total)})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    recipe = {"schedule": "step", "warmup_frac": 0, "lr": 0.4, "epochs": 4, "step_epochs": 0.5, "step_gamma": 0.7}
    found.append({"recipe": recipe, "rates": rates(optimizer, StepLR(optimizer, 5, gamma=0.7), total)})
    return found


def rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, total: int) -> list[float]:
    """Return the rate of each of the first steps."""
    found = []
    for _ in range(total):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def optimizer_of(recipe: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer that a recipe names."""
    lr, name = recipe["lr"], recipe["optimizer"]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(recipe["beta1"], recipe["beta2"]), eps=recipe["epsilon"])
    if name == "rmsprop":
        return RMSpropTF(groups, lr=lr, alpha=recipe["rms_decay"], eps=recipe["epsilon"], momentum=recipe["momentum"])
    return torch.optim.SGD(groups, lr=lr, momentum=recipe["momentum"], nesterov=name == "nesterov")


def loss_of(recipe: dict[str, Any], logits: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss that a recipe names."""
    label, weights, smoothing = torch.tensor(batch["label"]), None, recipe["label_smoothing"]
    if recipe.get("class_weights") == "balanced":
        weights = torch.tensor([sum(COUNTS) / (len(COUNTS) * count) for count in COUNTS])
    target = label
    if recipe.get("mixup_alpha"):  # a target of two labels is one of probabilities
        share = torch.tensor(batch["mix_weight"])[:, None]
        eye = torch.eye(CLASSES)
        target = share * eye[label] + (1 - share) * eye[torch.tensor(batch["mix_label"])]
    if recipe.get("label_smoothing_over") == "others":  # as CrossEntropyWithLabelSmooth of MindSpore's model zoo
        off = smoothing / (CLASSES - 1)
        hot = torch.nn.functional.one_hot(label, CLASSES).to(torch.get_default_dtype())
        return torch.nn.functional.cross_entropy(logits, hot * (1 - smoothing) + (1 - hot) * off)
    return torch.nn.functional.cross_entropy(logits, target, weight=weights, label_smoothing=smoothing)


def training(recipe: dict[str, Any], start: dict[str, Any], batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Train a linear backbone and a linear head; return the losses and the weights at the end."""
    weights = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    groups = [
        {
            "params": [weight],
            "lr": recipe["lr"] * (1.0 if name.startswith("classifier") else recipe.get("backbone_lr_factor", 1.0)),
            "weight_decay": recipe["weight_decay"] if weight.ndim > 1 else 0.0,
        }
        for name, weight in weights.items()
    ]
    optimizer, losses = optimizer_of(recipe, groups), []
    for batch in batches:
        pooled = torch.tensor(batch["inputs"]) @ weights["backbone.weight"] + weights["backbone.bias"]
        loss = loss_of(recipe, pooled @ weights["classifier.weight"] + weights["classifier.bias"], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"recipe": recipe, "losses": losses, "weights": {n: w.detach().tolist() for n, w in weights.items()}}


def trainings(start: dict[str, Any], batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a run of each optimizer with a slower backbone, and of each loss."""
    common = {"lr": 0.01, "weight_decay": 0.1, "label_smoothing": 0.1, "optimizer": "sgd", "momentum": 0.9}
    rules: list[dict[str, Any]] = [
        {},
        {"optimizer": "nesterov"},
        {"optimizer": "adamw", "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3},
        {"optimizer": "rmsprop", "rms_decay": 0.8, "epsilon": 1e-3},
    ]
    slower = [{**common, **rule, "backbone_lr_factor": 0.1} for rule in rules]
    weighted = {**common, "class_weights": "balanced"}
    losses = [weighted, {**weighted, "mixup_alpha": 0.2}, {**common, "label_smoothing_over": "others"}]
    return [training(recipe, start, batches) for recipe in slower + losses]


def main() -> None:
    """Write the values beside this file."""
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)
    start = {
        "backbone.weight": rng.normal(size=(INPUTS, FEATURES)),
        "backbone.bias": rng.normal(size=FEATURES),
        "classifier.weight": rng.normal(size=(FEATURES, CLASSES)),
        "classifier.bias": rng.normal(size=CLASSES),
    }
    lists = {name: value.astype(np.float32).astype(np.float64).tolist() for name, value in start.items()}
    batches = [
        {
            "inputs": rng.normal(size=(BATCH, INPUTS)).astype(np.float32).astype(np.float64).tolist(),
            "label": rng.integers(0, CLASSES, BATCH).tolist(),
            "mix_label": rng.integers(0, CLASSES, BATCH).tolist(),
            "mix_weight": rng.random(BATCH).astype(np.float32).astype(np.float64).tolist(),
        }
        for _ in range(STEPS)
    ]
    document = {
        "made_with": {"torch": torch.__version__.split("+")[0], "timm": timm.__version__},
        "steps_per_epoch": STEPS_PER_EPOCH,
        "class_counts": COUNTS,
        "schedules": schedules(),
        "start": lists,
        "batches": batches,
        "trainings": trainings(lists, batches),
    }
    text = json.dumps(document) + "\n"
    Path(__file__).with_name("training.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
