"""A million tiny records: how long opening takes, how soon the first batch comes, and whether memory stays flat.

Command::

    python -m benchmarks.pipeline_scale --records 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def resident_mb() -> float:
    """Resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def write(folder: Path, count: int) -> None:
    """Write ``count`` records of 16 different 8 x 8 pictures."""
    from tests.records import write_folder
    from tests.synthetic import encode, picture

    pictures = [encode(picture(seed, 0, 8, 8), quality=50) for seed in range(16)]
    rows = [(f"n{i % 10:08d}/n{i % 10:08d}_{i}.JPEG", i % 10, pictures[i % 16]) for i in range(count)]
    write_folder(folder, {"train": rows}, shards=8, classes=10)


def measure(folder: Path) -> dict[str, object]:
    """Open, take an epoch, note times and memory."""
    from imnet_prep import TrainOptions, open_batches

    before, began = resident_mb(), time.perf_counter()
    with open_batches(folder, "train", TrainOptions(256, image_size=8), 0) as batches:
        opened = time.perf_counter()
        iterator = batches.epoch(0)
        next(iterator)
        first = time.perf_counter()
        at_tenth, resident = resident_mb(), []
        for step, _ in enumerate(iterator, 2):
            if step % max(1, batches.steps_per_epoch // 10) == 0:
                resident.append(round(resident_mb(), 1))
        done = time.perf_counter()
    return {
        "open_s": round(opened - began, 2),
        "first_batch_s": round(first - opened, 2),
        "epoch_s": round(done - first, 1),
        "resident_before_mb": round(before, 1),
        "resident_at_first_batch_mb": round(at_tenth, 1),
        "resident_by_tenths_mb": resident,
    }


def main() -> None:
    """Write the records in one process, measure in another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the records here; used again where they are")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="pipeline-scale-") as temporary:
        folder = (options.folder or Path(temporary)) / "records"
        if not folder.exists():
            write(folder, options.records)
        subprocess.run([sys.executable, "-m", "benchmarks.pipeline_scale", "--measure", str(folder)], check=True)


if __name__ == "__main__":
    main()
