"""Our loader for PyTorch beside a `DataLoader` with torchvision v2 and DALI's iterator, in a loop without training.

Command::

    python -m benchmarks.torch_loop

The photographs and the rules are those of `pipeline.py`. Every contender runs in the environment of the peers, where
there is no MindSpore, and makes tensors: uint8 batches of 64 at 224 px.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.pipeline import compare_loaders
from benchmarks.rounds import Result
from benchmarks.setting import Setting, parser, run

LOADERS = {"ours": "ours_torch", "DataLoader, torchvision v2": "torchvision", "DALI": "dali_torch"}


def measure(told: Setting) -> Iterator[Result]:
    """Compare the loaders on each kind of images."""
    if told.peers is None:
        sys.exit("no PyTorch: expected an environment of the peers; got none; `make .venv-peers/.installed` makes it")
    return compare_loaders(told, "torch", {name: (str(told.peers), loader) for name, loader in LOADERS.items()})


if __name__ == "__main__":
    run(parser(__doc__).parse_args(), [measure])
