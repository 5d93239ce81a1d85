"""What it costs to install without a compiler: each job with the C++ libraries and without, side by side.

Command::

    python -m benchmarks.without_libraries --rounds 5

Two copies of the package, one without its libraries, do the same in turn with the same photographs, repeated under
other names: download from a server on this machine, conversion of the images as they are and to short side 256,
decoding of training batches. The first round only warms up. ``ratio`` is of the medians of images/s. ``cpu_ratio`` is
of processor time, start of the process included, which says more on a machine that others use too. Training steps have
a command of their own: ``mbv2 bench`` beside ``mbv2 bench --standard-ops``.
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import photographs
from imnet_prep.cpu import cpu_count

ROOT = Path(__file__).parents[1]
COPIES = ("native", "plain")


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder or a tar of JPEGs (default: made, see photographs.py)")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imnet-bench-without")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    photos = photographs.load(args.images).write(args.work / "photos", args.count)
    for name in COPIES:
        install(args.work / name, libraries=name == "native")
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.static_server", str(photos), str(args.work / "port")])
    try:
        run(args.work, "native", "to-mindrecord", str(photos), "--out", str(args.work / "records"))
        print(json.dumps(measure(jobs(args.work, photos), args.count, args.rounds), indent=1))
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(args.work)


def install(folder: Path, *, libraries: bool) -> None:
    """Copy the package as a wheel installs it, with the libraries that are built beside it or without."""
    skip = shutil.ignore_patterns("__pycache__", *([] if libraries else ["*.so"]))
    for source, target in (("imnet_prep", ""), ("cli", "imnet_prep"), ("manifests", "imnet_prep")):
        shutil.copytree(ROOT / source, folder / target / source, ignore=skip)


def run(work: Path, name: str, *words: str) -> dict[str, Any]:
    """Run a command of one of the two copies to its end, and return its object."""
    paths = [str(work / name), *(path for path in sys.path if path.endswith("-packages"))]
    command = [sys.executable, "-S", "-P", "-m", "imnet_prep", *words, "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def jobs(work: Path, photos: Path) -> dict[str, Callable[[str], float]]:
    """Return the jobs, by name: each takes the name of a copy and returns images/s."""
    while not (work / "port").exists():
        time.sleep(0.05)
    address = f"http://127.0.0.1:{(work / 'port').read_text()}"
    urls = [f"{path.parent.name} {address}/{path.relative_to(photos)}\n" for path in sorted(photos.rglob("*.*"))]
    (work / "list.txt").write_text("".join(urls), encoding="utf-8")

    def out() -> str:
        return str(Path(tempfile.mkdtemp(prefix="out-", dir=work)) / "out")

    def download(name: str) -> float:
        words = ("--urls", str(work / "list.txt"), "--out", out(), "--allow-private", "--per-host", "64")
        done = run(work, name, "download", *words)
        assert done["ok"] == len(urls)
        return float(done["ok"] / done["seconds"])

    def convert(name: str, *more: str) -> float:
        done = run(work, name, "to-mindrecord", str(photos), "--out", out(), *more)
        return float(done["images_per_s"])

    def batches(name: str) -> float:
        return float(run(work, name, "bench", str(work / "records"), "--seconds", "5")["images_per_s"])

    return {
        "download": download,
        "convert": convert,
        "convert_256": lambda name: convert(name, "--short-side", "256"),
        "batches": batches,
    }


def measure(found: dict[str, Callable[[str], float]], count: int, rounds: int) -> dict[str, Any]:
    """Run each job with both copies in turn; return medians, spreads and ratios."""
    rates: dict[str, dict[str, list[float]]] = {job: {name: [] for name in COPIES} for job in found}
    cpu_s: dict[str, dict[str, list[float]]] = {job: {name: [] for name in COPIES} for job in found}
    for number in range(rounds + 1):
        for job, work in found.items():
            for name in COPIES:
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                rate = work(name)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                print(f"round {number} {job} {name}: {rate:.1f} images/s, {cpu:.1f} s", file=sys.stderr, flush=True)
                if number:
                    rates[job][name].append(rate)
                    cpu_s[job][name].append(cpu)

    def middle(values: dict[str, list[float]]) -> dict[str, float]:
        return {name: statistics.median(some) for name, some in values.items()}

    result: dict[str, Any] = {}
    for job in found:
        middle_rate, middle_cpu = middle(rates[job]), middle(cpu_s[job])
        result[job] = {
            "images_per_s": {name: round(value, 1) for name, value in middle_rate.items()},
            "spread": {name: [round(min(some), 1), round(max(some), 1)] for name, some in rates[job].items()},
            "ratio": round(middle_rate["native"] / middle_rate["plain"], 2),
        }
        if job != "batches":  # which runs for a time, not for a number of images
            result[job]["cpu_ratio"] = round(middle_cpu["plain"] / middle_cpu["native"], 2)
    machine = {"cores": cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    return {**result, **machine, "count": count, "rounds": rounds}


if __name__ == "__main__":
    main()
