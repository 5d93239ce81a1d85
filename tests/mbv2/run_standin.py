"""Run the trainer on in-memory data in a process of its own, and kill it after a step.

Usage: python -m tests.mbv2.run_standin OUT STEP
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from imnet_prep.types import Progress, ProgressCallback
from mbv2.recipe import Recipe
from mbv2.training.options import RunOptions
from mbv2.training.run import train
from tests.mbv2.small_network import shrink
from tests.mbv2.standin import memory_data

BATCH = 8
RECIPE = Recipe(
    epochs=4,
    batch_size=BATCH,
    image_size=32,
    width=0.35,
    lr=0.02,
    dropout=0.2,
    ema_decay=0.9,
    clip_norm=5.0,
    accumulate_steps=2,  # 7 is odd: the save there holds half an update
)
SAVE_EVERY = 7


def options(out: Path, *, resume: bool = False) -> RunOptions:
    """Return the same run for every process that takes part: 4 epochs of 5 steps."""
    return RunOptions(out.parent, out, RECIPE, seed=3, save_every=SAVE_EVERY, log_every=1, resume=resume)


def signal_at(step: int, number: signal.Signals) -> ProgressCallback:
    """Return a progress callback that sends this process a signal after a step."""

    def progress(state: Progress) -> None:
        if state.done == step * BATCH:
            os.kill(os.getpid(), number)

    return progress


def main() -> None:
    """Train up to the step."""
    out, step = Path(sys.argv[1]), int(sys.argv[2])
    train(options(out), data=memory_data(batch=BATCH), progress=signal_at(step, signal.Signals["SIGKILL"]))


if __name__ == "__main__":
    shrink()
    main()
