"""A few blocks in place of seventeen: what does not depend on the depth is tested in a fraction of the time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest

STAGES = ((1, 16, 1, 1), (6, 16, 1, 1), (6, 320, 1, 2))
"""One block of each kind, for tests of the network: without expansion, with a residual, and with a stride."""
FEWEST = ((1, 16, 1, 2), (6, 16, 1, 1))
"""The same in two blocks, for tests of what is done with it: to compile a graph takes most of their time."""


def shrink() -> None:
    """Build the smallest networks in this process from now on."""
    vars(importlib.import_module("mbv2.network.model"))["_STAGES"] = FEWEST


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """Build such networks in the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbv2.network.model._STAGES", FEWEST)
        yield
