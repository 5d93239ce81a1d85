"""MindSpore is started once for all tests of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from imnet_prep.runtime import start_mindspore


@pytest.fixture(scope="session", autouse=True)
def mindspore_started() -> None:
    start_mindspore("CPU")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and weights beside the checkout; tests that read it skip where it is absent."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data")
    return folder
