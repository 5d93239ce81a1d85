"""What every test may ask for."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_DATA = HERE.parent.parent / "shared" / "data"
WITH_MINDSPORE = ("mbv2", "e2e", "cli/test_demo.py", "cli/test_mobilenet.py")
"""What needs MindSpore; every other test has the mark ``light``."""

if find_spec("mindspore") is None:
    collect_ignore = list(WITH_MINDSPORE)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and weights; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not there")
    return SHARED_DATA


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what needs no MindSpore."""
    if not any(item.path.is_relative_to(HERE / name) for name in WITH_MINDSPORE):
        item.add_marker("light")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have the most slow tests, so that no process is left alone with one of them."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
