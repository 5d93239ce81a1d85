"""The fixture of the tests that train."""

from tests.mbv2.small_network import small_network

__all__ = ["small_network"]
