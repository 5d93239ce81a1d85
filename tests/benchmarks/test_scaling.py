from __future__ import annotations

import pytest

from benchmarks.scaling import fit


def test_amdahls_law_is_found_again() -> None:
    cores = (1, 2, 8)
    found = fit(cores, [1000 / (0.5 + 4 / number) for number in cores])
    assert found["serial_ms"] == pytest.approx(0.5, rel=1e-3)
    assert found["parallel_ms"] == pytest.approx(4, rel=1e-3)
    assert found["predicted"]["64"] == round(1000 / (0.5 + 4 / 64))


def test_nothing_is_predicted_where_the_cores_do_better_than_the_law() -> None:
    assert fit((1, 2), [100, 220])["predicted"] == {}
