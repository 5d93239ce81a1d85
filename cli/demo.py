"""The whole way on an image set drawn on the spot: URL list, download, shards, verification, training, scoring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imnet_prep.cli.drawings import CLASSES
from imnet_prep.cli.small_set import BROKEN, SEED, Stage, make_records, verify_records
from imnet_prep.errors import Interrupted
from imnet_prep.records.manifest import MANIFEST
from imnet_prep.records.publish import refuse_inside_records
from imnet_prep.types import Stop
from mbv2.recipe import resolve_recipe
from mbv2.scoring.evaluate import evaluate_checkpoint
from mbv2.training.options import RunOptions
from mbv2.training.run import train

PER_CLASS = {"train": 160, "val": 30}
RECIPE = "demo"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo made: ``to_json`` is its last line, ``rows`` the table above it."""

    top1: float
    images: int
    records: int
    rows: list[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Return the demo's last line."""
        return {"top1": self.top1, "images": self.images, "records": self.records}


def run_demo(out: Path, epochs: int | None, stage: Stage, stop: Stop = lambda: False) -> DemoResult:
    """Go the whole way. Records and a training run that are there already are gone on with.

    An interruption says how far the same command would begin.

    Args:
        out: The folder for everything.
        epochs: Training epochs; the recipe's where None.
        stage: Called with a stage's name for a context manager that gives its progress callback.
        stop: Asked whether to leave after what is in hand.

    Raises:
        ImnetError: Whatever a stage raises.
    """
    try:
        return _run(out, epochs, stage, stop)
    except Interrupted as interrupted:
        same = f"`imnet-prep demo --out {out}{'' if epochs is None else f' --epochs {epochs}'}`"
        made = (out / "records" / MANIFEST).exists()
        remedy = f"{same} continues from there" if made else f"{same} starts over: the records were not finished"
        raise Interrupted(interrupted.what, got=interrupted.got, remedy=remedy) from interrupted


def _run(out: Path, epochs: int | None, stage: Stage, stop: Stop) -> DemoResult:
    refuse_inside_records(out / "records")
    out.mkdir(parents=True, exist_ok=True)
    records, run = out / "records", out / "run"
    if not (records / MANIFEST).exists():
        make_records(out, PER_CLASS, stage, stop)
    checked = verify_records(records, stage)
    recipe = resolve_recipe(RECIPE, {"epochs": epochs}, {})
    resume = (run / "last.ckpt").exists()
    with stage("train") as progress:
        trained = train(RunOptions(records, run, recipe, SEED, resume=resume), stop=stop, progress=progress)
    with stage("eval") as progress:
        scores, _ = evaluate_checkpoint(records, trained.checkpoint, stop=stop, progress=progress)
    images = sum(PER_CLASS.values()) * len(CLASSES)
    rows = [
        ("images", f"{images} drawn in {len(CLASSES)} classes, served and downloaded to {out / 'download'}"),
        ("broken links", f"{len(BROKEN)} in each URL list, named in {out / 'download' / 'train' / 'failures.jsonl'}"),
        ("records", f"{records}: {checked.records} in {checked.shards} shards, verified at level {checked.level}"),
        (
            "run",
            f"{run}: {trained.epochs} epochs of MobileNetV2 {recipe.width:g} at {recipe.image_size} px, curves.png",
        ),
        ("checkpoint", str(trained.checkpoint)),
        ("top-1", f"{scores.top1:.3f} of {scores.images} validation images"),
    ]
    return DemoResult(scores.top1, images, checked.records, rows)
