"""PyTorch's side of `train_cpu.py`, run in a virtual environment with torch and torchvision; imports nothing of ours.

The command `steps` serves (`contenders.py`); `train` prints one JSON line::

    python -m benchmarks.torch_worker steps --mode train --image-size 224 --batch-size 32 --steps 5 --threads 2
    python -m benchmarks.torch_worker train --folder tiny-imagenet-10 --layout contiguous --image-size 64 --epochs 20

For `gradients`, see `gradients.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from benchmarks.contenders import serve, step_rate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Trainer:
    """MobileNetV2 with the optimiser and loss of the other contenders: no weight decay on BatchNorm and biases."""

    def __init__(self, *, layout: str, width: float, classes: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
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

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.loss(self.net(self.input(image)), label)

    def update(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def steps(args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Build the network, compile it if asked to, warm up, and return what measures some steps."""
    bfloat16 = args.precision == "bfloat16"
    trainer = Trainer(layout=args.layout, width=args.width, classes=1000)
    size = (args.batch_size, args.image_size, args.image_size, 3)
    image = torch.randint(0, 256, size, dtype=torch.uint8).permute(0, 3, 1, 2)  # as a pipeline gives it
    label = torch.randint(0, 1000, (args.batch_size,))
    trainer.net.train(args.mode == "train")
    if args.compile:
        torch._inductor.config.freezing = args.mode == "eval"  # weights become constants; BatchNorm is folded
        trainer.net = torch.compile(trainer.net)

    def run() -> None:
        if args.mode == "train":
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = trainer.forward(image, label)
            trainer.update(loss)
        else:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                trainer.net(trainer.input(image))

    def measure() -> dict[str, float]:
        return step_rate(run, args.steps, args.batch_size)

    for _ in range(3):  # compilation, and a warm-up
        run()
    return measure


class Validation(torch.utils.data.Dataset):
    """The validation images of a folder in Tiny-ImageNet's layout, each once, with labels in the order of `classes`."""

    def __init__(self, folder: Path, classes: list[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        rows = [line.split("\t") for line in (folder / "val_annotations.txt").read_text(encoding="ascii").splitlines()]
        self.items = [(folder / "images" / row[0], classes.index(row[1])) for row in rows]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.items[index]
        return self.transform(Image.open(path).convert("RGB")), label


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the run, then cosine to zero."""
    warm_up = int(0.1 * steps)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def score(trainer: Trainer, loader: torch.utils.data.DataLoader) -> float:
    """Top-1 over the whole loader."""
    trainer.net.eval()
    right = 0
    with torch.inference_mode():
        for image, label in loader:
            right += int((trainer.net(trainer.input(image)).argmax(1) == label).sum())
    trainer.net.train()
    return right / len(loader.dataset)


def train(args: argparse.Namespace) -> dict[str, object]:
    """Train on a folder with torchvision's v2 transforms; the pace of the last epoch, with workers running, counts."""
    size = args.image_size
    crop = v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True)
    data = torchvision.datasets.ImageFolder(
        str(args.folder / "train"), v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    )
    central = v2.Compose([v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
    held_out = torch.utils.data.DataLoader(Validation(args.folder / "val", data.classes, central), args.batch_size)
    trainer = Trainer(layout=args.layout, width=args.width, classes=len(data.classes), seed=args.seed)
    loader = torch.utils.data.DataLoader(
        data,
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    trainer.net.train()
    curve, step = [], 0
    for epoch in range(args.epochs):
        start = time.perf_counter()
        loss = 0.0
        for image, label in loader:
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate(step, args.epochs * len(loader), args.lr)
            loss += trainer.update(trainer.forward(image, label)) / len(loader)
            step += 1
        seconds = time.perf_counter() - start
        curve.append({"epoch": epoch + 1, "train_loss": loss, "seconds": seconds})
        if args.score:
            curve[-1]["top1"] = score(trainer, held_out)
        print(json.dumps(curve[-1]), file=sys.stderr, flush=True)
    images = len(loader) * args.batch_size
    return {"images_per_s": images / seconds, "epoch_s": seconds, "images": images, "curve": curve}


def gradients(folder: Path, precision: str) -> None:
    """The loss's gradients at the weights and images of a folder, to ``torch-PRECISION.npz``."""
    kind = torch.float64 if precision == "float64" else torch.float32
    weights, batch = np.load(folder / "weights.npz"), np.load(folder / "images.npz")
    trainer = Trainer(layout="contiguous", width=1.0, classes=len(weights["classifier.1.bias"]))
    counted = {name: value for name, value in trainer.net.state_dict().items() if name.endswith("num_batches_tracked")}
    trainer.net.load_state_dict(counted | {name: torch.tensor(weights[name]) for name in weights.files})
    trainer.net.classifier[0] = torch.nn.Identity()
    trainer.net.to(kind)
    image = (torch.tensor(batch["image"]).permute(0, 3, 1, 2) - trainer.mean.to(kind)) * trainer.scale.to(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        loss = trainer.loss(trainer.net(image), torch.tensor(batch["label"]).long())
    loss.backward()
    np.savez(folder / f"torch-{precision}.npz", **{name: p.grad.numpy() for name, p in trainer.net.named_parameters()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("steps", "train", "gradients"))
    parser.add_argument("--mode", choices=("train", "eval"), default="train")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="channels_last")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile, with frozen weights for inference")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="train: a folder in Tiny-ImageNet's layout")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", action="store_true", help="top-1 on the validation images after each epoch")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    if args.precision == "float64" and args.command != "gradients":
        parser.error("--precision float64 is for gradients")
    torch.set_num_threads(args.threads)
    if args.command == "steps":
        serve(lambda: steps(args))
    if args.command == "gradients":
        gradients(args.folder, args.precision)
        return
    print(json.dumps({**train(args), "torch": torch.__version__, "torchvision": torchvision.__version__}))


if __name__ == "__main__":
    main()
