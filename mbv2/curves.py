"""``curves.png``: loss and accuracy by epoch, drawn with Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mbv2.runlog import EpochRow

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


def draw_curves(path: Path, rows: list[EpochRow], title: str) -> None:
    """Draw the losses on the left and the accuracies on the right.

    Args:
        path: The PNG to write; replaced as a whole.
        rows: One an epoch; none draws empty axes.
        title: Printed over both panels.
    """
    losses = [
        Line("training loss", "#1f6fb4", _points(rows, "train_loss")),
        Line("validation loss", "#d1495b", _points(rows, "val_loss")),
    ]
    scores = [
        Line("top-1", "#2a8a4a", _points(rows, "val_top1")),
        Line("top-5", "#b07c1c", _points(rows, "val_top5")),
    ]
    picture = Image.new("RGB", _SIZE, _PAPER)
    draw = ImageDraw.Draw(picture)
    font, large = ImageFont.load_default(14), ImageFont.load_default(18)
    draw.text((20, 12), title, fill=_INK, font=large)
    half = _SIZE[0] // 2
    last = max((row.epoch for row in rows), default=1)
    _panel(draw, font, (0, 30, half, _SIZE[1]), losses, last, None)
    _panel(draw, font, (half, 30, _SIZE[0], _SIZE[1]), scores, last, (0.0, 1.0))
    partial = path.with_name(path.name + ".partial")
    picture.save(partial, format="PNG")
    partial.replace(path)


def _points(rows: list[EpochRow], name: str) -> tuple[tuple[float, float], ...]:
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
