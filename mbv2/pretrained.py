"""What pretrained weights decide, and how a run takes them over."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imnet_prep.errors import TrainError
from mbv2.checkpoint import Checkpoint, load_parameters, read_checkpoint
from mbv2.recipe import Recipe

if TYPE_CHECKING:
    from mbv2.model import ModelConfig

HEAD_PREFIX = "classifier."
_logger = logging.getLogger(__name__)


def pretrained_fields(checkpoint: Path | None) -> dict[str, Any]:
    """Give the fields of a recipe that pretrained weights decide.

    Raises:
        CheckpointError: The checkpoint is not one of ours.
    """
    return {} if checkpoint is None else {"width": read_checkpoint(checkpoint).meta.model_config().width}


def network_config(recipe: Recipe, classes: int, start: Checkpoint | None) -> ModelConfig:
    """Give the network's configuration: the recipe's, but what belongs to pretrained weights comes with them.

    Raises:
        TrainError: The recipe's width is not the weights'.
    """
    from mbv2.model import ModelConfig

    if start is None:
        return ModelConfig(classes=classes, width=recipe.width, dropout=recipe.dropout)
    config = start.meta.model_config()
    if config.width != recipe.width:
        expected, got = f"width {config.width:g} as in {start.path}", f"{recipe.width:g}"
        raise TrainError("the pretrained weights have another width", expected=expected, got=got)
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
