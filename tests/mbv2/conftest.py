"""MindSpore is started once for all tests of the package."""

from __future__ import annotations

import pytest

from imnet_prep.runtime import start_mindspore


@pytest.fixture(scope="session", autouse=True)
def mindspore_started() -> None:
    start_mindspore("CPU")
