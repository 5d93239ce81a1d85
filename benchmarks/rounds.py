"""The rules of every comparison in this folder.

- Contenders take turns: every round measures each once, in an order that a stated seed shuffles anew each round.
- Five rounds or more. Fewer are a trial, and no published table is made of one.
- The median counts. The spread is (largest - smallest) / median; a line whose spread is over 15 % is marked.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ROUNDS = 5
SPREAD_LIMIT_FRAC = 0.15
RATE = "images_per_s"
MARK = "(!)"

Measure = Callable[[], Mapping[str, float]]
"""Measure once; the result holds ``images_per_s``, and may hold other numbers, such as ``cpu_ms`` or ``lost``."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one contender did.

    Attributes:
        name: The contender.
        rates: Images/s of each round.
        others: Medians of whatever else it reported, by name.
    """

    name: str
    rates: tuple[float, ...]
    others: Mapping[str, float]

    @property
    def median(self) -> float:
        """Images/s."""
        return statistics.median(self.rates)

    @property
    def spread_frac(self) -> float:
        """The distance from the slowest round to the fastest, as a share of the median."""
        return (max(self.rates) - min(self.rates)) / self.median

    @property
    def steady(self) -> bool:
        """Whether the spread is within the limit."""
        return self.spread_frac <= SPREAD_LIMIT_FRAC


@dataclass(frozen=True, slots=True)
class Result:
    """One comparison.

    Attributes:
        name: A short name, e.g. ``train-224``.
        title: What is measured, and what is left out.
        lines: The contenders; ratios are to the first.
        unit: Of the rates.
    """

    name: str
    title: str
    lines: tuple[Line, ...]
    unit: str = "images/s"

    def to_json(self) -> dict[str, Any]:
        """Return the result as it is written; :func:`result_from_json` reads it."""
        return {
            "case": self.name,
            "title": self.title,
            "lines": [
                {
                    "name": line.name,
                    RATE: _short(line.median),
                    "rounds": [_short(rate) for rate in line.rates],
                    "spread_frac": round(line.spread_frac, 3),
                    "steady": line.steady,
                    "first_over_this": round(self.lines[0].median / line.median, 2),
                    **{name: _short(value) for name, value in line.others.items()},
                }
                for line in self.lines
            ],
        }

    def table(self) -> str:
        """Return the result as a table in Markdown."""
        extra = list(dict.fromkeys(name for line in self.lines for name in line.others))
        rows = [["", self.unit, "lowest", "highest", "spread", f"{self.lines[0].name} / it", *extra]]
        for line in self.lines:
            row = [line.name, figure(line.median), figure(min(line.rates)), figure(max(line.rates))]
            row += [f"{line.spread_frac:.0%}" + ("" if line.steady else f" {MARK}")]
            row += [f"{self.lines[0].median / line.median:.2f}"]
            rows.append([*row, *(figure(line.others[name]) if name in line.others else "" for name in extra)])
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join([f"{self.name}: {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows)])


def result_from_json(read: Mapping[str, Any]) -> Result:
    """Return the result that :meth:`Result.to_json` wrote, without the other numbers."""
    lines = (Line(line["name"], tuple(line["rounds"]), {}) for line in read["lines"])
    return Result(read["case"], read["title"], tuple(lines))


def compare(
    name: str,
    title: str,
    contenders: Mapping[str, Measure],
    rounds: int,
    seed: int,
    *,
    warm_up: bool = False,
    unit: str = "images/s",
) -> Result:
    """Measure the contenders in turn.

    Args:
        name: A short name.
        title: What is measured, and what is left out.
        contenders: How to measure each once, by name; ours first.
        rounds: How often.
        seed: Decides the order in every round.
        warm_up: Whether a round that does not count comes first (it fills the page cache).
        unit: Of the rates.
    """
    draw, found = random.Random(seed), dict[str, list[Mapping[str, float]]]()
    for number in range(0 if warm_up else 1, rounds + 1):
        for contender in draw.sample(list(contenders), len(contenders)):
            measured = contenders[contender]()
            if measured[RATE] <= 0:
                sys.exit(
                    f"{name}: expected images from {contender}; got none: {dict(measured)}; run it alone to see why"
                )
            what = f"round {number} of {rounds}" if number else "warm-up"
            print(f"{name} {what}, {contender}: {figure(measured[RATE])} {unit}", file=sys.stderr, flush=True)
            if number:
                found.setdefault(contender, []).append(measured)
    return Result(name, title, tuple(_line(contender, found[contender]) for contender in contenders), unit)


def _line(name: str, measured: list[Mapping[str, float]]) -> Line:
    rates = tuple(one[RATE] for one in measured)
    others = {key: statistics.median(one[key] for one in measured) for key in measured[0] if key != RATE}
    return Line(name, rates, others)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def figure(value: float) -> str:
    """Return a rate as tables show it."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
