"""`mbv2 bench` measures what it says, and names the operators."""

from __future__ import annotations

import pytest

from imnet_prep.errors import TrainError
from mbv2 import kernels
from mbv2.bench import BenchOptions, bench


@pytest.mark.slow
def test_a_bench_of_inference_counts_steps_and_names_the_operators() -> None:
    seen: list[tuple[int, int]] = []
    result = bench(
        BenchOptions(mode="eval", batch_size=2, image_size=32, width=0.35, steps=3),
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (6, 6)
    assert result.fastest_ms <= result.step_ms <= result.slowest_ms
    assert result.images_per_s == pytest.approx(2 / result.step_ms * 1e3)
    assert result.kernels == (kernels.describe() if kernels.available() else "standard operators")


@pytest.mark.parametrize("field", [{"mode": "both"}, {"steps": 0}, {"batch_size": -1}])
def test_options_out_of_range_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(TrainError):
        BenchOptions(**field)  # type: ignore[arg-type]
