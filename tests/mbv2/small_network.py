"""Three blocks in place of seventeen: what does not depend on the depth is tested in a fraction of the time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest

STAGES = ((1, 16, 1, 1), (6, 16, 1, 1), (6, 320, 1, 2))
"""One block of each kind: without expansion, with a residual, and with a stride."""


def shrink() -> None:
    """Build such networks in this process from now on."""
    vars(importlib.import_module("mbv2.network.model"))["_STAGES"] = STAGES


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """Build such networks in the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbv2.network.model._STAGES", STAGES)
        yield
