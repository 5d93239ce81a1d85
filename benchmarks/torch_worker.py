"""PyTorch's side of `train_cpu.py`, run in a virtual environment with torch and torchvision; imports nothing of ours.

Commands, one JSON line each on stdout::

    torch_worker.py steps --mode train --layout channels_last --image-size 224 --batch-size 32 --width 1.0 --steps 5
    torch_worker.py epoch --folder tiny-imagenet-10/train --layout contiguous --image-size 64 --batch-size 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Trainer:
    """MobileNetV2 with the optimiser and loss of the other contenders."""

    def __init__(self, *, layout: str, width: float, classes: int) -> None:
        torch.manual_seed(0)
        self.layout = LAYOUTS[layout]
        self.net = torchvision.models.mobilenet_v2(num_classes=classes, width_mult=width).to(memory_format=self.layout)
        self.loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        decayed = [p for p in self.net.parameters() if p.ndim > 1]
        plain = [p for p in self.net.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 4e-5}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        self.mean = torch.tensor(MEAN).view(1, 3, 1, 1) * 255
        self.scale = 1 / (torch.tensor(STD).view(1, 3, 1, 1) * 255)

    def input(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 3, H, W) in any layout, normalised, in the contender's layout."""
        return ((image.float() - self.mean) * self.scale).contiguous(memory_format=self.layout)

    def step(self, image: torch.Tensor, label: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.net(self.input(image)), label)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def timed(run: Callable[[], object], warm_up: int, steps: int) -> list[float]:
    """Seconds of each measured call."""
    times = []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[warm_up:]


def steps(args: argparse.Namespace) -> dict[str, object]:
    trainer = Trainer(layout=args.layout, width=args.width, classes=1000)
    size = (args.batch_size, args.image_size, args.image_size, 3)
    image = torch.randint(0, 256, size, dtype=torch.uint8).permute(0, 3, 1, 2)  # as a pipeline gives it
    label = torch.randint(0, 1000, (args.batch_size,))
    if args.mode == "train":
        trainer.net.train()
        times = timed(lambda: trainer.step(image, label), 2, args.steps)
    else:
        trainer.net.eval()
        with torch.inference_mode():
            times = timed(lambda: trainer.net(trainer.input(image)), 2, args.steps)
    return {"images_per_s": args.batch_size / statistics.median(times), "step_ms": statistics.median(times) * 1e3}


def epoch(args: argparse.Namespace) -> dict[str, object]:
    """Two epochs over a folder with torchvision's v2 transforms; the second, with workers running, counts."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(args.image_size, scale=(0.25, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    data = torchvision.datasets.ImageFolder(str(args.folder), transform)
    loader = torch.utils.data.DataLoader(
        data,
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    trainer = Trainer(layout=args.layout, width=args.width, classes=len(data.classes))
    trainer.net.train()
    for _ in range(2):
        start = time.perf_counter()
        images = 0
        for image, label in loader:
            trainer.step(image, label)
            images += len(image)
        seconds = time.perf_counter() - start
    return {"images_per_s": images / seconds, "epoch_s": seconds, "images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("steps", "epoch"))
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="channels_last")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = steps(args) if args.command == "steps" else epoch(args)
    print(json.dumps({**result, "torch": torch.__version__, "torchvision": torchvision.__version__}))


if __name__ == "__main__":
    main()
