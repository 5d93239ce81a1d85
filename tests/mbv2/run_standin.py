"""Run the trainer on in-memory data in a process of its own, and send it a signal after a step.

Usage: python -m tests.mbv2.run_standin OUT SIGNAL STEP [resume]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from imnet_prep.cli.render import guard, stop_requested
from imnet_prep.types import Progress
from mbv2.recipe import Recipe
from mbv2.training.options import RunOptions
from mbv2.training.run import train
from tests.mbv2.small_network import shrink
from tests.mbv2.standin import memory_data

BATCH = 8
RECIPE = Recipe(
    epochs=8,
    batch_size=BATCH,
    image_size=32,
    width=0.35,
    lr=0.02,
    dropout=0.2,
    ema_decay=0.9,
    clip_norm=5.0,
    accumulate_steps=2,  # 17 is odd: the save there holds half an update
)
SAVE_EVERY = 17


def options(out: Path, *, resume: bool = False) -> RunOptions:
    """Return the same run for every process that takes part: 8 epochs of 5 steps."""
    return RunOptions(out.parent, out, RECIPE, seed=3, save_every=SAVE_EVERY, log_every=1, resume=resume)


@guard
def main() -> None:
    """Train as ``mbv2 train`` does: a signal asks for a stop, an error becomes an exit code."""
    out, number, step = Path(sys.argv[1]), signal.Signals[sys.argv[2]], int(sys.argv[3])

    def progress(state: Progress) -> None:
        if state.done == step * BATCH:
            os.kill(os.getpid(), number)

    with stop_requested() as stop:
        train(options(out, resume="resume" in sys.argv), data=memory_data(batch=BATCH), stop=stop, progress=progress)


if __name__ == "__main__":
    shrink()
    main()
