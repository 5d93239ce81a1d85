"""Both kinds of operators on the same weights, at states of a training run on standard operators.

Command::

    python -m benchmarks.step_states --images ../shared/data/tiny-imagenet-10.tar --states 20

At each state: the relative difference of the loss, and of each gradient tensor in norm (median and largest), of our
operators against the standard ones; and, as the measure of what single precision leaves undecided, of the standard ones
against themselves with every weight moved by up to 1e-6 of itself, about what rounding makes of a sum of some hundred
products.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.runtime import start_mindspore

Weights = list[NDArray[np.float32]]


def read_images(path: Path, limit: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Training images (N, 64, 64, 3) of a Tiny-ImageNet tar, and labels in order of appearance."""
    classes: dict[str, int] = {}
    images, labels = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            parts = member.name.split("/")
            if "train" not in parts or not member.name.endswith(".JPEG"):
                continue
            handle = tar.extractfile(member)
            assert handle is not None
            images.append(np.asarray(Image.open(io.BytesIO(handle.read())).convert("RGB")))
            labels.append(classes.setdefault(parts[-3], len(classes)))
            if len(images) == limit:
                break
    return np.stack(images), np.array(labels, np.int32)


def errors(got: Sequence[Any], expected: Sequence[Any]) -> tuple[float, float]:
    """Median and largest relative difference in norm, without tensors that are rounding alone."""
    norms = [float(np.linalg.norm(e.asnumpy())) for e in expected]
    pairs = zip(got, expected, norms, strict=True)
    found = [float(np.linalg.norm(g.asnumpy() - e.asnumpy())) / n for g, e, n in pairs if n > 1e-5 * max(norms)]
    return float(np.median(found)), max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("../shared/data/tiny-imagenet-10.tar"))
    parser.add_argument("--states", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="steps between two states")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()
    start_mindspore("CPU")
    import mindspore as ms
    from mindspore import nn, ops

    from mbv2.model import MobileNetV2, ModelConfig

    class LossGradient(nn.Cell):  # type: ignore[misc]
        def __init__(self, net: MobileNetV2) -> None:
            super().__init__(auto_prefix=False)
            self.net = net
            self.gradient = ops.value_and_grad(self.loss, None, ms.ParameterTuple(net.trainable_params()))

        def loss(self, image: ms.Tensor, label: ms.Tensor) -> ms.Tensor:
            return ops.cross_entropy(self.net(image), label, label_smoothing=0.1)

        def construct(self, image: ms.Tensor, label: ms.Tensor) -> Any:
            return self.gradient(image, label)

    images, labels = read_images(args.images, 5000)
    random = np.random.default_rng(0)
    ms.set_seed(0)
    config = ModelConfig(int(labels.max()) + 1, width=args.width)
    standard, native = (MobileNetV2(config, kernels=kind) for kind in ("standard", "native"))
    steps = [LossGradient(net) for net in (standard, native)]
    for net in (standard, native):
        net.set_train(True)

    def values() -> Weights:
        return [parameter.asnumpy().copy() for parameter in standard.get_parameters()]

    def load(net: MobileNetV2, weights: Weights) -> None:
        for parameter, weight in zip(net.get_parameters(), weights, strict=True):
            parameter.set_data(ms.Tensor(weight))

    velocity = [np.zeros(parameter.shape, np.float32) for parameter in standard.trainable_params()]
    for step in range(args.states * args.every):
        chosen = random.integers(0, len(images), args.batch_size)
        batch = ms.Tensor(images[chosen]), ms.Tensor(labels[chosen])
        before = values()
        loss, gradients = steps[0](*batch)
        after = values()
        if step % args.every == 0:
            load(native, before)
            native_loss, native_gradients = steps[1](*batch)
            nudged = [w * (1 + random.uniform(-1e-6, 1e-6, w.shape).astype(np.float32)) for w in before]
            load(standard, nudged)
            nudged_gradients = steps[0](*batch)[1]
            load(standard, after)
            median, largest = errors(native_gradients, gradients)
            own_median, own_largest = errors(nudged_gradients, gradients)
            row = {
                "step": step,
                "loss": float(loss),
                "loss_difference": float(native_loss) / float(loss) - 1,
                "gradient_median": median,
                "gradient_largest": largest,
                "standard_nudged_median": own_median,
                "standard_nudged_largest": own_largest,
            }
            print(json.dumps(row), flush=True)
        rate = args.lr * min(1.0, (step + 1) / 20)
        for parameter, gradient, speed in zip(standard.trainable_params(), gradients, velocity, strict=True):
            np.add(0.9 * speed, gradient.asnumpy(), out=speed)
            parameter.set_data(ms.Tensor(parameter.asnumpy() - rate * speed))


if __name__ == "__main__":
    main()
