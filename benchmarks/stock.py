"""The stock ways to read our records in MindSpore: its own `MindDataset`, and `to_dataset`, the adapter of our loader.

Command::

    python -m benchmarks.stock

The photographs and the rules are those of `pipeline.py`. All run in this environment and make uint8 batches of 64 at
224 px: `MindDataset` by MindSpore's operators, the adapter as a dataset that MindSpore iterates, `ours` without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.pipeline import compare_loaders
from benchmarks.rounds import Result
from benchmarks.setting import Setting, parser, run

LOADERS = {"ours": "ours", "to_dataset": "ours_dataset", "MindDataset": "mindspore"}


def measure(told: Setting) -> Iterator[Result]:
    """Compare them on each kind of images."""
    return compare_loaders(told, "stock", {name: (sys.executable, loader) for name, loader in LOADERS.items()})


if __name__ == "__main__":
    run(parser(__doc__).parse_args(), [measure])
