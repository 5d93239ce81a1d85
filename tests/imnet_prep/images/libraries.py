"""Take the C++ library away, as where it is not built."""

from __future__ import annotations

import pytest

from imnet_prep.images import native


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the rest of a test run as if the C++ library were not built."""
    monkeypatch.setattr(native, "load", lambda: (None, "the C++ decoder is not built"))
    monkeypatch.setattr(native, "function", lambda name: None)
