"""What every test may ask for."""

from __future__ import annotations

import gc
import os
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.mbv2.small_network import small_network
from tests.memory_disk import memory_disk

__all__ = ["small_network"]
HERE = Path(__file__).parent
SHARED_DATA = HERE.parent.parent / "shared" / "data"
WITH_MINDSPORE = ("mbv2", "e2e", "cli/test_demo.py", "cli/test_convert.py", "cli/test_mobilenet.py")
"""What needs MindSpore; every other test has the mark ``light``."""
ROOM_BYTES = 3 << 30  # for what all tests leave behind until the last one is done

if find_spec("mindspore") is None:
    collect_ignore = list(WITH_MINDSPORE)


def pytest_configure() -> None:
    """Keep temporary folders in memory where there is room, unless ``--basetemp`` or the variable says where."""
    if folder := memory_disk(ROOM_BYTES):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(folder))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and weights; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not there")
    return SHARED_DATA


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what needs no MindSpore."""
    if not needs_mindspore(item.path):
        item.add_marker("light")


@cache  # each process of the tests asks for each of three thousand
def needs_mindspore(path: Path) -> bool:
    return any(path.is_relative_to(HERE / name) for name in WITH_MINDSPORE)


@pytest.hookimpl(tryfirst=True)  # while slow tests that are not asked for are there: the files' others take long too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have the most slow tests, so that no process is left alone with one of them."""
    slow = Counter(
        item.path for item in items if item.get_closest_marker("slow") and not item.get_closest_marker("long")
    )
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Leave all modules and tests out of the garbage collections to come: to compile a graph begins one, of 0.2 s."""
    gc.collect()
    gc.freeze()
