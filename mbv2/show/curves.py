"""Pictures of a run, drawn with Pillow: ``curves.png`` (loss and accuracy by epoch) and a confusion matrix."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from imnet_prep.errors import TrainError
from imnet_prep.files import rename
from mbv2.scoring.score import TOP
from mbv2.training.logs import EpochRow

_SIZE = (1200, 520)
_MARGIN = (70, 50, 30, 50)  # left, top, right, bottom of a panel
_INK, _GRID, _PAPER = "#222222", "#dddddd", "#ffffff"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its legend, colour and (x, y) points."""

    name: str
    colour: str
    points: tuple[tuple[float, float], ...]


def draw_curves(path: Path, rows: list[EpochRow], title: str, classes: int) -> None:
    """Draw the losses on the left and the accuracies on the right.

    Args:
        path: The PNG to write; replaced as a whole.
        rows: One an epoch; none draws empty axes.
        title: Printed over both panels.
        classes: Of the run; top-5 is drawn where there are more than five.
    """
    losses = [
        Line("training loss", "#1f6fb4", epoch_points(rows, "train_loss")),
        Line("validation loss", "#d1495b", epoch_points(rows, "val_loss")),
    ]
    scores = [Line("top-1", "#2a8a4a", epoch_points(rows, "val_top1"))]
    if classes > TOP:
        scores.append(Line("top-5", "#b07c1c", epoch_points(rows, "val_top5")))
    draw_panels(path, [(losses, None), (scores, (0.0, 1.0))], title)


def draw_panels(path: Path, panels: list[tuple[list[Line], tuple[float, float] | None]], title: str) -> None:
    """Draw panels of curves side by side.

    Args:
        path: The PNG to write; replaced as a whole.
        panels: From left to right: the lines over epochs, and the ends of the vertical axis (None: those of the lines).
        title: Printed over them.
    """
    picture = Image.new("RGB", _SIZE, _PAPER)
    draw = ImageDraw.Draw(picture)
    font, large = ImageFont.load_default(14), ImageFont.load_default(18)
    draw.text((20, 12), title, fill=_INK, font=large)
    side = _SIZE[0] // len(panels)
    last = max((round(x) for lines, _ in panels for line in lines for x, _ in line.points), default=1)
    for number, (lines, limits) in enumerate(panels):
        _panel(draw, font, (number * side, 30, (number + 1) * side, _SIZE[1]), lines, last, limits)
    partial = path.with_name(path.name + ".partial")
    picture.save(partial, format="PNG")
    rename(partial, path)


def draw_confusion(path: Path, confusion: NDArray[np.int64], class_names: tuple[str, ...]) -> None:
    """Draw a confusion matrix: rows the true class, columns the guess, each row as shares of its images.

    Args:
        path: The PNG to write.
        confusion: int64 (classes, classes), as in :class:`mbv2.scoring.score.Scores`.
        class_names: In label order; written beside the rows where there is room.

    Raises:
        TrainError: The file cannot be written.
    """
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    cell = max(1, min(40, 1000 // len(shares)))
    named = cell >= 12
    left, top, side = (230 if named else 30), 40, cell * len(shares)
    ink = np.stack([255 * (1 - shares), 255 - 150 * shares, 255 - 75 * shares], axis=-1).astype(np.uint8)
    matrix = Image.fromarray(ink).resize((side, side), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (left + side + 30, top + side + 40), _PAPER)
    picture.paste(matrix, (left, top))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    draw.rectangle([left - 1, top - 1, left + side, top + side], outline=_INK)
    draw.text((left, 12), "rows: true class; columns: guess; darker: a larger share of the row", fill=_INK, font=font)
    for row, name in enumerate(class_names if named else ()):
        words = name if len(name) <= 30 else f"{name[:29]}…"
        draw.text((left - 6, top + (row + 0.5) * cell), words, fill=_INK, font=font, anchor="rm")
        if cell >= 30:
            share = f"{shares[row, row]:.2f}"
            middle = (left + (row + 0.5) * cell, top + (row + 0.5) * cell)
            draw.text(middle, share, fill=_PAPER if shares[row, row] > 0.5 else _INK, font=font, anchor="mm")
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise TrainError(f"cannot write {path}", got=error.strerror or str(error)) from error


def epoch_points(rows: list[EpochRow], name: str) -> tuple[tuple[float, float], ...]:
    """Return a column of a run's metrics as (epoch, value), without missing and infinite values."""
    pairs = ((row.epoch, getattr(row, name)) for row in rows)
    return tuple((float(x), float(y)) for x, y in pairs if y is not None and math.isfinite(y))


def _panel(
    draw: ImageDraw.ImageDraw,
    font: Font,
    box: tuple[int, int, int, int],
    lines: list[Line],
    last: int,
    limits: tuple[float, float] | None,
) -> None:
    left, top, right, bottom = (
        box[0] + _MARGIN[0],
        box[1] + _MARGIN[1],
        box[2] - _MARGIN[2],
        box[3] - _MARGIN[3],
    )
    values = [y for line in lines for _, y in line.points]
    low, high = limits or (min(values, default=0.0), max(values, default=1.0))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - 1) / max(1, last - 1)
        return left + across * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    for tick in range(6):
        value = low + (high - low) * tick / 5
        y = place(1, value)[1]
        draw.line([(left, y), (right, y)], fill=_GRID)
        draw.text((left - 8, y), f"{value:.2f}", fill=_INK, font=font, anchor="rm")
    for epoch in sorted({1 + round((last - 1) * tick / 5) for tick in range(6)}):
        draw.text((place(epoch, low)[0], bottom + 8), str(epoch), fill=_INK, font=font, anchor="mt")
    draw.text(((left + right) / 2, bottom + 28), "epoch", fill=_INK, font=font, anchor="mt")
    draw.rectangle([left, top, right, bottom], outline=_INK)
    for number, line in enumerate(lines):
        x = left + 10 + number * 170
        draw.line([(x, top - 16), (x + 24, top - 16)], fill=line.colour, width=3)
        end = f" {line.points[-1][1]:.3f}" if line.points else " -"
        draw.text((x + 30, top - 16), line.name + end, fill=_INK, font=font, anchor="lm")
        spots = [place(*point) for point in line.points]
        if len(spots) > 1:
            draw.line(spots, fill=line.colour, width=3, joint="curve")
        for spot in spots:
            draw.circle(spot, 3, fill=line.colour)
