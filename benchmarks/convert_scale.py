"""A training archive of ImageNet's shape, 1,000 inner tars of small images, converted at two sizes.

Command::

    python -m benchmarks.convert_scale --images 100000 1000000

For each size: seconds of each tenth (100,000 of a million), peak resident memory of all processes
together, and what the shards and indexes take beyond the images' bytes. The archives are made first, and deleted at the
end.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = 1000
CONVERT = """
import json, sys, time
from pathlib import Path
from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions

def main():
    seen = []
    def progress(state):
        seen.append((time.monotonic(), state.unit, state.done))
    source, out, log, workers = sys.argv[1:]
    started = time.monotonic()
    convert([Path(source)], Path(out), None, PlanOptions(), ConvertOptions(workers=int(workers) or None), progress,
            lambda: False)
    Path(log).write_text(json.dumps({"started": started, "ended": time.monotonic(), "seen": seen}))

if __name__ == "__main__":
    main()
"""


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imnet-bench-scale")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    try:
        results = [measure(count, args.work, args.workers) for count in args.images]
    finally:
        shutil.rmtree(args.work)
    peaks = [result["peak_rss_mb"] for result in results]
    print(json.dumps({"runs": results, "peak_last_to_first": round(peaks[-1] / peaks[0], 3)}, indent=1))


def make_archive(path: Path, count: int) -> int:
    """Write the nested tar; every image differs. Gives the bytes of all images."""
    rng = np.random.default_rng(0)
    bases = []
    for _ in range(64):
        pixels = rng.integers(0, 256, (3, 3, 3), np.uint8).repeat(12, 0).repeat(12, 1)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=80)
        bases.append(out.getvalue())
    total = 0
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as outer:
        for label in range(CLASSES):
            wnid, inner = f"n{label + 1_000_000:08d}", io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for number in range(count * label // CLASSES, count * (label + 1) // CLASSES):
                    base = bases[number % len(bases)]
                    data = base[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + base[2:]
                    entry = tarfile.TarInfo(f"{wnid}_{number}.JPEG")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                    total += len(data)
            entry = tarfile.TarInfo(f"{wnid}.tar")
            entry.size = inner.tell()
            inner.seek(0)
            outer.addfile(entry, inner)
    return total


def resident_mb(pid: int) -> float:
    """Resident memory of a process and all below it, in MB; pages that several share count once for each."""
    parents: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
            sizes[int(folder.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    todo, total = [pid], 0
    while todo:
        one = todo.pop()
        total += sizes.get(one, 0)
        todo += parents.get(one, [])
    return total / 1e6


def measure(count: int, work: Path, workers: int) -> dict[str, Any]:
    """Make an archive of ``count`` images and convert it."""
    archive, out, log = work / "ILSVRC2012_train_like.tar", work / "records", work / "log.json"
    image_bytes = make_archive(archive, count)
    script = work / "run.py"
    script.write_text(CONVERT)
    process = subprocess.Popen([sys.executable, str(script), str(archive), str(out), str(log), str(workers)])
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident_mb(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the conversion of {count} images failed")
    told = json.loads(log.read_text())
    stored = [(at, done) for at, unit, done in told["seen"] if unit == "images"]
    begun = next(at for at, done in stored if done)
    tenth = count // 10

    def at(images: int) -> float:
        return next((at for at, done in stored if done >= images), stored[-1][0])

    files = sum(path.stat().st_size for path in out.glob("*/*.mindrecord*"))
    result = {
        "images": count,
        "seconds": round(told["ended"] - told["started"], 1),
        "plan_and_digests_s": round(begun - told["started"], 1),
        "tenths_s": [round(b - a, 2) for a, b in pairwise([begun, *(at(tenth * n) for n in range(1, 11))])],
        "commit_s": round(told["ended"] - stored[-1][0], 1),
        "images_per_s": round(count / (told["ended"] - told["started"]), 1),
        "peak_rss_mb": round(peak, 1),
        "image_bytes": image_bytes,
        "overhead_bytes_a_row": round((files - image_bytes) / count, 1),
        "allowed_bytes_a_row": round(0.03 * image_bytes / count + 150, 1),
        "shards": len(list(out.glob("*/*.mindrecord"))),
    }
    print(json.dumps(result), file=sys.stderr, flush=True)
    shutil.rmtree(out)
    archive.unlink()
    return result


if __name__ == "__main__":
    main()
