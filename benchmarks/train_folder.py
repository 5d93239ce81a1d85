"""Training on a folder in Tiny-ImageNet's layout, ours beside PyTorch: the pace of an epoch, and what is learned.

Run by `train_cpu.py` (`--epoch`, `--accuracy`). Both sides follow the recipe `tiny`: 64 px, batch 64, SGD with momentum
0.9, peak rate 0.05 after a linear warm-up over a tenth of the run, cosine to zero, weight decay 4e-5 (not on BatchNorm
and biases), label smoothing 0.1, dropout 0.2, RandomResizedCrop of 0.25-1 and flip; scored at short side 73, centre 64.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import ROOT, output_of, run_json
from imnet_prep.cpu import cpu_count
from mbv2.show.curves import Line, draw_panels
from mbv2.training.logs import read_metrics

SIZES = {"--image-size": 64, "--batch-size": 64}
LAYOUTS = ("contiguous", "channels_last")
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # for PyTorch's memory, as ours has them
COLOURS = {"ours": "#1f6fb4", "PyTorch": "#d1495b"}


def make_records(folder: Path, work: Path) -> Path:
    """Convert the folder, or find it converted: a run that goes on keeps its records."""
    records = work / "records"
    if (records / "manifest.json").exists():
        return records
    command = [Path(sys.executable).parent / "imnet-prep", "to-mindrecord", folder, "--out", records]
    output_of(command)
    return records


def train_ours(records: Path, out: Path, epochs: int, seed: int) -> dict[str, Any]:
    """`mbv2 train` with the recipe `tiny`."""
    command: list[object] = [Path(sys.executable).parent / "mbv2", "train", "--records", records, "--out", out]
    command += ["--recipe", "tiny", "--epochs", epochs, "--seed", seed, "--json"]
    return run_json([str(word) for word in command])


def train_torch(venv: Path, folder: Path, layout: str, workers: int, epochs: int, *flags: str) -> dict[str, Any]:
    """torchvision's model and transforms in PyTorch."""
    options = {"--threads": cpu_count(), **SIZES, "--folder": folder, "--layout": layout}
    options |= {"--workers": workers, "--epochs": epochs}
    words = [str(word) for pair in options.items() for word in pair]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **HUGE_PAGES}
    return run_json([str(venv / "bin/python"), "-m", "benchmarks.torch_worker", "train", *words, *flags], environment)


def epoch(venv: Path, folder: Path, rounds: int, work: Path, loading: Sequence[int]) -> dict[str, Any]:
    """The pace of the second epoch, alternating; PyTorch in both layouts and with each number of `loading` processes.

    The first round tries all of PyTorch's settings; the later ones repeat the best of each layout.
    """
    records = make_records(folder, work)
    ours: list[float] = []
    theirs: dict[tuple[str, int], list[float]] = {}
    settings = [(layout, workers) for layout in LAYOUTS for workers in loading]
    for number in range(rounds):
        out = work / f"pace{number}"
        shutil.rmtree(out, ignore_errors=True)
        train_ours(records, out, 2, 0)
        ours.append(read_metrics(out)[-1].images_per_s)
        print(f"epoch round {number + 1}, ours: {ours[-1]:.0f} images/s", file=sys.stderr)
        for layout, workers in settings:
            pace = train_torch(venv, folder, layout, workers, 2)["images_per_s"]
            theirs.setdefault((layout, workers), []).append(pace)
            print(f"epoch round {number + 1}, PyTorch {layout}, {workers} workers: {pace:.0f}", file=sys.stderr)
        settings = [max(((name, w) for w in loading), key=lambda key: theirs[key][0]) for name in LAYOUTS]
    best = max(settings, key=lambda key: statistics.median(theirs[key]))
    return {
        "case": "epoch-64",
        "ours": ours,
        "torch": {f"{layout}, {workers} workers": paces for (layout, workers), paces in theirs.items()},
        "torch_best": f"{best[0]}, {best[1]} workers",
        "ratio_of_ours": statistics.median(ours) / statistics.median(theirs[best]),
    }


def accuracy(venv: Path, folder: Path, seeds: list[int], epochs: int, work: Path) -> dict[str, Any]:
    """Top-1 by epoch of each seed, alternating; each result is appended to ``results.jsonl`` as it comes.

    Called again on the same `work`, it goes on with the seeds that are missing. ``curves.png`` shows the means.
    """
    work.mkdir(parents=True, exist_ok=True)
    ledger = work / "results.jsonl"
    rows = [json.loads(line) for line in ledger.read_text("utf-8").splitlines()] if ledger.exists() else []
    done = {(row["contender"], row["seed"]) for row in rows if row["epochs"] == epochs}
    records = make_records(folder, work)
    for seed in seeds:
        for name in COLOURS:
            if (name, seed) in done:
                continue
            if name == "ours":
                out = work / f"seed{seed}"
                shutil.rmtree(out, ignore_errors=True)
                train_ours(records, out, epochs, seed)
                top1 = [row.val_top1 or 0.0 for row in read_metrics(out)]
            else:
                # One thread and no loading process: the least processor time, which is all that counts here.
                flags = ("--score", "--seed", str(seed), "--threads", "1")
                result = train_torch(venv, folder, "channels_last", 0, epochs, *flags)
                top1 = [row["top1"] for row in result["curve"]]
            rows.append({"contender": name, "seed": seed, "epochs": epochs, "top1": top1})
            with ledger.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(rows[-1]) + "\n")
            print(f"{name}, seed {seed}: top-1 {top1[-1]:.4f}, best epoch {max(top1):.4f}", file=sys.stderr, flush=True)
    return summary([row for row in rows if row["epochs"] == epochs and row["seed"] in seeds], work / "curves.png")


def summary(rows: list[dict[str, Any]], picture: Path) -> dict[str, Any]:
    """Mean top-1 of the last epoch and of the best one, and a picture of the mean curves."""
    result: dict[str, Any] = {"case": "accuracy-64"}
    lines = []
    for name, colour in COLOURS.items():
        curves = [row["top1"] for row in rows if row["contender"] == name]
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        lines.append(Line(name, colour, tuple((float(i + 1), value) for i, value in enumerate(mean))))
        result[name] = {
            "last": [curve[-1] for curve in curves],
            "last_mean": mean[-1],
            "best_mean": statistics.mean(max(curve) for curve in curves),
        }
    result["points_ahead"] = 100 * (result["ours"]["last_mean"] - result["PyTorch"]["last_mean"])
    counts = ", ".join(f"{len(result[name]['last'])} of {name}" for name in COLOURS)
    title = f"top-1, mean over seeds ({counts}), tiny-imagenet-10, 64 px"
    draw_panels(picture, [(lines, (0.0, 0.6))], title)
    return result
