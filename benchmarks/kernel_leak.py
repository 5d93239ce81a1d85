"""Resident memory over 2,000 training steps on our operators: it must stay flat.

Command::

    python -m benchmarks.kernel_leak --steps 2000

Prints a JSON line every hundred steps and last the growth from step 200 on; exit status 1 where it is more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from mbv2.bench import BenchOptions, prepare
from mbv2.runtime import start_mindspore

LIMIT_FRAC = 0.02
SETTLED = 200  # steps after which nothing should grow


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--precision", default="float32")
    args = parser.parse_args()
    start_mindspore("CPU")
    options = BenchOptions(
        batch_size=args.batch_size,
        image_size=args.image_size,
        width=0.5,
        classes=10,
        kernels="native",
        precision=args.precision,
    )
    run, kernels = prepare(options)
    print(json.dumps({"kernels": kernels}))
    sizes = []
    for step in range(1, args.steps + 1):
        run()
        if step % 100 == 0:
            sizes.append(resident_bytes())
            print(json.dumps({"step": step, "resident_mb": round(sizes[-1] / 1e6, 1)}), flush=True)
    settled = sizes[SETTLED // 100 - 1 :]
    growth = float(np.max(settled)) / settled[0] - 1
    print(json.dumps({"steps": args.steps, "growth_frac": round(growth, 5)}))
    sys.exit(growth > LIMIT_FRAC)


if __name__ == "__main__":
    main()
