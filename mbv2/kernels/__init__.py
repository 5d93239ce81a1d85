"""CPU operators for MobileNetV2 and how to tell whether they are here."""

from __future__ import annotations


def available() -> bool:
    """Whether the C++ operators are built and usable in this process."""
    return False


def describe() -> str:
    """One line that names the operators in use, or why they are not and what to install."""
    return "standard operators"
