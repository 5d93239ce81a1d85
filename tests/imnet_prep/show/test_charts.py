"""Charts count every value, and stay on their canvas."""

from __future__ import annotations

import numpy as np
import pytest

from imnet_prep.show.charts import MAX_NAMED, BarChart, Curve, CurveChart, class_balance, histogram


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[7.0, 8.0], [0.0, 0.5], [1.0, 2.0, 1e6], list(range(1, 1000)), [0.31, 0.33, 0.34], [1e-7, 3e4, 3e4]]
)
def test_a_histogram_counts_every_value_between_round_numbers(values: list[float], log: bool) -> None:
    chart = histogram("Width", np.array(values, np.float64), "pixels", log=log)
    assert sum(bar.value for bar in chart.bars) == len(values)
    assert 2 <= len(chart.bars) <= 40
    assert chart.x_name == ("pixels, log scale" if log and 0 < 1.5 * min(values) < max(values) else "pixels")
    assert max(bar.value for bar in chart.bars) <= chart.top == int(chart.y_ticks[-1].text)
    for ticks in (chart.x_ticks, chart.y_ticks):
        assert 1 <= len(ticks) <= 12
        assert [tick.place for tick in ticks] == sorted({tick.place for tick in ticks})
        assert all(-1e-9 <= tick.place <= 1 + 1e-9 for tick in ticks)


def test_a_tick_is_at_its_number() -> None:
    chart = histogram("Width", np.array([100, 200, 600]), "pixels")
    ends = [float(chart.bars[0].name.split(" to ")[0]), float(chart.bars[-1].name.split(" to ")[1])]
    for tick in chart.x_ticks:
        assert tick.place == pytest.approx((float(tick.text) - ends[0]) / (ends[1] - ends[0]))


def test_equal_values_and_none_are_said_in_words() -> None:
    assert histogram("Width", np.zeros(0), "pixels").sentence == "Width: nothing to count."
    said = histogram("Width", np.full(3000, 64), "pixels", log=True).sentence
    assert said == "Width: 64 pixels for all 3,000 images."


def test_class_balance_is_sorted_and_leaves_out_empty_classes() -> None:
    chart = class_balance("train", [2, 0, 5, 2], ["a", "b", "c", "d"])
    assert chart == BarChart("train: images per class", (("c", 5), ("a", 2), ("d", 2)))  # type: ignore[arg-type]
    assert class_balance("val", [0, 0], ["a", "b"]).sentence == "val: no labels."
    assert class_balance("val", [50] * 20, ["a"] * 20).sentence == "val: 20 classes, each of 50 images."


def test_many_classes_are_counted_by_their_size() -> None:
    counts = list(range(1, MAX_NAMED + 2))
    chart = class_balance("train", counts, [f"class {count}" for count in counts])
    assert chart.y_name == "classes"
    assert sum(bar.value for bar in chart.bars) == MAX_NAMED + 1


def test_curves_are_scaled_to_the_canvas() -> None:
    curves = Curve("train", 1, ((1, 2.0), (3, 1.0))), Curve("val", 2, ((2, 4.0),))
    chart = CurveChart("Loss", curves, "loss", low=0)
    assert [chart.places(curve) for curve in chart.curves] == [[(0, 200), (1000, 300)], [(500, 0)]]
    assert [(tick.place, tick.text) for tick in chart.x_ticks] == [(0, "1"), (0.5, "2"), (1, "3")]
    assert [(tick.place, tick.text) for tick in chart.y_ticks] == [(k / 4, str(k)) for k in range(5)]
    assert chart.rows == [("1", 2.0, ""), ("2", "", 4.0), ("3", 1.0, "")]
    assert chart.description == "train from 2 to 1; val from 4 to 4"


def test_a_constant_curve_is_drawn() -> None:
    chart = CurveChart("Loss", (Curve("train", 1, ((1, 0.5),)),), "loss")
    ((x, y),) = chart.places(chart.curves[0])
    assert x == 0
    assert 0 <= y <= 400
