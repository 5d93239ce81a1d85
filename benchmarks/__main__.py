"""`make bench`: every benchmark of the house, one after the other, beside its peers."""

from __future__ import annotations

import subprocess
import sys

TORCH, IMG2DATASET = ".venv-peers", ".venv-img2dataset"  # made by the Makefile
# Each also runs alone as `python -m benchmarks.<name>`; its docstring says how.
RUNS = (
    ("train_cpu", "--torch", TORCH),
    ("pipeline", "--torch", f"{TORCH}/bin/python", "--dali", f"{TORCH}/bin/python"),
    ("convert", "--peer", IMG2DATASET),
    ("download", "--peer", IMG2DATASET),
    ("verify",),
)


def main() -> int:
    """Run all; the exit code is that of the first that failed."""
    worst = 0
    for name, *arguments in RUNS:
        print(f"== benchmarks.{name}", flush=True)
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=False).returncode
        worst = worst or code
    return worst


if __name__ == "__main__":
    sys.exit(main())
