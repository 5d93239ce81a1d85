"""What makes a run the run that it is, and whether a folder holds that run."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imnet_prep.errors import TrainError
from mbv2.data import RunData
from mbv2.recipe import MODEL_FIELDS, Recipe
from mbv2.training.run import BEST, CONFIG, LAST, RunOptions
from mbv2.weights.checkpoint import Checkpoint, read_checkpoint

DESCRIPTIVE = ("name", "command", "source", "expected_top1")  # fields of a recipe that change nothing


def run_identity(options: RunOptions, data: RunData, ranks: int, origin: str = "") -> dict[str, Any]:
    """Return what must be equal for two runs to compute the same.

    Args:
        options: Of the run.
        data: Of the run, on one rank.
        ranks: Number of processes that train together.
        origin: Digest of the weights that a resumed run once started from, used where they are not given again.
    """
    recipe = {name: value for name, value in asdict(options.recipe).items() if name not in DESCRIPTIVE}
    if options.pretrained is not None:
        origin = read_checkpoint(options.pretrained).digest()
    if options.recipe.distill_from:
        recipe["distill_from"] = read_checkpoint(Path(options.recipe.distill_from)).digest()
    return {
        "seed": options.seed,
        "records": data.digest,
        "pretrained": origin,
        "ranks": ranks,
        "steps_per_epoch": data.train.steps_per_epoch,
        **recipe,
    }


def find_last(options: RunOptions, data: RunData, ranks: int) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None where the run's folder holds none.

    Raises:
        TrainError: The folder holds another run, the same one unfinished without ``resume``, or lacks ``best.ckpt``.
        CheckpointError: ``last.ckpt`` is damaged.
    """
    path = options.out / LAST
    if not path.exists():
        return None
    last = read_checkpoint(path)
    saved = last.meta.training.get("identity", {})
    want = run_identity(options, data, ranks, saved.get("pretrained", "") if options.resume else "")
    have = {**_before_they_were_saved(last, options.out, want), **saved}
    differing = [name for name in want if have.get(name) != want[name]]
    if differing:
        name = differing[0]
        remedy = "choose another --out"
        if name in ("ranks", "steps_per_epoch"):
            remedy = f"start as many processes as before (msrun --worker_num), or {remedy}"
        raise TrainError(
            f"{options.out} holds another run: {', '.join(differing)} differ",
            expected=f"{name} {have.get(name)!r} to go on with it",
            got=f"{want[name]!r}",
            remedy=remedy,
        )
    if last.meta.epoch < options.recipe.epochs and not options.resume:
        raise TrainError(
            f"{options.out} holds this run, unfinished", remedy="go on with --resume, or choose another --out"
        )
    kept_best = data.val is None or last.meta.training["position"]["best_top1"] is not None
    if last.meta.epoch and kept_best and not (options.out / BEST).exists():
        remedy = f"put it back, or start again in another --out with --pretrained {path}"
        raise TrainError(f"{options.out} has lost its {BEST}", remedy=remedy)
    return last


def _before_they_were_saved(last: Checkpoint, out: Path, want: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that an earlier version did not save: those of the run's network, and else the defaults.

    Its steps an epoch follow from its position or stand in ``config.json``. Another number of ranks shows in them.
    """
    position = last.meta.training.get("position", {})
    steps = want["steps_per_epoch"]
    if position.get("epoch"):
        steps = (position["step"] - position["epoch_step"]) // position["epoch"]
    else:
        with suppress(OSError, ValueError, KeyError):
            steps = json.loads((out / CONFIG).read_text(encoding="utf-8"))["steps_per_epoch"]
    model = {name: last.meta.model[name] for name in MODEL_FIELDS}
    return {**asdict(Recipe()), **model, "ranks": want["ranks"], "steps_per_epoch": steps}
