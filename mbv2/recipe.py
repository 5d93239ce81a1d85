"""Recipes: everything that decides what a training run computes, by name, from a file, with overrides.

A recipe is a YAML file of :class:`Recipe`'s fields. The packaged ones stand in ``mbv2/recipes/``; each states its
command, its source and the top-1 to expect, or that it is not measured yet.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from imnet_prep.errors import RecipeError

DEFAULT_RECIPE = "tiny"  # one machine, small images: what a first run needs; ImageNet users name theirs
PADDINGS, PRECISIONS = ("symmetric", "same"), ("float32", "bfloat16")
IMAGE_SIZES = (32, 288)  # lowest and highest side of the input, in pixels
MODEL_FIELDS = ("width", "padding", "bn_eps", "bn_momentum")  # those that fix the network's function


def _within(default: float, low: float, high: float = math.inf) -> Any:
    """Declare a finite number between two bounds, both allowed."""
    return field(default=default, metadata={"low": low, "high": high, "end": "]" if high < math.inf else ")"})


def _below(default: float, high: float) -> Any:
    """Declare a number from 0 to below a bound."""
    return field(default=default, metadata={"low": 0, "high": high, "end": ")"})


def _one_of(*choices: str) -> Any:
    """Declare a name out of several, the default first."""
    return field(default=choices[0], metadata={"choices": choices})


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
        padding: ``symmetric`` (PyTorch's) or ``same`` (TensorFlow's). Weights bring theirs, the next two and width.
        bn_eps: What BatchNorm adds to the variance.
        bn_momentum: Share of BatchNorm's moving statistics that stays at each step.
        precision: How a step keeps activations: ``float32``, or ``bfloat16`` (C++ operators alone). Weights: float32.
        dropout: Share of pooled features dropped in training.
        optimizer: ``sgd``, ``nesterov``, ``adamw`` or ``rmsprop``.
        lr: Peak learning rate, for a global batch of ``lr_batch_size``.
        lr_batch_size: The global batch that ``lr`` is for: the rate in use is ``lr * global batch / lr_batch_size``; 0:
            ``lr`` as it is. Source: Goyal et al. 2017.
        backbone_lr_factor: Rate of everything before the classifier, as a factor of the classifier's.
        momentum: Of SGD and RMSProp.
        beta1: Of AdamW: decay of the mean of gradients.
        beta2: Of AdamW: decay of the mean of squared gradients.
        weight_decay: Added to the gradient (SGD, RMSProp) or decoupled (AdamW); never on BatchNorm or biases.
        rms_decay: Of RMSProp's mean square.
        epsilon: Of RMSProp and AdamW.
        schedule: What follows the warm-up: ``cosine``, ``linear``, ``step`` or ``constant``.
        warmup_frac: Share of the run's steps in which the rate rises linearly from zero.
        warmup_epochs: The same in epochs, which may be a fraction; 0: ``warmup_frac`` counts.
        final_lr_frac: Where cosine and linear end, as a share of the peak.
        step_epochs: Epochs between two drops of the ``step`` schedule (0.5 drops twice an epoch).
        step_gamma: Factor of each drop.
        class_weights: ``none``; ``balanced``: each image of class k of K weighs ``n / (K * n_k)`` in the loss.
        label_smoothing: Share of the target that is spread over classes.
        label_smoothing_over: Which classes: ``all`` K, the true one too; ``others``: the K - 1 wrong ones.
        ema_decay: Decay of the averaged weights that are then evaluated and kept as best; 0 keeps none.
        score_live: Score the live weights beside the averaged ones.
        clip_norm: Largest global norm of the gradient; 0 does not clip.
        accumulate_steps: Steps whose gradients make one update. The global batch that ``lr`` is scaled to grows with
            it; steps at the run's end that fill no whole update change nothing.
        distill_from: A checkpoint of the same classes that teaches; empty for none.
        distill_weight: Share of the loss that is the distance from the teacher's guesses.
        distill_temperature: What both networks' logits are divided by for that distance.
        sampling: ``plain``: each image once an epoch; ``blocks``: so, shard by shard; ``balanced``: each class equally.
        crop_min: Smallest area share of RandomResizedCrop.
        crop_max: Largest area share.
        flip: Chance of a horizontal flip.
        color_jitter: Strength of brightness, contrast and saturation jitter, 0 to 1; 0 is off.
        randaugment_ops: RandAugment operations an image; 0 is off.
        randaugment_magnitude: Their strength, 0 to 30.
        trivialaugment: One operation an image, of any strength, in place of RandAugment.
        erasing_prob: Chance that a box is erased.
        mixup_alpha: MixUp's beta parameter; 0 is off.
        cutmix_alpha: CutMix's; with both, each batch draws one.
        mixup_prob: Chance that a batch is mixed, by either.
        mixup_last_epoch: Last epoch whose batches are mixed, by either; 0 mixes all.
        eval_size: Side of evaluation's input, in pixels, 32 to 288; 0: ``image_size``.
        eval_crop: Side of the evaluation's centre crop as a share of the resized short side.
        freeze: ``none``; ``bn``: BatchNorm keeps its statistics; ``backbone``: the head trains, on cached features.
        feature_views: Augmented views of each image that ``freeze`` ``backbone`` caches beside the plain one.
        eval_every: Epochs between two evaluations; the last epoch is always scored.
        patience: Evaluations without a better top-1 after which the run ends; 0 is off.
        keep_every: Epochs between two checkpoints that are kept for good; 0 keeps the last and the best alone.
    """

    name: str = "custom"
    command: str = ""
    source: str = ""
    expected_top1: str = "not yet measured"
    epochs: int = _within(20, 1, 100_000)
    batch_size: int = _within(64, 1, 65_536)
    image_size: int = _within(224, *IMAGE_SIZES)
    width: float = _within(1.0, 0.35, 1.4)
    padding: str = _one_of(*PADDINGS)
    bn_eps: float = _within(1e-5, 1e-12, 1)
    bn_momentum: float = _below(0.9, 1)
    precision: str = _one_of(*PRECISIONS)
    dropout: float = _below(0.2, 1)
    optimizer: str = _one_of("sgd", "nesterov", "adamw", "rmsprop")
    lr: float = _within(0.1, 0)
    lr_batch_size: int = _within(0, 0)
    backbone_lr_factor: float = _within(1.0, 1e-6)
    momentum: float = _below(0.9, 1)
    beta1: float = _below(0.9, 1)  # Kingma & Ba 2015, as the next
    beta2: float = _below(0.999, 1)
    weight_decay: float = _within(4e-5, 0)
    rms_decay: float = _below(0.9, 1)
    epsilon: float = _within(1e-8, 0)
    schedule: str = _one_of("cosine", "step", "linear", "constant")
    warmup_frac: float = _below(0.1, 1)
    warmup_epochs: float = _within(0.0, 0)
    final_lr_frac: float = _within(0.0, 0, 1)
    step_epochs: float = _within(1.0, 1e-6)
    step_gamma: float = _within(0.98, 0, 1)
    class_weights: str = _one_of("none", "balanced")
    label_smoothing: float = _below(0.1, 1)
    label_smoothing_over: str = _one_of("all", "others")
    ema_decay: float = _below(0.0, 1)
    score_live: bool = False
    clip_norm: float = _within(0.0, 0)
    accumulate_steps: int = _within(1, 1, 65_536)
    distill_from: str = ""
    distill_weight: float = _within(0.5, 0, 1)
    distill_temperature: float = _within(1.0, 0.1, 100)  # guesses as they are; Hinton et al. used 1 to 20
    sampling: str = _one_of("plain", "blocks", "balanced")
    crop_min: float = _within(0.08, 1e-3, 1)
    crop_max: float = _within(1.0, 1e-3, 1)
    flip: float = _within(0.5, 0, 1)
    color_jitter: float = _within(0.0, 0, 1)
    randaugment_ops: int = _within(0, 0, 16)
    randaugment_magnitude: float = _within(9.0, 0, 30)
    trivialaugment: bool = False
    erasing_prob: float = _within(0.0, 0, 1)
    mixup_alpha: float = _within(0.0, 0)
    cutmix_alpha: float = _within(0.0, 0)
    mixup_prob: float = _within(1.0, 0, 1)
    mixup_last_epoch: int = _within(0, 0, 100_000)
    eval_size: int = _within(0, 0, IMAGE_SIZES[1])
    eval_crop: float = _within(0.875, 0.5, 1)
    freeze: str = _one_of("none", "bn", "backbone")
    feature_views: int = _within(0, 0, 1000)
    eval_every: int = _within(1, 1, 100_000)
    patience: int = _within(0, 0, 100_000)
    keep_every: int = _within(0, 0, 100_000)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value, limits = getattr(self, one.name), one.metadata
            if "choices" in limits and value not in limits["choices"]:
                raise RecipeError(f"recipe field {one.name}", expected=" or ".join(limits["choices"]), got=repr(value))
            if "low" in limits and not _inside(value, **limits):
                expected = f"[{limits['low']:g}, {limits['high']:g}{limits['end']}"
                raise RecipeError(f"recipe field {one.name} is out of range", expected=expected, got=f"{value!r}")
        for name, expected in self._contradictions():
            raise RecipeError(f"recipe field {name}", expected=expected, got=f"{getattr(self, name)!r}")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield each field that does not fit the others or would change nothing, and what is expected of it."""
        if self.crop_min > self.crop_max:
            yield "crop_min", f"at most crop_max ({self.crop_max})"
        if 0 < self.eval_size < IMAGE_SIZES[0]:
            yield "eval_size", f"0, or at least {IMAGE_SIZES[0]}"
        if self.warmup_epochs >= self.epochs:
            yield "warmup_epochs", f"less than epochs ({self.epochs})"
        if self.distill_from and self.freeze == "backbone":
            yield "distill_from", "none with freeze=backbone: it needs images, and the head trains on cached features"
        adamw, images = self.optimizer == "adamw", self.freeze != "backbone"
        mixes, augments = images and self.mixup_alpha + self.cutmix_alpha > 0, images or self.feature_views > 0
        for names, effective, needed in (
            (("momentum", "rms_decay"), not adamw, "another optimizer: adamw takes beta1 and beta2"),
            (("beta1", "beta2"), adamw, "optimizer=adamw: others take momentum and rms_decay"),
            (("score_live",), self.ema_decay > 0, "ema_decay over 0: else only the live weights are scored"),
            (("backbone_lr_factor", "precision"), images, "a freeze that trains the backbone"),
            (("mixup_prob", "mixup_last_epoch"), mixes, "mixup_alpha or cutmix_alpha over 0, and images to train on"),
            (("trivialaugment",), augments and not self.randaugment_ops, "randaugment_ops=0, and images to augment"),
        ):
            for name in names:
                if not effective and getattr(self, name) != _DEFAULTS[name]:
                    yield name, f"{_DEFAULTS[name]!r}, or {needed}"


_DEFAULTS: Mapping[str, Any] = {one.name: one.default for one in dataclasses.fields(Recipe)}


def _inside(value: float, low: float, high: float, end: str) -> bool:
    return math.isfinite(value) and low <= value and (value <= high if end == "]" else value < high)


def stored_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return all fields of a recipe that a run stored: those that it lacks, as older versions meant them.

    A field added since changes nothing at its default; but AdamW took its betas from the fields of other optimizers.
    """
    known = {**_DEFAULTS, **fields}
    if known["optimizer"] == "adamw" and "beta1" not in fields:
        known |= {"beta1": known["momentum"], "beta2": known["rms_decay"]}
        known |= {name: _DEFAULTS[name] for name in ("momentum", "rms_decay")}
    return known


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
    return dataclasses.replace(recipe, **_converted(changes, where))


def _converted(changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the names of fields, and turn their values into the fields' types."""
    hints = typing.get_type_hints(Recipe)
    clean: dict[str, Any] = {}
    for key, value in changes.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=3) or sorted(hints)
            raise RecipeError(f"{where}: unknown recipe field {key!r}", expected=f"one of {', '.join(near)}")
        clean[key] = _convert(value, hints[key], f"{where}: {key}")
    return clean


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
    changes = _converted(given, "recipe") | _converted(assignments, "--set")
    return dataclasses.replace(recipe, **changes)  # at once: fields are checked against each other


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
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
    except (KeyError, ValueError, TypeError, OverflowError):
        raise RecipeError(where, expected="true or false" if kind is bool else kind.__name__, got=repr(value)) from None
    if isinstance(value, dict | list):
        raise RecipeError(where, expected="one value", got=type(value).__name__)
    return "" if value is None else str(value)  # a YAML key without a value
