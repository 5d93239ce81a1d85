from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from benchmarks.rounds import MARK, Line, Result, compare, result_from_json


def recorder(name: str, calls: list[str], rates: list[float]) -> Callable[[], Mapping[str, float]]:
    def measure() -> Mapping[str, float]:
        calls.append(name)
        return {"images_per_s": rates[calls.count(name) - 1], "lost": float(calls.count(name))}

    return measure


def contenders(calls: list[str]) -> dict[str, Callable[[], Mapping[str, float]]]:
    rates = {"a": [1, 100, 110, 120, 90, 100], "b": [1, 50, 51, 52, 49, 50], "c": [1, 10, 10, 10, 10, 10]}
    return {name: recorder(name, calls, [float(rate) for rate in some]) for name, some in rates.items()}


def test_every_contender_comes_once_a_round_in_an_order_of_the_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        calls: list[str] = []
        compare("case", "title", contenders(calls), 5, seed)
        rounds = [calls[start : start + 3] for start in range(0, 15, 3)]
        assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
        assert len({tuple(one) for one in rounds}) > 1
        orders.append(calls)
    assert orders[0] == orders[1] != orders[2]


def test_the_warm_up_does_not_count() -> None:
    result = compare("case", "title", contenders([]), 5, 0, warm_up=True)
    assert [line.median for line in result.lines] == [100, 50, 10]
    assert result.lines[1].others == {"lost": 4}  # the median of 2 to 6


def test_a_line_whose_rounds_are_far_apart_is_marked() -> None:
    result = compare("case", "title", contenders([]), 5, 0, warm_up=True)
    assert [line.steady for line in result.lines] == [False, True, True]
    marked = [row for row in result.table().splitlines() if MARK in row]
    assert len(marked) == 1
    assert marked[0].startswith("| a | 100 | 90 | 120 | 30% (!) | 1.00 |")


def test_a_contender_that_makes_nothing_ends_the_comparison() -> None:
    broken = {"ours": lambda: {"images_per_s": 0.0, "lost": 20.0}}
    with pytest.raises(SystemExit, match=r"case: expected images from ours; got none: .*'lost': 20"):
        compare("case", "title", broken, 5, 0)


@pytest.mark.parametrize(("largest", "steady"), [(115.0, True), (115.1, False)])
def test_the_limit_is_15_percent_of_the_median(largest: float, steady: bool) -> None:
    assert Line("a", (100.0, 100.0, largest), {}).steady is steady


def test_a_result_is_read_as_it_was_written() -> None:
    result = Result("case", "title", (Line("a", (1.0, 2.0), {}), Line("b", (3.0, 4.0), {})))
    assert result_from_json(result.to_json()) == result
