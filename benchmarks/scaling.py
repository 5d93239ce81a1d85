"""How training, loading and conversion grow with the number of cores, and what that says of more.

Command::

    python -m benchmarks.scaling --cores 1 2
    python -m benchmarks.scaling --cores 1 2 4 8 16 32 64

Ours runs at every number of cores, which take turns under the rules of `rounds.py`. Amdahl's law is fitted to the
figures: an image costs ``serial_ms + parallel_ms / cores``, by least squares of relative errors. `predicted` is what it
says of more cores: an upper bound, as nothing in it knows of memory bandwidth. `copy` is that bandwidth: GB/s read and
written by a copy on each core. docs/scaling.md has the model.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.contenders import Contender, on_cores, serve, together
from benchmarks.convert import FEW, SHARDS, beyond_a_few, ours
from benchmarks.kernel_limits import copy_rate
from benchmarks.pipeline import prepare
from benchmarks.rounds import RATE, Measure, Result, compare
from benchmarks.setting import Setting, machine, parser, setting

PREDICTED = (1, 2, 4, 8, 16, 32, 64)
COUNT, SHORT_COUNT = 8000, 1000
STEP = ("native", "--mode", "train", "--image-size", 224, "--batch-size", 32, "--steps", 4)


def measure(told: Setting, cores: Sequence[int]) -> list[Result]:
    """Measure ours at each number of cores."""
    rules = (told.rounds, told.seed)
    names = {number: f"{number} core{'s' if number > 1 else ''}" for number in cores}
    originals = prepare(told)["originals"]

    def loading(number: int) -> Contender:
        words = ("--root", originals, "--mode", "train", "--threads", number, "--seconds", 2)
        return Contender(sys.executable, "loaders", "ours", *words, cores=number)

    kinds: dict[str, tuple[str, Callable[[int], Contender]]] = {
        "copy": ("copies of memory, read and written", lambda n: contender("scaling", "--copy", cores=n)),
        "load": ("training batches at 224 px", loading),
        "train": ("a training step at 224 px, batch 32", lambda n: contender("step_worker", *STEP, cores=n)),
    }
    results = []
    for kind, (title, started) in kinds.items():
        with together({name: started(number) for number, name in names.items()}) as ready:
            unit = "GB/s" if kind == "copy" else "images/s"
            results.append(compare(kind, title, ready, *rules, unit=unit))
    count = SHORT_COUNT if told.short else COUNT
    folder, few = told.photos.write(told.work / "photos", count), told.photos.write(told.work / "few", FEW)
    runs: dict[str, Measure] = {}
    for number, name in names.items():
        convert = functools.partial(ours, before=on_cores(number))
        runs[name] = functools.partial(beyond_a_few, convert, told.work, folder, few, count)
    title = f"{count} photographs to {SHARDS} shards; fixed costs left out"
    results.append(compare("convert", title, runs, *rules, warm_up=True))
    return results


def contender(module: str, *words: object, cores: int) -> Contender:
    """Return a contender of ours on so many cores."""
    return Contender(sys.executable, module, *words, cores=cores)


def fit(cores: Sequence[int], rates: Sequence[float]) -> dict[str, Any]:
    """Fit Amdahl's law.

    Args:
        cores: Two numbers of cores or more.
        rates: Images/s at each.
    """
    cost_ms = 1000 / np.asarray(rates)
    terms = np.stack([np.ones(len(cores)), 1 / np.asarray(cores)], axis=1)
    serial, parallel = np.linalg.lstsq(terms / cost_ms[:, None], np.ones(len(cores)), rcond=None)[0]
    predicted = {str(number): round(1000 / (serial + parallel / number)) for number in PREDICTED} if serial > 0 else {}
    return {"serial_ms": round(float(serial), 4), "parallel_ms": round(float(parallel), 3), "predicted": predicted}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="two numbers or more")
    options.add_argument("--copy", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.copy:
        serve(lambda: lambda: {RATE: copy_rate()})
    found: dict[str, Any] = {"machine": machine()}
    with setting(args) as told:
        for result in measure(told, args.cores):
            print(f"{result.table()}\n", file=sys.stderr, flush=True)
            found[result.name] = result.to_json()
            if result.name != "copy":
                found[result.name] |= fit(args.cores, [line.median for line in result.lines])
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
