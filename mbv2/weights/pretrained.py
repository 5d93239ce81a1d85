"""What pretrained weights decide, and how a run takes them over."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imnet_prep.errors import CheckpointError, TrainError
from mbv2.recipe import MODEL_FIELDS, Recipe
from mbv2.weights.checkpoint import Checkpoint, build_network, load_parameters, read_checkpoint

if TYPE_CHECKING:
    from mbv2.network.model import ModelConfig

HEAD_PREFIX = "classifier."
TEACHER_PREFIX = "teacher."  # two parameters of one name cannot be in a graph
_logger = logging.getLogger(__name__)


def pretrained_fields(checkpoint: Path | None) -> dict[str, Any]:
    """Return the fields of a recipe that pretrained weights decide.

    Raises:
        CheckpointError: The checkpoint is not one of ours.
    """
    if checkpoint is None:
        return {}
    config = read_checkpoint(checkpoint).meta.model_config()
    return {name: getattr(config, name) for name in MODEL_FIELDS}


def network_config(recipe: Recipe, classes: int, start: Checkpoint | None) -> ModelConfig:
    """Return the network's configuration: the recipe's, but what belongs to pretrained weights comes with them.

    Raises:
        TrainError: The recipe's width, padding or BatchNorm constants are not the weights'.
    """
    from mbv2.network.model import ModelConfig

    if start is None:
        return ModelConfig(classes, dropout=recipe.dropout, **{name: getattr(recipe, name) for name in MODEL_FIELDS})
    config = start.meta.model_config()
    for name in MODEL_FIELDS:
        have, want = getattr(config, name), getattr(recipe, name)
        if have != want:
            raise TrainError(
                f"the pretrained weights have another {name}",
                expected=f"{name} {have} as in {start.path}",
                got=f"{want}",
            )
    return replace(config, classes=classes, dropout=recipe.dropout)


def load_pretrained(net: Any, start: Checkpoint, classes: tuple[str, ...]) -> bool:
    """Load pretrained weights; the head too where the classes are the same, else the new one stays.

    Returns:
        Whether the head was kept.

    Raises:
        CheckpointError: A tensor is missing, left over or of another shape.
    """
    keep = start.meta.class_names == classes
    weights = start.weights()
    parameters = {parameter.name: parameter for parameter in net.get_parameters()}
    if not keep:
        weights = {name: value for name, value in weights.items() if not name.startswith(HEAD_PREFIX)}
        parameters = {name: value for name, value in parameters.items() if not name.startswith(HEAD_PREFIX)}
        _logger.info("new head: %d classes instead of %s", len(classes), start.meta.model["classes"])
    load_parameters(parameters.values(), weights, str(start.path))
    return keep


def load_teacher(path: Path, classes: tuple[str, ...], *, kernels: str) -> Any:
    """Make the network that teaches: in evaluation mode, with the averaged weights where there are any.

    Raises:
        CheckpointError: The checkpoint is not one of ours, or is for other classes.
    """
    checkpoint = read_checkpoint(path)
    names, count = checkpoint.meta.class_names, int(checkpoint.meta.model["classes"])
    if count != len(classes) or (names and names != classes):
        expected = f"the records' {len(classes)} classes, in their order"
        got = f"{count} classes" if count != len(classes) else "others"
        raise CheckpointError(f"distill_from {path} is for other classes", expected=expected, got=got)
    net = build_network(checkpoint, kernels=kernels)
    for parameter in net.get_parameters():
        parameter.name = f"{TEACHER_PREFIX}{parameter.name}"
        parameter.requires_grad = False
    return net
