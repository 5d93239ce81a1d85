"""A training run in one HTML file: curves, confusion, best and worst classes, mistakes, recipe, pace.

The curves and the recipe are read from the run's folder. What the network does on each image is computed anew from
``best.ckpt``, where the records are given.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError, TrainError
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import Manifest
from imnet_prep.show.gather import decode
from imnet_prep.show.html import (
    Curve,
    Html,
    check_target,
    curves,
    details,
    facts,
    join,
    page,
    picture,
    table,
    tag,
    thumbnail,
    tiles,
    write_page,
)
from imnet_prep.types import ProgressCallback
from mbv2.judge import Judged, judge
from mbv2.runlog import LOG, EpochRow, read_metrics, verdict

CONFIG = "config.json"
MAX_POINTS = 400  # of a curve over steps
MAX_MISTAKES = 24
MAX_HEAT_CLASSES = 25
LISTED_CLASSES = 10


@dataclass(frozen=True, slots=True)
class RunReportOptions:
    """How a run is reported.

    Attributes:
        records: The records to score its checkpoint on, or None to leave that out.
        split: Which of them.
        device_target: Where to score.
        force: Replace a file that no report wrote.
    """

    records: Path | None = None
    split: str = "val"
    device_target: str = "CPU"
    force: bool = False


def write_run_report(run: Path, out: Path, options: RunReportOptions, progress: ProgressCallback) -> dict[str, Any]:
    """Write the report of a run.

    Args:
        run: The run's folder.
        out: The HTML file.
        options: How.
        progress: Told of images scored.

    Returns:
        What the command prints: ``report`` (the file), ``bytes``, ``epochs``, and with records ``top1`` and ``top5``.

    Raises:
        TrainError: The folder holds no run.
        RecordsError: The records cannot be read, or the file must not or cannot be written.
        CheckpointError: The checkpoint cannot be read, or is for other classes.
    """
    check_target(out, force=options.force)
    config = _read_config(run)
    rows = read_metrics(run)
    sections = [("numbers", "In numbers", _numbers(rows)), ("curves", "Curves", _curves(run, rows))]
    result: dict[str, Any] = {"report": str(out), "epochs": rows[-1].epoch if rows else 0}
    if options.records is not None:
        judged = judge(run, options.records, options.split, options.device_target, progress)
        result |= {"top1": judged.scores.top1, "top5": judged.scores.top5}
        sections += [
            ("classes", "Best and worst classes", _classes(judged)),
            ("confusion", "Confusion", _confusion(judged)),
            ("mistakes", "Most confident mistakes", _mistakes(options.records, options.split, judged)),
        ]
    sections += [("pace", "Pace", _pace(rows)), ("recipe", "Recipe and versions", _recipe(config))]
    lead = tag("p", f"{config['recipe'].get('name', 'a recipe')}, seed {config.get('seed')}")
    if options.records is None:
        lead = join([lead, tag("p", "Without --records: no confusion, classes or mistakes.", class_="faint")])
    name = run.resolve().name
    text = page(f"Run: {name}", sections, lead, footer=f"Made by mbv2 report from {name}; no data leaves this file.")
    return {**result, "bytes": write_page(out, text)}


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


# --- from the logs ---------------------------------------------------------------------------------------------------


def _numbers(rows: list[EpochRow]) -> Html:
    scored = [row for row in rows if row.val_top1 is not None]
    best = max(scored, key=lambda row: row.val_top1 or 0.0, default=None)
    shown: list[tuple[str, object]] = [
        ("epochs", rows[-1].epoch if rows else 0),
        ("steps", f"{rows[-1].step:,}" if rows else 0),
    ]
    if best is not None:
        shown = [
            (f"best top-1, epoch {best.epoch}", f"{best.val_top1:.1%}"),
            ("its top-5", f"{best.val_top5 or 0:.1%}"),
            *shown,
        ]
    if rows:
        shown += [("training loss", f"{rows[-1].train_loss:.4g}"), ("images a second", f"{rows[-1].images_per_s:.4g}"),
                  ("waiting for data", f"{rows[-1].data_wait_frac:.1%}")]  # fmt: skip
    return tiles(shown)


def _curve(rows: list[EpochRow], name: str, field: str, style: int) -> Curve:
    points = [(float(row.epoch), getattr(row, field)) for row in rows]
    return Curve(name, style, tuple((x, float(y)) for x, y in points if y is not None and math.isfinite(y)))


def _curves(run: Path, rows: list[EpochRow]) -> Html:
    charts = [
        curves("Loss", [_curve(rows, "training", "train_loss", 1), _curve(rows, "validation", "val_loss", 2)]),
        curves("Accuracy", [_curve(rows, "top-1", "val_top1", 3), _curve(rows, "top-5", "val_top5", 4)], low=0, high=1),
        curves("Learning rate", [_curve(rows, "learning rate", "lr", 1)], low=0),
        curves("Loss of single steps", [Curve("loss", 1, _step_losses(run))], x_name="step"),
    ]
    return tag("div", *charts, class_="charts")


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
    step = -(-len(points) // MAX_POINTS)
    return tuple(points[::step]) if points else ()


def _pace(rows: list[EpochRow]) -> Html:
    if not rows:
        return tag("p", "No epoch is finished.")
    shown = [
        (row.epoch, row.step, round(row.images_per_s, 1), f"{row.data_wait_frac:.1%}", f"{row.lr:.3g}") for row in rows
    ]
    said = tag("p", f"The last epoch is {verdict(rows[-1].data_wait_frac)}.")
    chart = curves("Images a second", [_curve(rows, "images a second", "images_per_s", 1)], low=0)
    head = ("epoch", "step", "images a second", "waiting for data", "learning rate")
    return join([said, tag("div", chart, class_="charts"), details("Epoch by epoch", table("Epochs", head, shown))])


def _recipe(config: dict[str, Any]) -> Html:
    rest = {key: value for key, value in config.items() if key not in ("recipe", "versions", "model")}
    parts: list[object] = [
        table("Resolved recipe", ("field", "value"), [(key, _value(v)) for key, v in sorted(config["recipe"].items())]),
        facts([(key.replace("_", " "), _value(value)) for key, value in sorted(rest.items())]),
    ]
    for title, key in (("Model", "model"), ("Versions", "versions")):
        if isinstance(config.get(key), dict):
            parts.append(details(title, facts([(name, _value(value)) for name, value in sorted(config[key].items())])))
    return join(parts)


def _value(value: object) -> object:
    text = value if isinstance(value, str) else json.dumps(value)
    return tag("code", text) if len(text) == 64 else text


# --- from the network ------------------------------------------------------------------------------------------------


def _name(manifest: Manifest, label: int) -> str:
    words = manifest.class_words[label].split(",")[0]
    return f"{manifest.classes[label]} {words}".strip()


def _classes(judged: Judged) -> Html:
    confusion, manifest = judged.scores.confusion, judged.manifest
    images = confusion.sum(axis=1)
    there = np.flatnonzero(images)
    correct = confusion[there, there] / images[there]
    order = there[np.lexsort((there, -correct))].tolist()
    rows = []
    for label in order:
        others = confusion[label].copy()
        others[label] = 0
        taken = f"{_name(manifest, int(others.argmax()))} ({int(others.max())})" if others.any() else ""
        share = confusion[label, label] / images[label]
        rows.append((_name(manifest, label), int(images[label]), f"{share:.1%}", taken))
    head = ("class", "images", "top-1", "most often taken for")
    said = f"On {judged.scores.images:,} images: top-1 {judged.scores.top1:.2%}, top-5 {judged.scores.top5:.2%}."
    if len(rows) <= 2 * LISTED_CLASSES:
        return join([tag("p", said), table("Classes, the best first", head, rows)])
    return join(
        [
            tag("p", said),
            table(f"The {LISTED_CLASSES} best classes", head, rows[:LISTED_CLASSES]),
            table(f"The {LISTED_CLASSES} worst classes", head, rows[: -LISTED_CLASSES - 1 : -1]),
            details("All classes", table("All classes, the best first", head, rows)),
        ]
    )


def _confusion(judged: Judged) -> Html:
    confusion, manifest = judged.scores.confusion, judged.manifest
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:20]
    pairs = [
        (_name(manifest, int(true)), _name(manifest, int(guess)), int(off[true, guess]))
        for true, guess in zip(*np.unravel_index(order, off.shape), strict=True)
        if off[true, guess]
    ]
    most = table("Most frequent confusions", ("is", "taken for", "images"), pairs) if pairs else tag("p", "No mistake.")
    labels = np.flatnonzero(confusion.sum(axis=1) + confusion.sum(axis=0))
    if len(labels) > MAX_HEAT_CLASSES:
        return most
    return join([most, _heat(confusion, labels.tolist(), manifest)])


def _heat(confusion: NDArray[np.int64], labels: list[int], manifest: Manifest) -> Html:
    """The whole matrix, each cell tinted by its share of the row."""
    head = join(
        [tag("td", ""), *(tag("th", str(label), scope="col", title=_name(manifest, label)) for label in labels)]
    )
    rows = []
    for true in labels:
        total = max(1, int(confusion[true].sum()))
        shares = {guess: 45 * confusion[true, guess] / total for guess in labels}
        cells = [
            tag(
                "td",
                int(confusion[true, guess]) or "·",
                style=f"background: color-mix(in srgb, var(--bar) {share:.0f}%, transparent)",
            )
            for guess, share in shares.items()
        ]
        rows.append(tag("tr", tag("th", f"{true} {_name(manifest, true)}", scope="row"), *cells))
    caption = "Rows: the true class. Columns: the best guess, by label."
    made = tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", *rows), class_="heat")
    return tag("div", made, class_="scroll", tabindex="0", role="region", aria_label="Confusion matrix")


def _mistakes(records: Path, split: str, judged: Judged) -> Html:
    manifest = judged.manifest
    wrong = np.flatnonzero(judged.label != judged.guess)
    chosen = wrong[np.argsort(-judged.confidence[wrong], kind="stable")][:MAX_MISTAKES].tolist()
    if not chosen:
        return tag("p", "No image is taken for another class.")
    folder, items = RecordsFolder(records, manifest), []
    first = folder.span(split).start
    for position in chosen:
        true, guess = _name(manifest, int(judged.label[position])), _name(manifest, int(judged.guess[position]))
        caption = f"is {true}; taken for {guess} at {judged.confidence[position]:.0%}"
        row = folder.row(first + position)
        try:
            pixels = decode(row.image)
        except RecordsError:
            pixels = None
        shown = picture(thumbnail(pixels, 96), row.name, caption) if pixels is not None else tag("p", row.name, caption)
        items.append(tag("li", shown))
    said = (
        f"{len(wrong):,} of {len(judged.label):,} images are taken for another class; these with the most confidence."
    )
    return join([tag("p", said), tag("ul", *items, class_="thumbs")])
