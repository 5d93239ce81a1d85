"""`imnet-prep to-mindrecord` beside MindSpore's ImageNetToMR, img2dataset, and the decode rate of the cores.

Command::

    python -m benchmarks.convert --images ../shared/data/imagenet-samples-250.tar --count 20000 --peer /tmp/dl-venv

All read the same folder of photographs, repeated under other names, and run in turn, round after round; medians are
given, and the first round only warms the page cache. ImageNetToMR copies bytes and checks nothing; ours reads every
compressed bit, hashes each image and each file, reads all back and brings it to the disk. ``decode`` is OpenCV at 1/8
scale (the whole stream is read) of the same files, one process a core. img2dataset (keep_ratio 256, quality 90, in a
virtual environment of its own) fetches from a local server, as it cannot do otherwise: that is part of its figure.

``cpu_ms`` is processor time an image, all processes: on a machine that others use too, its ratios say more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from imnet_prep.cpu import cpu_count

IMAGENET_TO_MR = """
import sys
from mindspore.mindrecord import ImageNetToMR
ImageNetToMR(sys.argv[1], sys.argv[2], sys.argv[3], 4).transform()
"""


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("../shared/data/imagenet-samples-250.tar"))
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--small-count", type=int, default=5_000, help="images of the rounds with --short-side 256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", type=Path, help="virtual environment with img2dataset")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imnet-bench-convert")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    folder = repeat(args.images, args.work / "photos", args.count)
    small = repeat(args.images, args.work / "small", args.small_count)
    (args.work / "map").write_text("".join(f"{path.name} {k}\n" for k, path in enumerate(sorted(folder.iterdir()))))
    runs: dict[str, tuple[int, Callable[[], float]]] = {
        "ours_4_shards": (args.count, lambda: ours(folder, args.work, ["--shards", "4"])),
        "ours": (args.count, lambda: ours(folder, args.work, [])),
        "ImageNetToMR": (args.count, lambda: imagenet_to_mr(folder, args.work)),
        "decode": (args.count, lambda: decode(folder)),
        "ours_256": (args.small_count, lambda: ours(small, args.work, ["--short-side", "256", "--quality", "90"])),
    }
    if args.peer:
        runs["img2dataset_256"] = (args.small_count, lambda: img2dataset(small, args.work, args.peer))
    try:
        print(json.dumps(measure(runs, args.rounds), indent=1))
    finally:
        shutil.rmtree(args.work)


def measure(runs: dict[str, tuple[int, Callable[[], float]]], rounds: int) -> dict[str, Any]:
    """Run the contestants in turn; gives medians and spreads in images/s, and milliseconds of processor an image."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    cpu_ms: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, (count, run) in runs.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = run()
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / count
            print(f"round {number} {name}: {count / seconds:.0f} images/s, {cpu:.3f} ms", file=sys.stderr, flush=True)
            if number or rounds == 0:
                rates[name].append(count / seconds)
                cpu_ms[name].append(cpu)
    middle = {name: statistics.median(values) for name, values in rates.items()}
    cpu_middle = {name: statistics.median(values) for name, values in cpu_ms.items()}
    pairs = [("ours_4_shards", "ImageNetToMR"), ("ours", "ImageNetToMR"), ("ours", "decode")]
    pairs += [("ours_256", "img2dataset_256")] if "img2dataset_256" in runs else []
    return {
        "images_per_s": {name: round(value, 1) for name, value in middle.items()},
        "spread": {name: [round(min(v), 1), round(max(v), 1)] for name, v in rates.items()},
        "cpu_ms": {name: round(value, 3) for name, value in cpu_middle.items()},
        "ratios": {f"{a} / {b}": round(middle[a] / middle[b], 3) for a, b in pairs},
        "cpu_ratios": {f"{a} / {b}": round(cpu_middle[b] / cpu_middle[a], 3) for a, b in pairs},
        "cores": cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "rounds": rounds,
    }


def photographs(archive: Path) -> list[tuple[Path, bytes]]:
    """Return the JPEGs of a tar with their names, in its order."""
    with tarfile.open(archive) as tar:
        files = [(Path(member.name), tar.extractfile(member)) for member in tar if member.isfile()]
        photos = [(path, file.read()) for path, file in files if file is not None]
    return [(path, data) for path, data in photos if data.startswith(b"\xff\xd8")]


def repeat(archive: Path, folder: Path, count: int) -> Path:
    """Write the photographs of a tar again and again under other names, a folder a class."""
    photos = photographs(archive)
    for number in range(count):
        path, data = photos[number % len(photos)]
        target = folder / path.name.split("_")[0]
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number // len(photos):04d}_{path.name}").write_bytes(data)
    return folder


def timed(call: list[str], environment: dict[str, str] | None = None) -> float:
    """Run a command that must succeed; gives seconds."""
    started = time.perf_counter()
    done = subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})})
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{call[0]} failed: {done.stderr[-2000:]}")
    return seconds


def ours(folder: Path, work: Path, options: list[str]) -> float:
    """`imnet-prep to-mindrecord`, from process start to process end."""
    shutil.rmtree(work / "records", ignore_errors=True)
    call = [sys.executable, "-m", "imnet_prep", "to-mindrecord", str(folder)]
    return timed([*call, "--out", str(work / "records"), *options])


def imagenet_to_mr(folder: Path, work: Path) -> float:
    """MindSpore's converter, from process start to process end."""
    shutil.rmtree(work / "mr", ignore_errors=True)
    (work / "mr").mkdir()
    call = [sys.executable, "-c", IMAGENET_TO_MR, str(work / "map"), str(folder), str(work / "mr" / "a.mindrecord")]
    return timed(call, {"GLOG_v": "3"})


def _decode(paths: list[str]) -> None:
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    for path in paths:
        data = np.fromfile(path, np.uint8)
        assert cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None


def decode(folder: Path) -> float:
    """OpenCV at 1/8 scale, one process a core; imports left out."""
    paths = [str(path) for path in sorted(folder.rglob("*.*"))]
    cores = cpu_count()
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(_decode, [paths[:1]] * cores))
        started = time.perf_counter()
        list(pool.map(_decode, [paths[start : start + 50] for start in range(0, len(paths), 50)]))
        return time.perf_counter() - started


def img2dataset(folder: Path, work: Path, venv: Path) -> float:
    """Its keep_ratio 256 from a local server into webdataset shards; its start-up is left out."""
    shutil.rmtree(work / "i2d", ignore_errors=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.static_server", str(folder), str(work / "port")], stdout=subprocess.DEVNULL
    )
    try:
        while not (work / "port").exists():
            time.sleep(0.05)
        port = (work / "port").read_text()
        urls = [f"http://127.0.0.1:{port}/{path.relative_to(folder)}" for path in sorted(folder.rglob("*.*"))]
        (work / "urls.txt").write_text("\n".join(urls))
        call = [
            str(venv / "bin" / "img2dataset"), "--url_list", str(work / "urls.txt"), "--output_folder",
            str(work / "i2d"), "--output_format", "webdataset", "--image_size", "256", "--resize_mode", "keep_ratio",
            "--encode_quality", "90", "--processes_count", str(cpu_count()), "--thread_count", "32",
            "--number_sample_per_shard", "500",
        ]  # fmt: skip
        timed(call)
        stats = [json.loads(path.read_text()) for path in (work / "i2d").glob("*_stats.json")]
        if (done := sum(item["successes"] for item in stats)) != len(urls):
            raise SystemExit(f"img2dataset lost images: {done} of {len(urls)}")
        return float(max(item["end_time"] for item in stats) - min(item["start_time"] for item in stats))
    finally:
        server.kill()
        server.wait()
        (work / "port").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
