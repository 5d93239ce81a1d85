"""Report on a training run, in one HTML file: curves, recipe, speed and, with records, classes and mistakes.

Curves and recipe are read from the folder of the run. To find mistakes, ``best.ckpt`` is scored on the records.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imnet_prep.errors import TrainError
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.show.charts import Curve, CurveChart
from imnet_prep.show.pages import check_target, render, write_page
from imnet_prep.show.pictures import Picture, picture_of
from imnet_prep.types import ProgressCallback
from mbv2.recipe import load_recipe, recipe_names
from mbv2.scoring.guesses import Guesses, best_guesses
from mbv2.scoring.score import TOP
from mbv2.show.curves import epoch_points
from mbv2.training.logs import LOG, EpochRow, read_metrics, read_skipped, verdict

CONFIG = "config.json"
MAX_POINTS = 400  # of a curve over steps
MAX_MISTAKES = 24
MAX_CONFUSED = 20  # pairs of classes
MAX_MATRIX = 25  # classes


@dataclass(frozen=True, slots=True)
class RunReportOptions:
    """How a run is reported.

    Attributes:
        records: The records to score its checkpoint on; None to leave that out.
        split: The split of the records.
        device_target: The device to score on.
        force: Replace a file that is not a report.
    """

    records: Path | None = None
    split: str = "val"
    device_target: str = "CPU"
    force: bool = False


def write_run_report(run: Path, out: Path, options: RunReportOptions, progress: ProgressCallback) -> dict[str, Any]:
    """Write the report of a run.

    Args:
        run: The folder of the run.
        out: The HTML file.
        options: How it is made.
        progress: Called with the number of images scored.

    Returns:
        What the command prints: ``report`` (the file), ``bytes``, ``epochs``, and with records ``top1`` and ``top5``.

    Raises:
        TrainError: The folder holds no run.
        RecordsError: The records cannot be read, or the file must not or cannot be written.
        CheckpointError: The checkpoint cannot be read, or is for other classes.
    """
    check_target(out, force=options.force)
    config, rows = _read_config(run), read_metrics(run)
    values: dict[str, Any] = {"scored": options.records is not None}
    result: dict[str, Any] = {"report": str(out), "epochs": rows[-1].epoch if rows else 0}
    if options.records is not None:
        guesses = best_guesses(run, options.records, options.split, options.device_target, progress)
        result |= {"top1": guesses.scores.top1, "top5": guesses.scores.top5}
        values |= {
            "scores": guesses.scores,
            "classes": _class_rows(guesses),
            "confused": _confused(guesses),
            "matrix": _matrix(guesses),
            "wrong": int((guesses.label != guesses.guess).sum()),
            "mistakes": _mistakes(RecordsFolder(options.records, guesses.manifest), options.split, guesses),
        }
    html = render(
        "run.html",
        "mbv2.show",
        name=run.resolve().name,
        config=config,
        differs=_differs(config["recipe"]),
        epochs=rows,
        last=rows[-1] if rows else None,
        best=max((row for row in rows if row.val_top1 is not None), key=lambda row: row.val_top1 or 0.0, default=None),
        skipped=read_skipped(run),
        charts=_charts(run, rows, config.get("classes") or 6),
        speed=CurveChart("Speed", (_curve(rows, "images per second", "images_per_s", 1),), "images per second", low=0),
        verdict=verdict(rows[-1].data_wait_frac) if rows else "",
        **values,
    )
    return {**result, "bytes": write_page(out, html)}


def _read_config(run: Path) -> dict[str, Any]:
    path = run / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["recipe"], dict):
            raise ValueError("recipe")
    except FileNotFoundError as error:
        raise TrainError(f"{run}: no {CONFIG} in it", expected="a folder made by `mbv2 train`") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{path} is not a run's configuration", got=str(error)) from error
    return config


def _differs(recipe: dict[str, Any]) -> list[tuple[str, object, object]] | None:
    """Return the fields in which a run differs from the packaged recipe of its name; None where there is none."""
    if recipe.get("name") not in recipe_names():
        return None
    packaged = asdict(load_recipe(recipe["name"]))
    return [(field, value, packaged[field]) for field, value in recipe.items() if packaged.get(field, value) != value]


# --- from the logs ---------------------------------------------------------------------------------------------------


def _curve(rows: list[EpochRow], name: str, column: str, style: int, factor: float = 1) -> Curve:
    return Curve(name, style, tuple((x, factor * y) for x, y in epoch_points(rows, column)))


def _charts(run: Path, rows: list[EpochRow], classes: int) -> list[CurveChart]:
    losses = _curve(rows, "training", "train_loss", 1), _curve(rows, "validation", "val_loss", 2)
    accuracies = [_curve(rows, "top-1", "val_top1", 3, 100)]
    if classes > TOP:
        accuracies.append(_curve(rows, "top-5", "val_top5", 4, 100))
    if any(row.live_top1 is not None for row in rows):
        accuracies.append(_curve(rows, "top-1 of the live weights", "live_top1", 2, 100))
    return [
        CurveChart("Loss", losses, "loss"),
        CurveChart("Accuracy", tuple(accuracies), "% of the images", low=0, high=100),
        CurveChart("Learning rate", (_curve(rows, "learning rate", "lr", 1),), "rate of a step", low=0),
        CurveChart("Loss of single steps", (Curve("loss", 1, _step_losses(run)),), "loss", x_name="step"),
    ]


def _step_losses(run: Path) -> tuple[tuple[float, float], ...]:
    points: list[tuple[float, float]] = []
    try:
        with (run / LOG).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    point = float(row["step"]), float(row["loss"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a crash
                if math.isfinite(point[1]):
                    points.append(point)
    except OSError:
        return ()
    return tuple(points[:: max(1, -(-len(points) // MAX_POINTS))])


# --- from the network ------------------------------------------------------------------------------------------------


def _class_rows(guesses: Guesses) -> list[tuple[str, int, str, str]]:
    """Return by class, the best first: its name, images, top-1, and what it is most often taken for."""
    confusion = guesses.scores.confusion
    images = confusion.sum(axis=1)
    there = np.flatnonzero(images)
    shares = confusion[there, there] / images[there]
    rows = []
    for place in np.lexsort((there, -shares)).tolist():
        label = int(there[place])
        others = confusion[label].copy()
        others[label] = 0
        taken = f"{guesses.titles[others.argmax()]} ({others.max()})" if others.any() else ""
        rows.append((guesses.titles[label], int(images[label]), f"{shares[place]:.1%}", taken))
    return rows


def _confused(guesses: Guesses) -> list[tuple[str, str, int]]:
    """Return the pairs of classes, true and guessed, that are confused most often, and how often."""
    wrong = guesses.scores.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSED]
    return [
        (guesses.titles[true], guesses.titles[guess], int(wrong[true, guess]))
        for true, guess in np.stack(np.unravel_index(order, wrong.shape), axis=1).tolist()
        if wrong[true, guess]
    ]


def _matrix(guesses: Guesses) -> list[tuple[int, str, int, list[int]]]:
    """Return the rows of the confusion matrix: label, name, images and guesses; nothing if there are many classes."""
    confusion = guesses.scores.confusion
    labels = np.flatnonzero(confusion.sum(axis=1) + confusion.sum(axis=0)).tolist()
    if len(labels) > MAX_MATRIX:
        return []
    return [
        (label, guesses.titles[label], int(confusion[label].sum()), confusion[label, labels].tolist())
        for label in labels
    ]


def _mistakes(folder: RecordsFolder, split: str, guesses: Guesses) -> list[Picture]:
    """Return the images whose wrong best guess has the greatest confidence."""
    wrong = np.flatnonzero(guesses.label != guesses.guess)
    first, pictures = folder.span(split).start, []
    for position in wrong[np.argsort(-guesses.confidence[wrong], kind="stable")][:MAX_MISTAKES].tolist():
        true, guess = (guesses.titles[labels[position]] for labels in (guesses.label, guesses.guess))
        row = folder.row(first + position)
        caption = f"is {true}; taken for {guess} at {guesses.confidence[position]:.0%}"
        pictures.append(picture_of(row, row.name, caption))
    return pictures
