"""Skip what needs a package that is not installed."""

from importlib.util import find_spec

import pytest


def needs(*packages: str) -> None:
    """Skip a module of tests, as ``pytest.importorskip`` does; a process that only collects tests imports nothing."""
    for name in packages:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)
