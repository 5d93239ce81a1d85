"""MobileNetV2 on this CPU: our operators, MindSpore's own, and PyTorch in both layouts, alternating in one run.

Command (torch in a virtual environment of its own, see requirements.txt)::

    python -m benchmarks.train_cpu --torch /tmp/bench-venv --rounds 5 --json out.json
    python -m benchmarks.train_cpu --torch /tmp/bench-venv --only train-64 --rounds 5
    python -m benchmarks.train_cpu --torch /tmp/bench-venv --epoch tiny-imagenet-10

Each round runs every contender once, in a process of its own; the medians over the rounds count. A step is uint8 batch
in, normalisation, forward, backward, SGD with momentum; compilation and warm-up are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("torch_worker.py")
OURS, STANDARD, NCHW, CHANNELS_LAST = "ours", "ours, standard operators", "PyTorch NCHW", "PyTorch channels_last"


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table: what is run, and how many measured steps."""

    name: str
    mode: str
    image_size: int
    batch_size: int
    steps: int
    standard_steps: int  # of the slow contender


CASES = (
    Case("train-224", "train", 224, 32, 8, 2),
    Case("train-64", "train", 64, 64, 20, 3),
    Case("eval-224", "eval", 224, 32, 15, 3),
    Case("eval-64", "eval", 64, 64, 40, 3),
)


def run_json(command: Sequence[str]) -> dict[str, Any]:
    """The last line of a command's output, as JSON."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def ours(case: Case, kernels: str) -> dict[str, Any]:
    """`mbv2.bench` in a process of its own."""
    steps = case.steps if kernels == "native" else case.standard_steps
    code = (
        "import dataclasses, json; from mbv2.bench import BenchOptions, bench;"
        f"print(json.dumps(dataclasses.asdict(bench(BenchOptions(mode={case.mode!r}, batch_size={case.batch_size},"
        f" image_size={case.image_size}, steps={steps}, kernels={kernels!r})))))"
    )
    return run_json([sys.executable, "-c", code])


def torch(venv: Path, case: Case, layout: str) -> dict[str, Any]:
    """PyTorch's worker in its virtual environment."""
    options = {
        "--mode": case.mode,
        "--layout": layout,
        "--image-size": case.image_size,
        "--batch-size": case.batch_size,
        "--steps": case.steps,
        "--threads": threads(),
    }
    flat = [str(word) for pair in options.items() for word in pair]
    return run_json([str(venv / "bin/python"), str(WORKER), "steps", *flat])


def threads() -> int:
    return len(os.sched_getaffinity(0))


def contenders(venv: Path, case: Case, *, standard: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        OURS: lambda: ours(case, "native"),
        NCHW: lambda: torch(venv, case, "contiguous"),
        CHANNELS_LAST: lambda: torch(venv, case, "channels_last"),
    }
    if standard:
        runs[STANDARD] = lambda: ours(case, "standard")
    return runs


def measure(venv: Path, case: Case, rounds: int, standard_rounds: int) -> dict[str, Any]:
    """Alternate the contenders, and give each one's median, extremes and our ratio to it."""
    rates: dict[str, list[float]] = {}
    last: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name, run in contenders(venv, case, standard=number < standard_rounds).items():
            last[name] = run()
            rates.setdefault(name, []).append(last[name]["images_per_s"])
            print(f"{case.name} round {number + 1}/{rounds} {name}: {rates[name][-1]:.1f} images/s", file=sys.stderr)
    median = {name: statistics.median(values) for name, values in rates.items()}
    result: dict[str, Any] = {
        "case": case.name,
        "images_per_s": {
            n: {"median": median[n], "min": min(v), "max": max(v), "rounds": len(v)} for n, v in rates.items()
        },
        "ratio_of_ours": {name: median[OURS] / value for name, value in median.items() if name != OURS},
        "compile_s": last[OURS]["compile_s"],
        "kernels": last[OURS]["kernels"],
        "torch": last[NCHW]["torch"],
    }
    return result


def epoch(venv: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """One epoch of a Tiny-ImageNet folder at 64 px, batch 64, with augmentation: `mbv2 train` against torchvision."""
    scripts = Path(sys.executable).parent
    ours_rate: list[float] = []
    theirs: dict[str, list[float]] = {"contiguous": [], "channels_last": []}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        subprocess.run(
            [scripts / "imnet-prep", "to-mindrecord", folder, "--out", work / "records"], check=True, stdout=sys.stderr
        )
        for number in range(rounds):
            command = [
                scripts / "mbv2",
                "train",
                "--records",
                work / "records",
                "--out",
                work / f"run{number}",
                "--json",
            ]
            command += ["--image-size", "64", "--batch-size", "64", "--epochs", "2"]
            ours_rate.append(run_json([str(word) for word in command])["images_per_s"])
            for layout, rates in theirs.items():
                options = [
                    "--folder",
                    str(folder / "train"),
                    "--layout",
                    layout,
                    "--image-size",
                    "64",
                    "--batch-size",
                    "64",
                ]
                worker = [str(venv / "bin/python"), str(WORKER), "epoch", *options, "--threads", str(threads())]
                rates.append(run_json(worker)["images_per_s"])
            print(f"epoch round {number + 1}: ours {ours_rate[-1]:.0f}, PyTorch {theirs}", file=sys.stderr)
    best = max(statistics.median(rates) for rates in theirs.values())
    ours_median = statistics.median(ours_rate)
    return {
        "case": "epoch-64",
        "ours": ours_rate,
        "torch": theirs,
        "ratio_of_ours": {"PyTorch's best": ours_median / best},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """A table for the docs."""
    lines = [
        f"| | {OURS} | {STANDARD} | {NCHW} | {CHANNELS_LAST} | ours / PyTorch's best |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        rates = result["images_per_s"]
        cells = [
            f"{rates[name]['median']:.1f}" if name in rates else "" for name in (OURS, STANDARD, NCHW, CHANNELS_LAST)
        ]
        best = max(rates[NCHW]["median"], rates[CHANNELS_LAST]["median"])
        lines.append(f"| {result['case']} | {' | '.join(cells)} | **{rates[OURS]['median'] / best:.2f}** |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, required=True, help="virtual environment with torch and torchvision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--standard-rounds", type=int, default=1, help="rounds of the slow contender")
    parser.add_argument("--only", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--epoch", type=Path, help="a folder in Tiny-ImageNet's layout: measure an epoch of it instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.epoch:
        result = epoch(args.torch, args.epoch, args.rounds)
        print(json.dumps(result, indent=1))
        return
    cases = [case for case in CASES if not args.only or case.name in args.only]
    results = [measure(args.torch, case, args.rounds, args.standard_rounds) for case in cases]
    machine = {
        "machine": platform.processor() or platform.machine(),
        "threads": threads(),
        "python": platform.python_version(),
    }
    if args.json:
        args.json.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(machine))
    print(table(results))


if __name__ == "__main__":
    main()
