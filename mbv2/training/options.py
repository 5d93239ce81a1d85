"""The options and the result of a run, and the run that a folder holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imnet_prep.errors import TrainError
from mbv2.data import SKIP
from mbv2.recipe import MODEL_FIELDS, Recipe, recipe_from_fields, stored_fields
from mbv2.scoring.score import TOP
from mbv2.training.logs import DATA_BOUND_FRAC, verdict
from mbv2.weights.checkpoint import read_checkpoint

LAST, BEST, CONFIG, CURVES, LOCK = "last.ckpt", "best.ckpt", "config.json", "curves.png", ".lock"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a recipe; none of it changes what is computed, but for ``seed``.

    Attributes:
        records: The records folder, or its URL.
        out: The run's folder.
        recipe: What to compute.
        seed: Of the initial weights, the order, the augmentation and dropout.
        device_target: ``CPU``, ``GPU`` or ``Ascend``.
        kernels: ``auto``, ``native`` or ``standard``, see :mod:`mbv2.network.model`.
        save_every: Steps between two writes of ``last.ckpt`` inside an epoch; 0 writes it at each epoch's end
            only.
        log_every: Steps between two rows of ``log.jsonl``.
        resume: Go on from ``last.ckpt``.
        pretrained: A checkpoint to start from; its head is kept where the class names are the records', else replaced.
        tensorboard: Write TensorBoard events to ``<out>/events`` as well.
        features: Where ``freeze`` ``backbone`` keeps its features; ``<out>/features`` if not given.
        workers: Decode threads of this process; as many as the operators use if not given.
        on_bad_record: ``fail``, ``skip`` or how many to skip, see :func:`mbv2.data.bad_record_options`.
        cache: For a URL: the folder in which this machine keeps shards. cache_bytes: Most bytes to keep there.
        command: The command line, without passwords of URLs, which ``config.json`` keeps for the reader.
    """

    records: Path | str
    out: Path
    recipe: Recipe
    seed: int = 0
    device_target: str = "CPU"
    kernels: str = "auto"
    save_every: int = 0
    log_every: int = 10
    resume: bool = False
    pretrained: Path | None = None
    features: Path | None = None
    tensorboard: bool = False
    workers: int | None = None
    on_bad_record: str = SKIP
    cache: Path | None = None
    cache_bytes: int | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise TrainError("seed", expected="0 or more", got=f"{self.seed}")
        for name, least in (("save_every", 0), ("log_every", 1)):
            if getattr(self, name) < least:
                raise TrainError(name, expected=f"{least} or more", got=f"{getattr(self, name)}")
        if self.recipe.freeze == "backbone" and self.pretrained is None and not self.resume:
            raise TrainError(
                "freeze=backbone trains the head of a pretrained network", remedy="give one with --pretrained"
            )


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run reached.

    Attributes:
        top1: Of the best checkpoint, or None where the records have no validation split.
        top5: Of the same checkpoint.
        epochs: Finished epochs.
        images_per_s: Training images a second over all ranks, compilation and evaluation left out.
        data_wait_frac: Share of that time spent waiting for data.
        checkpoint: ``best.ckpt``.
        already_done: The folder held this very run, finished.
        stopped_early: The recipe's patience came to an end.
        skipped: Names of the bad records that were skipped.
        classes: Classes of the records.
        cached: Features were trained on in place of images.
        small: The images are stored at a short side.
    """

    top1: float | None
    top5: float | None
    epochs: int
    images_per_s: float
    data_wait_frac: float
    checkpoint: Path
    already_done: bool = False
    stopped_early: bool = False
    skipped: tuple[str, ...] = ()
    classes: int = 0
    cached: bool = False
    small: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 train --json`` prints."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "epochs": self.epochs,
            "images_per_s": self.images_per_s,
            "data_wait_frac": self.data_wait_frac,
            "checkpoint": str(self.checkpoint),
            **({"skipped": list(self.skipped)} if self.skipped else {}),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        epochs = f"{self.epochs}, stopped early: no better top-1" if self.stopped_early else f"{self.epochs}"
        rows = [("already done", "nothing was trained")] if self.already_done else []
        if self.top1 is None or self.top5 is None:
            rows.append(("top-1", "not scored: the records have no val split"))
        else:
            rows.append(("top-1", f"{self.top1:.4f}"))
            rows += [("top-5", f"{self.top5:.4f}")] if self.classes > TOP else []
        rows.append(("epochs", epochs))
        if self.images_per_s:
            rows.append(("speed", f"{self.images_per_s:,.1f} {'features' if self.cached else 'images'}/s"))
            rows.append(("waiting for data", self._waiting()))
        rows += [("skipped records", _named(self.skipped))] if self.skipped else []
        return [*rows, ("checkpoint", str(self.checkpoint))]

    def _waiting(self) -> str:
        if self.data_wait_frac < DATA_BOUND_FRAC:
            return f"{self.data_wait_frac:.1%}"
        return f"{self.data_wait_frac:.1%}; {verdict(self.data_wait_frac, cached=self.cached, small=self.small)}"


def _named(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)}: {', '.join(names[:5])}{more}"


def stored_run(out: Path) -> tuple[Recipe, int] | None:
    """Return recipe and seed of the run that a folder holds, or None where it holds none.

    Raises:
        CheckpointError: ``last.ckpt`` is damaged.
        TrainError: It was saved by version 0.1.0, and ``config.json`` is missing or damaged.
    """
    if not (out / LAST).exists():
        return None
    meta, where = read_checkpoint(out / LAST).meta, out / LAST
    try:
        fields = meta.training.get("recipe")
        if fields is None:
            where = out / CONFIG
            model = {name: meta.model[name] for name in MODEL_FIELDS}
            fields = {**model, **json.loads(where.read_text(encoding="utf-8"))["recipe"]}
        return recipe_from_fields(stored_fields(fields), where=str(where)), int(meta.training["identity"]["seed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainError(f"{where} does not say what the run is", got=str(error)) from error
