"""Train on records in a process of its own, and end it with SIGKILL after a step.

Usage: python -m tests.mbv2.training.run_pairs RUN.json KILL_STEP
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from imnet_prep.types import Progress
from mbv2.recipe import recipe_from_fields
from mbv2.training.options import RunOptions
from mbv2.training.run import train
from tests.imnet_prep.obstacles import kill
from tests.mbv2.small_network import shrink


def run_options(document: dict[str, Any], out: Path, *, resume: bool = False) -> RunOptions:
    """Return the run that a document of fields and run options describes."""
    recipe = recipe_from_fields(document["recipe"], where="the test")
    pretrained = Path(document["pretrained"]) if recipe.freeze == "backbone" else None
    return RunOptions(
        Path(document["records"]), out, recipe, 5, log_every=1, resume=resume, pretrained=pretrained, **document["run"]
    )


def main() -> None:
    """Begin the run."""
    document = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    kill_after = int(sys.argv[2])
    options = run_options(document, Path(document["out"]))
    batch, begun = options.recipe.batch_size, False

    def progress(state: Progress) -> None:
        nonlocal begun
        begun = begun or "epoch" in state.note  # not while features are computed
        if begun and state.done == kill_after * batch:
            kill(os.getpid())

    train(options, progress=progress)


if __name__ == "__main__":
    shrink()
    main()
