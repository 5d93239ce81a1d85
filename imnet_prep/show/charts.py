"""Turn numbers into charts; ``templates/parts.html`` draws them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BARS = 100
_BINS = 32


class Bar(NamedTuple):
    """A bar of a chart: what it stands for, and its height."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class BarChart:
    """Bars from left to right; ``ends`` are the texts under the left end, the middle and the right end."""

    caption: str
    bars: tuple[Bar, ...] = ()
    ends: tuple[str, str, str] = ("", "", "")


def histogram(caption: str, values: NDArray[np.float64], *, unit: str = "", log: bool = False) -> BarChart:
    """Count values in bins of equal width, or of equal ratio if ``log``."""
    if not len(values):
        return BarChart(caption)
    low, high = float(values.min()), float(values.max())
    if high <= low:
        low, high = low * 0.95 - 0.5 * (low == 0), high * 1.05 + 0.5 * (high == 0)
    edges = np.geomspace(max(low, 1e-9), high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)
    edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
    names = [f"{edge:,.0f}" if abs(edge) >= 100 else f"{edge:.3g}" for edge in edges.tolist()]
    counts = np.histogram(values, edges)[0].tolist()
    bars = (Bar(f"{names[k]} to {names[k + 1]}{unit}", count) for k, count in enumerate(counts))
    return BarChart(caption, tuple(bars), (names[0] + unit, names[_BINS // 2] + unit, names[-1] + unit))


def class_balance(caption: str, counts: Sequence[int], names: Sequence[str]) -> BarChart:
    """Show the classes that have images, the largest first; a bar of many classes shows their mean."""
    found = sorted(((count, name) for count, name in zip(counts, names, strict=True) if count), reverse=True)
    if not found:
        return BarChart(caption)
    step = -(-len(found) // MAX_BARS)
    groups = [found[start : start + step] for start in range(0, len(found), step)]
    bars = (
        Bar(
            group[0][1] if len(group) == 1 else f"{group[0][1]} and {len(group) - 1} more, mean",
            sum(count for count, _ in group) / len(group),
        )
        for group in groups
    )
    return BarChart(
        caption, tuple(bars), (f"{found[0][0]:,}", f"{len(found):,} classes, the largest first", f"{found[-1][0]:,}")
    )


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
        low: Lower end of the vertical axis; None for the lowest point.
        high: Upper end; None for the highest point.
        x_name: What x is.
    """

    caption: str
    curves: tuple[Curve, ...]
    low: float | None = None
    high: float | None = None
    x_name: str = "epoch"

    @property
    def ends(self) -> tuple[float, float, float, float]:
        """The ends of the axes: the least and the greatest x, the lower and the upper end of y."""
        xs, ys = zip(*(point for curve in self.curves for point in curve.points), strict=True)
        return min(xs), max(xs), min(ys) if self.low is None else self.low, max(ys) if self.high is None else self.high

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
        wide, tall = (x1 - x0) or 1.0, (y1 - y0) or 1.0
        return [(1000 * (x - x0) / wide, 400 - 400 * (y - y0) / tall) for x, y in curve.points]
