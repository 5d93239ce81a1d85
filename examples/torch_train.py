"""Train torchvision's MobileNetV2 on records, with PyTorch. To resume, run the same command again.

Commands::

    python examples/torch_train.py records --out torch-run --epochs 90
    torchrun --nproc-per-node 2 examples/torch_train.py records --out torch-run --epochs 90

On a CPU, a run that was killed ends in the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torchvision.models import mobilenet_v2

from imnet_prep import EvalOptions, TrainOptions
from imnet_prep.loader.torch import TorchLoader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, 0 to 1
WARM_UP_FRAC = 0.05


class Normalised(nn.Module):
    """A network that takes the loader's bytes: the host ships a quarter of what float32 would be."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images.float() - self.mean) / self.std)


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: a linear warm-up, then a cosine to zero."""
    warm_up = int(WARM_UP_FRAC * steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key the draws of dropout by the step, so that a checkpoint need not hold the state of any generator."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


class Run:
    """A network in training, on one of several ranks."""

    def __init__(self, options: argparse.Namespace, data: TorchLoader, device: torch.device) -> None:
        torch.manual_seed(options.seed)  # of the weights to begin with
        self.options, self.data, self.device = options, data, device
        self.rank, self.ranks = data.batches.loading.rank, data.batches.loading.ranks
        self.last = options.out / "last.pt"
        self.net = Normalised(mobilenet_v2(num_classes=len(data.batches.class_names)))
        self.net.to(device, memory_format=torch.channels_last)
        self.learner = nn.parallel.DistributedDataParallel(self.net) if self.ranks > 1 else self.net
        self.optimizer = torch.optim.SGD(self.net.parameters(), options.lr, momentum=0.9, weight_decay=4e-5)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def resume(self) -> None:
        """Go on where the last checkpoint was written, if there is one."""
        if self.last.exists():
            parts = torch.load(self.last, map_location=self.device)
            for name in ("net", "optimizer", "data"):
                getattr(self, name).load_state_dict(parts[name])

    def save(self) -> None:
        """Write a checkpoint; a run that is killed meanwhile keeps the one before."""
        if self.rank == 0:
            partial = self.last.with_suffix(".partial")
            torch.save({name: getattr(self, name).state_dict() for name in ("net", "optimizer", "data")}, partial)
            partial.replace(self.last)

    def epoch(self) -> float:
        """Train to the end of the epoch that is under way; return the seconds in which it waited for data."""
        waited_s, ready = 0.0, time.perf_counter()
        for images, labels in self.data:
            waited_s += time.perf_counter() - ready
            step = self.data.epoch * len(self.data) + self.data.step - 1
            seed_step(self.options.seed, step, self.rank)
            self.optimizer.param_groups[0]["lr"] = rate(step, self.options.epochs * len(self.data), self.options.lr)
            logits = self.learner(images.to(self.device, non_blocking=True))
            self.optimizer.zero_grad()
            self.loss(logits, labels.to(self.device, non_blocking=True)).backward()
            self.optimizer.step()
            if self.data.step % self.options.save_every == 0:
                self.save()
            ready = time.perf_counter()
        return waited_s

    def evaluate(self, data: TorchLoader) -> float:
        """Return the top-1 accuracy over the records of all ranks."""
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        if self.ranks > 1:
            for buffer in self.net.buffers():  # each rank has statistics of its own since the last step
                distributed.broadcast(buffer, 0)
        self.net.eval()
        with torch.inference_mode():
            for images, labels in data:
                guesses = self.net(images.to(self.device, non_blocking=True)).argmax(1)
                right += (guesses == labels.to(self.device, non_blocking=True)).sum()
        self.net.train()
        if self.ranks > 1:
            distributed.all_reduce(right)  # a count: the ranks have not as many images
        return int(right) / data.batches.images


def train(options: argparse.Namespace, device: torch.device) -> float:
    """Train, evaluate after each epoch, print, and return the accuracy."""
    size = options.image_size
    with (
        TorchLoader(options.records, "train", TrainOptions(options.batch_size, size), options.seed) as data,
        TorchLoader(options.records, "val", EvalOptions(options.batch_size, size)) as val,
    ):
        run = Run(options, data, device)
        run.resume()
        if data.epoch >= options.epochs:
            return run.evaluate(val)
        while data.epoch < options.epochs:
            began, images = time.perf_counter(), (len(data) - data.step) * options.batch_size * run.ranks
            waited_s = run.epoch()
            seconds = time.perf_counter() - began
            run.save()
            top1 = run.evaluate(val)
            if run.rank == 0:
                speed = f"{images / seconds:.1f} images/s, {waited_s / seconds:.1%} of the time waiting for data"
                print(f"epoch {data.epoch} of {options.epochs}: top-1 {top1:.3f}, {speed}", flush=True)
        return top1


def main(arguments: list[str] | None = None) -> float:
    """Train as the command line says, and return the accuracy."""
    parser = argparse.ArgumentParser(description="Train torchvision's MobileNetV2 on records.")
    parser.add_argument("records", type=Path)
    parser.add_argument("--out", type=Path, default=Path("torch-run"))
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=64, help="of each rank")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ranks > 1:
        distributed.init_process_group()
    try:
        return train(options, device)
    finally:
        if ranks > 1:
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
