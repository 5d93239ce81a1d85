"""What the training benchmarks share: running a contender in a process of its own, and PyTorch's worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imnet_prep.cpu import cpu_count

WORKER = Path(__file__).with_name("torch_worker.py")


def run_json(command: Sequence[str]) -> dict[str, Any]:
    """The last line of a command's output, as JSON."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def torch_worker(venv: Path, mode: str, options: Mapping[str, object], *flags: str) -> dict[str, Any]:
    """`torch_worker.py` in a virtual environment with torch; as many threads as this process may use if not given."""
    words = [str(word) for pair in ({"--threads": cpu_count()} | dict(options)).items() for word in pair]
    return run_json([str(venv / "bin/python"), str(WORKER), mode, *words, *flags])
