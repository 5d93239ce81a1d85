"""The command ``mbv2`` with small networks: ``python -m tests.mbv2.small_mbv2 train ...``."""

from __future__ import annotations

from imnet_prep.cli.mobilenet import main
from tests.mbv2.small_network import shrink

if __name__ == "__main__":
    shrink()
    main()
