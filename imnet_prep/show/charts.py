"""Turn numbers into charts with axes; ``templates/parts.html`` draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_NAMED = 12  # classes that get a bar each
_BINS = 30  # about as many
_TICKS = 5


class Bar(NamedTuple):
    """A bar of a chart: what it stands for, and its height."""

    name: str
    value: float


class Tick(NamedTuple):
    """A mark on an axis: its place from the low end (0) to the high one (1), and its text."""

    place: float
    text: str


@dataclass(frozen=True, slots=True)
class BarChart:
    """Bars from left to right over an axis, or, with names of their own, one below the other.

    Attributes:
        caption: What it shows.
        bars: The bars.
        x_ticks: Marks on the horizontal axis; none where each bar has a name.
        x_name: What is on the horizontal axis, with its unit.
        y_name: What is counted.
        sentence: What there is to say in place of bars.
    """

    caption: str
    bars: tuple[Bar, ...] = ()
    x_ticks: tuple[Tick, ...] = ()
    x_name: str = ""
    y_name: str = "images"
    sentence: str = ""

    @property
    def top(self) -> float:
        """The upper end of the vertical axis: a round number no bar exceeds."""
        highest = max(bar.value for bar in self.bars)
        step = max(1.0, _step(highest))
        return step * math.ceil(highest / step)

    @property
    def y_ticks(self) -> tuple[Tick, ...]:
        """Marks on the vertical axis."""
        return _ticks(0, self.top, least=1)


def _step(width: float, parts: int = _TICKS) -> float:
    """Return the step, 1, 2 or 5 times a power of ten, that divides a width into at most so many parts."""
    size = 10.0 ** math.floor(math.log10(width / parts)) if width > 0 else 1.0
    return next(factor * size for factor in (1, 2, 5, 10) if width <= parts * factor * size * (1 + 1e-9))


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ticks(low: float, high: float, least: float = 0.0) -> tuple[Tick, ...]:
    """Return the round numbers of an axis from low to high, at least ``least`` apart."""
    step, width = max(least, _step(high - low)), (high - low) or 1.0
    steps = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return tuple(Tick((step * k - low) / width, _text(round(step * k, 12))) for k in steps)


def histogram(
    caption: str,
    values: NDArray[np.integer[Any] | np.floating[Any]],
    x_name: str,
    *,
    log: bool = False,
    y_name: str = "images",
) -> BarChart:
    """Count values in bins of equal width with round edges, or, if ``log``, of equal ratio over a wide range."""
    if not len(values):
        return BarChart(caption, sentence=f"{caption}: nothing to count.")
    low, high = float(values.min()), float(values.max())
    if low == high:
        return BarChart(caption, sentence=f"{caption}: {_text(low)} {x_name} for all {len(values):,} {y_name}.")
    if log and low > 0 and high > 1.5 * low:
        edges, ticks = _log_axis(low, high)
    else:
        log, step = False, _step(high - low, _BINS)
        if not (values % 1).any():
            step = max(1.0, step)
        edges = step * np.arange(math.floor(low / step), math.floor(high / step) + 2)
        ticks = _ticks(float(edges[0]), float(edges[-1]))
    names = [_text(round(edge, 9)) for edge in edges.tolist()]
    counts = np.histogram(values, edges)[0].tolist()
    bars = (Bar(f"{names[k]} to {names[k + 1]}", count) for k, count in enumerate(counts))
    return BarChart(caption, tuple(bars), ticks, f"{x_name}, log scale" if log else x_name, y_name)


def _log_axis(low: float, high: float) -> tuple[NDArray[np.float64], tuple[Tick, ...]]:
    """Return bin edges of equal ratio around the values, and round numbers between them."""
    per_decade = next((n for n in (100, 50, 20, 10, 5) if n * math.log10(high / low) <= _BINS), 2)
    first = math.floor(per_decade * math.log10(low) + 1e-9)
    last = max(first, math.floor(per_decade * math.log10(high) + 1e-9)) + 1
    edges = 10.0 ** (np.arange(first, last + 1) / per_decade)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    found: list[float] = []
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        found = [f * 10.0**k for k in decades for f in factors if edges[0] <= f * 10.0**k <= edges[-1]]
        if len(found) >= 3:
            break
    return edges, tuple(Tick(math.log(x / edges[0]) / math.log(edges[-1] / edges[0]), _text(x)) for x in found[:9])


def class_balance(split: str, counts: Sequence[int], names: Sequence[str]) -> BarChart:
    """Show the images of each class that has some, the largest first; of many classes, how many have how many."""
    found = sorted(((count, name) for count, name in zip(counts, names, strict=True) if count), key=lambda one: -one[0])
    if not found:
        return BarChart(split, sentence=f"{split}: no labels.")
    largest, smallest = found[0][0], found[-1][0]
    if largest == smallest and len(found) > 1:
        each = f"{largest:,} image{'s' if largest > 1 else ''}"
        return BarChart(split, sentence=f"{split}: {len(found):,} classes, each of {each}.")
    if len(found) > MAX_NAMED:
        sizes = np.array([count for count, _ in found])
        return histogram(f"{split}: classes by their number of images", sizes, "images", y_name="classes")
    return BarChart(f"{split}: images per class", tuple(Bar(name, count) for count, name in found))


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve: its name, and (x, y) points; ``style``, 1 to 4, is its colour and dashes."""

    name: str
    style: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class CurveChart:
    """Curves over a common x.

    Attributes:
        caption: What it shows.
        curves: The curves.
        y_name: What y is, with its unit.
        low: Lower end of the vertical axis; None for a round number below the lowest point.
        high: Upper end; None for a round number above the highest point.
        x_name: What x is.
    """

    caption: str
    curves: tuple[Curve, ...]
    y_name: str
    low: float | None = None
    high: float | None = None
    x_name: str = "epoch"

    @property
    def ends(self) -> tuple[float, float, float, float]:
        """The ends of the axes: the least and the greatest x, the lower and the upper end of y."""
        xs, ys = zip(*(point for curve in self.curves for point in curve.points), strict=True)
        low, high = (min(ys) if self.low is None else self.low), (max(ys) if self.high is None else self.high)
        step = _step(high - low or abs(high) or 1.0)
        bottom = step * math.floor(low / step + 1e-9) if self.low is None else low
        top = step * math.ceil(high / step - 1e-9) if self.high is None else high
        return min(xs), max(xs), bottom, top if top > bottom else bottom + step

    @property
    def x_ticks(self) -> tuple[Tick, ...]:
        """Marks on the horizontal axis."""
        x0, x1, _, _ = self.ends
        return _ticks(x0, x1, least=1)

    @property
    def y_ticks(self) -> tuple[Tick, ...]:
        """Marks on the vertical axis."""
        _, _, y0, y1 = self.ends
        return _ticks(y0, y1)

    @property
    def description(self) -> str:
        """The first and last value of each curve, in words."""
        drawn = [curve for curve in self.curves if curve.points]
        return "; ".join(f"{curve.name} from {curve.points[0][1]:.4g} to {curve.points[-1][1]:.4g}" for curve in drawn)

    @property
    def rows(self) -> list[tuple[object, ...]]:
        """The values of the curves at each x."""
        columns = [dict(curve.points) for curve in self.curves]
        xs = sorted({x for column in columns for x in column})
        return [(f"{x:g}", *(column.get(x, "") for column in columns)) for x in xs]

    def places(self, curve: Curve) -> list[tuple[float, float]]:
        """Return a curve's points on a canvas of 1000 x 400, y downward."""
        x0, x1, y0, y1 = self.ends
        wide, tall = (x1 - x0) or 1.0, y1 - y0
        return [(1000 * (x - x0) / wide, 400 - 400 * (y - y0) / tall) for x, y in curve.points]
