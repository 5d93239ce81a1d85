"""Recipes: everything that decides what a training run computes, by name, from a file, with overrides.

A recipe is a YAML file of :class:`Recipe`'s fields. The packaged ones stand in ``mbv2/recipes/``; each states its
command, its source and the top-1 to expect, or that it is not measured yet.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from imnet_prep.errors import RecipeError

DEFAULT_RECIPE = "tiny"  # one machine, small images: what a first run needs; ImageNet users name theirs
OPTIMIZERS = ("sgd", "nesterov", "adamw", "rmsprop")
SCHEDULES = ("cosine", "step", "linear", "constant")
FREEZES = ("none", "bn", "backbone")
PADDINGS = ("symmetric", "same")
IMAGE_SIZES = (32, 288)  # lowest and highest side of the input, in pixels
MODEL_FIELDS = ("width", "padding", "bn_eps", "bn_momentum")  # those that fix the network's function
_CHOICES = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "freeze": FREEZES, "padding": PADDINGS}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a training run computes.

    Attributes:
        name: The recipe's name.
        command: The command that runs it.
        source: Where its numbers come from.
        expected_top1: What it reaches, or "not yet measured".
        epochs: Passes over the training images.
        batch_size: Images a step on one device.
        image_size: Side of the square input, in pixels, 32 to 288.
        width: MobileNetV2's width multiplier, 0.35 to 1.4.
        padding: ``symmetric`` (PyTorch's) or ``same`` (TensorFlow's). Pretrained weights bring their own, as they do
            width and the two fields below.
        bn_eps: What BatchNorm adds to the variance.
        bn_momentum: Share of BatchNorm's moving statistics that stays at each step.
        dropout: Share of pooled features dropped in training.
        optimizer: ``sgd``, ``nesterov``, ``adamw`` or ``rmsprop``.
        lr: Peak learning rate, for a global batch of ``lr_batch_size``.
        lr_batch_size: The global batch that ``lr`` is meant for; the rate used is ``lr * global batch / lr_batch_size``
            (Goyal et al. 2017). 0: use ``lr`` as it is.
        momentum: Of SGD and RMSProp; the first beta of AdamW.
        weight_decay: Added to the gradient (SGD, RMSProp) or decoupled (AdamW); never on BatchNorm or biases.
        rms_decay: Of RMSProp's mean square; the second beta of AdamW.
        epsilon: Of RMSProp and AdamW.
        schedule: What follows the warm-up: ``cosine``, ``linear``, ``step`` or ``constant``.
        warmup_frac: Share of the run's steps in which the rate rises linearly from zero.
        final_lr_frac: Where cosine and linear end, as a share of the peak.
        step_epochs: Epochs between two drops of the ``step`` schedule (0.5 drops twice an epoch).
        step_gamma: Factor of each drop.
        label_smoothing: Share of the target spread over all classes.
        ema_decay: Decay of the averaged weights that are then evaluated and kept as best; 0 keeps none.
        clip_norm: Largest global norm of the gradient; 0 does not clip.
        accumulate_steps: Steps whose gradients are averaged before one update of the weights. The global batch that
            ``lr`` is scaled to grows with it; steps at the run's end that fill no whole update change nothing.
        distill_from: A checkpoint of the same classes that teaches; empty for none.
        distill_weight: Share of the loss that is the distance from the teacher's guesses.
        distill_temperature: What both networks' logits are divided by for that distance.
        crop_min: Smallest area share of RandomResizedCrop.
        crop_max: Largest area share.
        flip: Chance of a horizontal flip.
        color_jitter: Strength of brightness, contrast and saturation jitter, 0 to 1; 0 is off.
        randaugment_ops: RandAugment operations an image; 0 is off.
        randaugment_magnitude: Their strength, 0 to 30.
        erasing_prob: Chance that a box is erased.
        mixup_alpha: MixUp's beta parameter; 0 is off.
        cutmix_alpha: CutMix's; with both, each batch draws one.
        eval_crop: Side of the evaluation's centre crop as a share of the resized short side.
        freeze: ``none``; ``bn``: all weights train, BatchNorm keeps its statistics; ``backbone``: only the head
            trains, on cached features.
        feature_views: With ``freeze`` ``backbone``: augmented views of each image that are cached beside the plain one.
        eval_every: Epochs between two evaluations; the last epoch is always scored.
    """

    name: str = "custom"
    command: str = ""
    source: str = ""
    expected_top1: str = "not yet measured"
    epochs: int = 20
    batch_size: int = 64
    image_size: int = 224
    width: float = 1.0
    padding: str = "symmetric"
    bn_eps: float = 1e-5
    bn_momentum: float = 0.9
    dropout: float = 0.2
    optimizer: str = "sgd"
    lr: float = 0.1
    lr_batch_size: int = 0
    momentum: float = 0.9
    weight_decay: float = 4e-5
    rms_decay: float = 0.9
    epsilon: float = 1e-8
    schedule: str = "cosine"
    warmup_frac: float = 0.1
    final_lr_frac: float = 0.0
    step_epochs: float = 1.0
    step_gamma: float = 0.98
    label_smoothing: float = 0.1
    ema_decay: float = 0.0
    clip_norm: float = 0.0
    accumulate_steps: int = 1
    distill_from: str = ""
    distill_weight: float = 0.5
    distill_temperature: float = 1.0  # guesses as they are; Hinton et al. used 1 to 20
    crop_min: float = 0.08
    crop_max: float = 1.0
    flip: float = 0.5
    color_jitter: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: float = 9.0
    erasing_prob: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    eval_crop: float = 0.875
    freeze: str = "none"
    feature_views: int = 0
    eval_every: int = 1

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(
                    f"recipe field {name}", expected=f"one of {', '.join(choices)}", got=getattr(self, name)
                )
        for name, (low, high, closed) in _RANGES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value and (value <= high if closed else value < high)):
                end = "]" if closed else ")"
                raise RecipeError(
                    f"recipe field {name} is out of range", expected=f"[{low:g}, {high:g}{end}", got=f"{value!r}"
                )
        if self.crop_min > self.crop_max:
            raise RecipeError(
                "recipe field crop_min", expected=f"at most crop_max ({self.crop_max})", got=f"{self.crop_min}"
            )
        if self.distill_from and self.freeze == "backbone":
            raise RecipeError(
                "distill_from needs images, and freeze=backbone trains on cached features", expected="freeze none or bn"
            )


_ANY = math.inf
# (lowest, highest, highest allowed itself)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "epochs": (1, 100_000, True),
    "batch_size": (1, 65_536, True),
    "image_size": (*IMAGE_SIZES, True),
    "width": (0.35, 1.4, True),
    "bn_eps": (1e-12, 1, True),
    "bn_momentum": (0, 1, False),
    "dropout": (0, 1, False),
    "lr": (0, _ANY, False),
    "lr_batch_size": (0, _ANY, False),
    "momentum": (0, 1, False),
    "weight_decay": (0, _ANY, False),
    "rms_decay": (0, 1, False),
    "epsilon": (0, _ANY, False),
    "warmup_frac": (0, 1, False),
    "final_lr_frac": (0, 1, True),
    "step_epochs": (1e-6, _ANY, False),
    "step_gamma": (0, 1, True),
    "label_smoothing": (0, 1, False),
    "ema_decay": (0, 1, False),
    "clip_norm": (0, _ANY, False),
    "accumulate_steps": (1, 65_536, True),
    "distill_weight": (0, 1, True),
    "distill_temperature": (0.1, 100, True),
    "crop_min": (1e-3, 1, True),
    "crop_max": (1e-3, 1, True),
    "flip": (0, 1, True),
    "color_jitter": (0, 1, True),
    "randaugment_ops": (0, 16, True),
    "randaugment_magnitude": (0, 30, True),
    "erasing_prob": (0, 1, True),
    "mixup_alpha": (0, _ANY, False),
    "cutmix_alpha": (0, _ANY, False),
    "eval_crop": (0.5, 1, True),
    "feature_views": (0, 1000, True),
    "eval_every": (1, 100_000, True),
}


def recipe_names() -> list[str]:
    """List the packaged recipes."""
    folder = resources.files("mbv2") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_file: str) -> Recipe:
    """Read a packaged recipe by name, or one's own by path (anything that ends in ``.yaml`` or ``.yml``).

    Raises:
        RecipeError: Unknown name (the choices are listed), unreadable file, unknown field or value.
    """
    if name_or_file.endswith((".yaml", ".yml")):
        return recipe_from_fields(read_yaml(Path(name_or_file)), where=name_or_file)
    if name_or_file not in recipe_names():
        choices = ", ".join(recipe_names())
        raise RecipeError(f"unknown recipe {name_or_file!r}", expected=f"one of {choices}, or a path ending in .yaml")
    text = (resources.files("mbv2") / "recipes" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    return recipe_from_fields(yaml.safe_load(text), where=f"recipe {name_or_file}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        RecipeError: The file is missing, is not YAML, or holds no mapping.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}", got=str(error)) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML", got=str(error)) from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} is not a recipe", expected="a mapping of fields", got=type(fields).__name__)
    return fields


def recipe_from_fields(fields: Mapping[str, Any], *, where: str) -> Recipe:
    """Check a mapping of fields and build the recipe.

    Raises:
        RecipeError: Unknown field (the nearest names are given) or a value of the wrong kind.
    """
    return override(Recipe(), fields, where=where)


def override(recipe: Recipe, changes: Mapping[str, Any], *, where: str = "--set") -> Recipe:
    """Return a copy of a recipe with some fields changed; values may be text as typed on a command line."""
    hints = typing.get_type_hints(Recipe)
    clean: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=3) or sorted(hints)
            raise RecipeError(f"{where}: unknown recipe field {key!r}", expected=f"one of {', '.join(near)}")
        clean[key] = _convert(value, hints[key], f"{where}: {key}")
    return dataclasses.replace(recipe, **clean)


def resolve_recipe(
    name_or_file: str | None,
    flags: Mapping[str, Any],
    assignments: Mapping[str, str],
    *,
    base: Recipe | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Recipe:
    """Put a run's recipe together: the named one, then flags, then assignments.

    Args:
        name_or_file: A recipe's name or file; :data:`DEFAULT_RECIPE` where neither it nor ``base`` is given.
        flags: Fields by name; None leaves a field alone.
        assignments: Fields as text; they win. A given ``lr``, here or as a flag, is used as it is, whatever the batch,
            unless ``lr_batch_size`` is given too.
        base: The recipe of a run that is resumed, used where none is named.
        defaults: Fields that replace the named recipe's, as the width of pretrained weights does.
    """
    recipe = base
    if recipe is None or name_or_file is not None:
        recipe = override(load_recipe(name_or_file or DEFAULT_RECIPE), defaults)
    given = {name: value for name, value in flags.items() if value is not None}
    if "lr" in {**given, **assignments} and base is None:
        given["lr_batch_size"] = 0
    return override(override(recipe, given, where="recipe"), assignments)


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """Split ``FIELD=VALUE`` texts.

    Raises:
        RecipeError: A text without ``=``.
    """
    fields: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise RecipeError("--set", expected="FIELD=VALUE", got=repr(text))
        fields[name.strip().replace("-", "_")] = value.strip()
    return fields


def _convert(value: Any, kind: Any, where: str) -> Any:
    try:
        if kind is int:
            number = float(value)
            if isinstance(value, bool) or number != int(number):
                raise ValueError
            return int(number)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
    except (ValueError, TypeError, OverflowError):
        raise RecipeError(where, expected=f"{kind.__name__}", got=repr(value)) from None
    if isinstance(value, dict | list):
        raise RecipeError(where, expected="one value", got=type(value).__name__)
    return str(value)
