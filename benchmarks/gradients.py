"""How far gradients are from exact, ours and PyTorch's, at the weights of a checkpoint of width 1.

Command::

    python -m benchmarks.gradients run/last.ckpt records --peers .venv-peers

takes the first 64 training images of seed 0, the loss with label smoothing 0.1 and no dropout, and prints JSON:
for each contender the norm of its gradient's difference from PyTorch's in double precision, as a share of that
gradient's norm.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.contenders import ROOT, output_of
from imnet_prep import TrainOptions, open_batches
from mbv2.network.model import MobileNetV2
from mbv2.recipe import Recipe
from mbv2.runtime import start_mindspore
from mbv2.training.step import TrainStep
from mbv2.weights.checkpoint import load_parameters, read_checkpoint
from mbv2.weights.names import source_name

IMAGES = 64
THEIRS = ("float64", "float32", "bfloat16")


def ours(checkpoint: Path, folder: Path, precision: str) -> None:
    """Our gradients at the images of `folder`, to ``ours-PRECISION.npz``, and the weights to ``weights.npz``."""
    import mindspore as ms

    found = read_checkpoint(checkpoint)
    net = MobileNetV2(found.meta.model_config(), precision=precision)
    load_parameters(net.get_parameters(), found.weights(), str(checkpoint))
    net.set_train(True)
    weights = {source_name("torchvision", name): value for name, value in found.weights().items()}
    np.savez(folder / "weights.npz", **weights)
    step = TrainStep(net, Recipe(), net.config.classes)
    batch = np.load(folder / "images.npz")
    image, label, ones = ms.Tensor(batch["image"]), ms.Tensor(batch["label"]), ms.Tensor(np.ones(IMAGES, np.float32))
    mask = ms.Tensor(np.ones((IMAGES, net.feature_count), np.float32))
    _, gradients = step.gradient(image, mask, label, label, ones, ms.Tensor(np.zeros(6, np.float32)))
    named = zip(step.trained, gradients, strict=True)
    np.savez(folder / f"ours-{precision}.npz", **{source_name("torchvision", p.name): g.asnumpy() for p, g in named})


def difference(folder: Path, name: str) -> float:
    """Of a contender's gradient from the exact one, as a share of the exact one's norm."""
    exact, found = np.load(folder / "torch-float64.npz"), np.load(folder / f"{name}.npz")
    wrong = sum(float(np.sum((found[key].astype(np.float64) - exact[key]) ** 2)) for key in exact.files)
    whole = sum(float(np.sum(exact[key] ** 2)) for key in exact.files)
    return float(np.sqrt(wrong / whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"))
    args = parser.parse_args()
    start_mindspore("CPU")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_batches(args.records, "train", TrainOptions(IMAGES, args.image_size)) as batches:
            batch = next(iter(batches))
            np.savez(folder / "images.npz", image=batch.image, label=batch.label.astype(np.int32))
        for precision in ("float32", "bfloat16"):
            ours(args.checkpoint, folder, precision)
        worker = [args.peers / "bin/python", "-m", "benchmarks.torch_worker", "gradients", "--folder", folder]
        for precision in THEIRS:
            output_of([*worker, "--precision", precision, "--threads", 1], {**os.environ, "PYTHONPATH": str(ROOT)})
        names = ["ours-float32", "torch-float32", "ours-bfloat16", "torch-bfloat16"]
        print(json.dumps({name: difference(folder, name) for name in names}, indent=1))


if __name__ == "__main__":
    main()
