"""MobileNetV2 on this CPU: our operators, PyTorch at its best, ONNX Runtime, and MindSpore's own operators.

Commands::

    python -m benchmarks.train_cpu
    python -m benchmarks.train_cpu --only train-64 --rounds 7
    python -m benchmarks.train_cpu --only train-224 --standard
    python -m benchmarks.train_cpu --epoch tiny-imagenet-10 --rounds 3
    python -m benchmarks.train_cpu --accuracy tiny-imagenet-10 --seeds 0 1 2 --epochs 20

A training step is uint8 batch in, normalisation, forward, backward, SGD with momentum; inference is uint8 batch in,
logits out. Each contender is a process that compiles and warms up before the first round. PyTorch runs in
channels_last, with huge pages for its memory as ours has (`THP_MEM_ALLOC_ENABLE`). `--standard` adds MindSpore's own
operators, in our model and as mindcv builds the network (`plain_mobilenet.py`): about 30 times slower.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import Contender, together
from benchmarks.photographs import CACHE
from benchmarks.rounds import ROUNDS, Result, compare
from benchmarks.setting import Setting, parser, run
from benchmarks.train_folder import HUGE_PAGES, accuracy, epoch
from imnet_prep.cpu import cpu_count

OURS = "ours, float32"
COMPILED = {"TORCHINDUCTOR_CACHE_DIR": str(CACHE.absolute() / "inductor")}  # what was compiled once


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: what is run, and how many steps are measured a round."""

    name: str
    mode: str
    image_size: int
    batch_size: int
    steps: int

    @property
    def title(self) -> str:
        """What is measured, in words."""
        what = "a whole training step" if self.mode == "train" else "inference"
        return f"MobileNetV2 1.0, {what}, {self.image_size} px, batch {self.batch_size}; compilation left out"


CASES = (
    Case("train-224", "train", 224, 32, 3),
    Case("train-64", "train", 64, 64, 8),
    Case("eval-224", "eval", 224, 32, 6),
    Case("eval-64", "eval", 64, 64, 20),
)
DEFAULT = ("train-224", "train-64", "eval-224")


def contenders(case: Case, told: Setting, *, standard: bool) -> dict[str, Contender]:
    """Return the contenders of a case by name, ours first."""
    steps = 2 if told.short else case.steps
    words = ["--mode", case.mode, "--image-size", case.image_size, "--batch-size", case.batch_size]

    def ours(kind: str, steps: int, *more: str) -> Contender:
        return Contender(sys.executable, "step_worker", kind, *words, "--steps", steps, *more)

    found = {OURS: ours("native", 2 * steps)}
    found["ours, bfloat16"] = ours("native", 2 * steps, "--precision", "bfloat16")
    if case.mode == "eval":
        found["ONNX Runtime, float32"] = ours("onnx", steps)
    if told.peers:
        for precision in ("float32", "bfloat16"):
            for compiled in ("", "compiled"):
                name = ", ".join(filter(None, ("PyTorch", compiled, precision)))
                flags = ["--threads", cpu_count(), "--precision", precision, *(["--compile"] if compiled else [])]
                found[name] = Contender(
                    told.peers,
                    "torch_worker",
                    "steps",
                    *words,
                    "--steps",
                    steps,
                    *flags,
                    environment=HUGE_PAGES | COMPILED,
                )
    if standard:
        found["MindSpore's operators, our model"] = ours("standard", 1)
        if case.mode == "train":
            found["MindSpore's operators, as mindcv"] = ours("plain", 1)
    return found


def measure(told: Setting, only: tuple[str, ...] = DEFAULT, *, standard: bool = False) -> Iterator[Result]:
    """Measure the cases of the given names."""
    for case in CASES:
        if case.name in only:
            with together(contenders(case, told, standard=standard)) as ready:
                yield compare(case.name, case.title, ready, told.rounds, told.seed)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", choices=[case.name for case in CASES], action="append")
    options.add_argument("--standard", action="store_true", help="MindSpore's own operators as well")
    options.add_argument(
        "--epoch", type=Path, help="a folder in Tiny-ImageNet's layout: measure an epoch of it instead"
    )
    options.add_argument("--loading", type=int, nargs="+", default=[0, 1, 2], help="PyTorch's loading processes to try")
    options.add_argument("--accuracy", type=Path, help="such a folder: measure what both sides learn from it instead")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--work", type=Path, default=Path("build/train-cpu"), help="records and runs of these two")
    args = options.parse_args()
    if args.epoch:
        print(json.dumps(epoch(args.peers, args.epoch, args.rounds or ROUNDS, args.work, args.loading), indent=1))
    elif args.accuracy:
        print(json.dumps(accuracy(args.peers, args.accuracy, args.seeds, args.epochs, args.work), indent=1))
    else:
        only = tuple(args.only or DEFAULT)
        run(args, [lambda told: measure(told, only, standard=args.standard)])


if __name__ == "__main__":
    main()
