"""MobileNetV2 on this CPU: our operators, MindSpore's own, and PyTorch in both layouts, alternating in one run.

MindSpore's own run twice: in our model (`kernels="standard"`), and in training as mindcv builds the network from
MindSpore's layers (`plain_mobilenet.py`).

Command (torch in a virtual environment of its own, see requirements.txt)::

    python -m benchmarks.train_cpu --torch /tmp/bench-venv --rounds 5 --json out.json
    python -m benchmarks.train_cpu --torch /tmp/bench-venv --only train-64 --rounds 5
    python -m benchmarks.train_cpu --torch /tmp/bench-venv --epoch tiny-imagenet-10 --rounds 3
    python -m benchmarks.train_cpu --torch /tmp/bench-venv --accuracy tiny-imagenet-10 --seeds 0 1 2 --epochs 20

Each round runs every contender once, in a process of its own; the medians over the rounds count. A step is uint8 batch
in, normalisation, forward, backward, SGD with momentum; compilation and warm-up are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import run_json, torch_worker
from benchmarks.train_folder import accuracy, epoch
from imnet_prep.cpu import cpu_count

OURS, STANDARD, NCHW, CHANNELS_LAST = "ours", "ours, standard operators", "PyTorch NCHW", "PyTorch channels_last"
PLAIN = "MindSpore's layers, as mindcv"
CONTENDERS = (OURS, STANDARD, PLAIN, NCHW, CHANNELS_LAST)


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


def ours(case: Case, kernels: str) -> dict[str, Any]:
    """`mbv2.bench` in a process of its own."""
    steps = case.steps if kernels == "native" else case.standard_steps
    code = (
        "import dataclasses, json; from mbv2.bench import BenchOptions, bench;"
        f"print(json.dumps(dataclasses.asdict(bench(BenchOptions(mode={case.mode!r}, batch_size={case.batch_size},"
        f" image_size={case.image_size}, steps={steps}, kernels={kernels!r})))))"
    )
    return run_json([sys.executable, "-c", code])


def plain(case: Case) -> dict[str, Any]:
    """`plain_mobilenet.py` in a process of its own."""
    options = {"--image-size": case.image_size, "--batch-size": case.batch_size, "--steps": case.standard_steps}
    words = [str(word) for pair in options.items() for word in pair]
    return run_json([sys.executable, "-m", "benchmarks.plain_mobilenet", *words])


def torch(venv: Path, case: Case, layout: str) -> dict[str, Any]:
    """PyTorch's worker in its virtual environment."""
    options = {
        "--mode": case.mode,
        "--layout": layout,
        "--image-size": case.image_size,
        "--batch-size": case.batch_size,
        "--steps": case.steps,
    }
    return torch_worker(venv, "steps", options)


def contenders(venv: Path, case: Case, *, standard: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        OURS: lambda: ours(case, "native"),
        NCHW: lambda: torch(venv, case, "contiguous"),
        CHANNELS_LAST: lambda: torch(venv, case, "channels_last"),
    }
    if standard:
        runs[STANDARD] = lambda: ours(case, "standard")
    if standard and case.mode == "train":
        runs[PLAIN] = lambda: plain(case)
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


def table(results: Sequence[dict[str, Any]]) -> str:
    """A table for the docs."""
    lines = [
        f"| | {' | '.join(CONTENDERS)} | ours / PyTorch's best | ours / standard | ours / as mindcv |",
        f"|---|{'---|' * (len(CONTENDERS) + 3)}",
    ]
    for result in results:
        rates = result["images_per_s"]
        cells = [f"{rates[name]['median']:.1f}" if name in rates else "" for name in CONTENDERS]
        best = max(rates[NCHW]["median"], rates[CHANNELS_LAST]["median"])
        ratios = result["ratio_of_ours"]
        cells += [f"**{rates[OURS]['median'] / best:.2f}**"]
        cells += [f"{ratios[name]:.2f}" if name in ratios else "" for name in (STANDARD, PLAIN)]
        lines.append(f"| {result['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, required=True, help="virtual environment with torch and torchvision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--standard-rounds", type=int, default=1, help="rounds of the slow contender")
    parser.add_argument("--only", choices=[case.name for case in CASES], action="append")
    parser.add_argument("--epoch", type=Path, help="a folder in Tiny-ImageNet's layout: measure an epoch of it instead")
    parser.add_argument("--loading", type=int, nargs="+", default=[0, 1, 2], help="PyTorch's loading processes to try")
    parser.add_argument("--accuracy", type=Path, help="such a folder: measure what both sides learn from it instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("build/train-cpu"), help="records and runs of these two")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.epoch or args.accuracy:
        if args.epoch:
            result = epoch(args.torch, args.epoch, args.rounds, args.work, args.loading)
        else:
            result = accuracy(args.torch, args.accuracy, args.seeds, args.epochs, args.work)
        print(json.dumps(result, indent=1))
        return
    cases = [case for case in CASES if not args.only or case.name in args.only]
    results = [measure(args.torch, case, args.rounds, args.standard_rounds) for case in cases]
    machine = {
        "machine": platform.processor() or platform.machine(),
        "threads": cpu_count(),
        "python": platform.python_version(),
    }
    if args.json:
        args.json.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(machine))
    print(table(results))


if __name__ == "__main__":
    main()
