"""ImageNet at its full count, with tiny images: what the number of images costs, when their size costs nothing.

Commands::

    python -m benchmarks.rehearsal
    python -m benchmarks.rehearsal --count 20000 100000

An archive of 1,000 inner tars is made, of 1,281,167 images of 32 x 32 pixels or of other counts, no two alike. Then
each step runs as a command of its own: ``to-mindrecord --dry-run`` (the plan), ``to-mindrecord`` to 128 shards,
``verify`` at two levels, and the loader: opening, the order of an epoch, the first batch, and a whole epoch. For each
step the result has the wall time and the processor time in seconds, that of the main process alone (what more cores do
not shorten), and the largest resident memory of all its processes together in MB, in which pages that several share
count for each. ``overhead_bytes_a_row`` is what shards and indexes take beyond the images.

At the full count it needs 6 GB in ``--work``; everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.contenders import children_s, processor_s
from benchmarks.photographs import add_to_tar
from benchmarks.setting import machine
from imnet_prep.cpu import cpu_count

CLASSES, SHARDS, IMAGENET = 1000, 128, 1_281_167


def main() -> None:
    """Rehearse at each count, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, nargs="+", default=[IMAGENET], help="images")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--loader", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loader:
        print(json.dumps(loader(args.loader)))
        return
    where, runs = machine(), []
    for count in args.count:
        with tempfile.TemporaryDirectory(prefix="imnet-rehearsal-", dir=args.work) as folder:
            runs.append(rehearse(count, Path(folder)))
    print(json.dumps({"machine": where, "runs": runs}, indent=1))


def rehearse(count: int, work: Path) -> dict[str, Any]:
    """Make an archive of ``count`` images, and run every step on it."""
    archive, records = work / "ILSVRC2012_train_like.tar", work / "records"
    began = time.perf_counter()
    image_bytes = make_archive(archive, count)
    print(f"{count} images made in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    tool = [sys.executable, "-m", "imnet_prep"]
    convert = [*tool, "to-mindrecord", str(archive), "--out", str(records), "--shards", str(SHARDS), "--json"]
    result: dict[str, Any] = {"images": count, "image_bytes": image_bytes}
    result["plan"], _ = step("plan", [*convert, "--dry-run"])
    result["convert"], told = step("convert", convert)
    if (stored := told["images"]) != count:
        sys.exit(f"images lost: expected {count}; got {stored}")
    files = sum(path.stat().st_size for path in records.glob("*/*.mindrecord*"))
    result["overhead_bytes_a_row"] = round((files - image_bytes) / count, 1)
    archive.unlink()
    for level in ("hash", "decode"):
        result[f"verify_{level}"], _ = step(
            f"verify {level}", [*tool, "verify", str(records), "--level", level, "--json"]
        )
    result["loader"], told = step("loader", [sys.executable, "-m", "benchmarks.rehearsal", "--loader", str(records)])
    result["loader"] |= told
    return result


def step(name: str, command: list[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run a command to its end; return its time and memory, and the object that it prints."""
    began, before, peak, main_s = time.perf_counter(), children_s(), 0.0, 0.0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log)
        while process.poll() is None:
            peak, main_s = max(peak, resident_mb(process.pid)), processor_s(process.pid) or main_s
            time.sleep(0.1)
        seconds, cpu_s = time.perf_counter() - began, children_s() - before
        out.seek(0)
        log.seek(0)
        text, said = out.read(), log.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    print(f"{name}: {seconds:.1f} s, {cpu_s:.1f} s of processor, {peak:.0f} MB", file=sys.stderr, flush=True)
    cost = {"seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1), "main_cpu_s": round(main_s, 1)}
    return {**cost, "peak_mb": round(peak)}, json.loads(text)


def make_archive(path: Path, count: int) -> int:
    """Write the nested tar, a process a core; return the bytes of all images."""
    total = 0
    numbers = [range(count * label // CLASSES, count * (label + 1) // CLASSES) for label in range(CLASSES)]
    names = [f"n{label + 1_000_000:08d}" for label in range(CLASSES)]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as outer, ProcessPoolExecutor(cpu_count()) as pool:
        for name, (inner, size) in zip(names, pool.map(make_class, names, numbers), strict=True):
            add_to_tar(outer, f"{name}.tar", inner)
            total += size
    return total


def make_class(name: str, numbers: range) -> tuple[bytes, int]:
    """Return the tar of a class, and the bytes of its images."""
    out, total = io.BytesIO(), 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number in numbers:
            data = draw(number)
            add_to_tar(tar, f"{name}_{number}.JPEG", data)
            total += len(data)
    return out.getvalue(), total


def draw(number: int) -> bytes:
    """Return a small picture like no other number's: fewer colours would make near duplicates."""
    coarse = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", cv2.resize(coarse, (32, 32), interpolation=cv2.INTER_CUBIC))[1])


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process and all below it, in MB; shared pages count once for each."""
    parents: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
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


def loader(records: Path) -> dict[str, float]:
    """Open the records as training does, and time the parts of an epoch."""
    from imnet_prep import TrainOptions, open_batches

    marks = [time.perf_counter()]
    with open_batches(records, "train", TrainOptions(256, image_size=32), 0) as batches:
        marks.append(time.perf_counter())
        order = batches.order(0)
        marks.append(time.perf_counter())
        assert len(order.positions) == batches.images
        iterator = batches.epoch(0)
        next(iterator)
        marks.append(time.perf_counter())
        rest = sum(len(batch) for batch in iterator)
        marks.append(time.perf_counter())
    opened, ordered, first, epoch = (end - start for start, end in pairwise(marks))
    return {
        "open_s": round(opened, 2),
        "order_s": round(ordered, 3),
        "first_batch_s": round(first, 2),
        "epoch_images_per_s": round(rest / epoch),
    }


if __name__ == "__main__":
    main()
