"""Charts count every value, and stay on their canvas."""

from __future__ import annotations

import numpy as np
import pytest

from imnet_prep.show.charts import MAX_BARS, Curve, CurveChart, class_balance, histogram


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[7.0], [0.0, 0.0], [1.0, 2.0, 1e6], list(range(1, 1000))])
def test_a_histogram_counts_every_value(values: list[float], log: bool) -> None:
    chart = histogram("Width", np.array(values, np.float64), unit=" px", log=log)
    assert sum(bar.value for bar in chart.bars) == len(values)
    assert all(name.endswith(" px") for name, _ in chart.bars)


def test_a_histogram_of_nothing_has_no_bars() -> None:
    assert histogram("Width", np.zeros(0)).bars == ()


def test_class_balance_is_sorted_and_leaves_out_empty_classes() -> None:
    chart = class_balance("train", [2, 0, 5], ["a", "b", "c"])
    assert chart.bars == (("c", 5), ("a", 2))
    assert chart.ends == ("5", "2 classes, the largest first", "2")
    assert class_balance("val", [0, 0], ["a", "b"]).bars == ()


def test_bars_of_many_classes_keep_their_sum() -> None:
    counts = list(range(1, 2 * MAX_BARS + 1))
    chart = class_balance("train", counts, [f"class {count}" for count in counts])
    assert len(chart.bars) == MAX_BARS
    assert sum(bar.value for bar in chart.bars) * 2 == sum(counts)
    assert chart.bars[0] == ("class 200 and 1 more, mean", 199.5)


def test_curves_are_scaled_to_the_canvas() -> None:
    chart = CurveChart("Loss", (Curve("train", 1, ((1, 2.0), (3, 1.0))), Curve("val", 2, ((2, 4.0),))), low=0)
    assert [chart.places(curve) for curve in chart.curves] == [[(0, 200), (1000, 300)], [(500, 0)]]
    assert chart.rows == [("1", 2.0, ""), ("2", "", 4.0), ("3", 1.0, "")]
    assert chart.description == "train from 2 to 1; val from 4 to 4"


def test_a_constant_curve_is_drawn() -> None:
    chart = CurveChart("Loss", (Curve("train", 1, ((1, 0.5),)),))
    assert chart.places(chart.curves[0]) == [(0, 400)]
