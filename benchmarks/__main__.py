"""`make bench`: every benchmark of the house, one after the other, each with the peers that are installed."""

from __future__ import annotations

import subprocess
import sys

# Each runs alone as `python -m benchmarks.<name>`; its docstring says which peers it wants and how to install them.
NAMES = ("train_cpu", "pipeline", "convert", "download", "verify")


def main() -> int:
    """Run all; the exit code is that of the first that failed."""
    worst = 0
    for name in NAMES:
        print(f"== benchmarks.{name}", flush=True)
        worst = worst or subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
    return worst


if __name__ == "__main__":
    sys.exit(main())
