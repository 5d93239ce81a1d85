"""Both kinds of operators on the same weights, at states of a training run on standard operators.

Command::

    python -m benchmarks.step_states --images ../shared/data/tiny-imagenet-10.tar --states 20

At each state, of all gradient tensors the median and the largest difference in norm, relative to the tensor:

- of our operators from the standard ones, and of both from float64 NumPy (`tests/mbv2/reference.py`);
- of each from float64 with every value put on the piece of ReLU6 (below 0, inside, above 6) where it lies there;
- of ours from the standard ones plus what float64 says that the values on other pieces ("flips") change.

Left out are tensors whose norm is rounding alone (under 1e-5 of the largest): a projection's beta goes through a linear
map into the next BatchNorm, which takes it out again.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mbv2.runtime import start_mindspore
from tests.mbv2.reference import Network, Sides

SMOOTHING = 0.1
Gradients = Mapping[str, NDArray[Any]]


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


def errors(got: Gradients, expected: Gradients) -> dict[str, Any]:
    """Median and largest difference in norm, the tensor of the largest, and its norm by the largest norm."""
    norms = {name: float(np.linalg.norm(value)) for name, value in expected.items()}
    floor = 1e-5 * max(norms.values())
    found = {name: float(np.linalg.norm(got[name] - expected[name])) / n for name, n in norms.items() if n > floor}
    worst = max(found, key=lambda name: found[name])
    return {
        "median": float(f"{np.median(list(found.values())):.2g}"),
        "largest": float(f"{found[worst]:.2g}"),
        "of": worst,
        "norm": float(f"{norms[worst] / max(norms.values()):.1g}"),
    }


def flips(a: Mapping[str, Sides], b: Mapping[str, Sides]) -> int:
    """Values that lie on different pieces."""
    return sum(int((a[name] != b[name]).sum()) for name in a)


def compare(
    standard: tuple[float, Gradients, dict[str, Sides]],
    native: tuple[float, Gradients, dict[str, Sides]],
    network: Network,
    batch: tuple[NDArray[np.uint8], NDArray[np.int32]],
) -> dict[str, Any]:
    """What is printed of one state, from loss, gradients and sides of each."""
    loss, exact = network.step(*batch, SMOOTHING)
    own = {unit.name: unit.side for unit in network.units if unit.relu6}
    as_standard, as_native = (network.step(*batch, SMOOTHING, run[2])[1] for run in (standard, native))
    expected = {name: value + as_native[name] - as_standard[name] for name, value in standard[1].items()}
    return {
        "loss": standard[0],
        "loss_ours_to_standard": native[0] / standard[0] - 1,
        "loss_ours_to_float64": native[0] / loss - 1,
        "values": sum(side.size for side in own.values()),
        "flips_ours_standard": flips(native[2], standard[2]),
        "flips_ours_float64": flips(native[2], own),
        "flips_standard_float64": flips(standard[2], own),
        "ours_to_standard": errors(native[1], standard[1]),
        "ours_to_float64": errors(native[1], exact),
        "standard_to_float64": errors(standard[1], exact),
        "same_sides_ours_to_float64": errors(native[1], as_native),
        "same_sides_standard_to_float64": errors(standard[1], as_standard),
        "ours_to_standard_and_flips": errors(native[1], expected),
    }


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

    from mbv2.network.model import MobileNetV2, ModelConfig, block_shapes
    from tests.mbv2.twins import LossGradient, load_values, native_sides, parameter_values, standard_sides

    images, labels = read_images(args.images, 5000)
    random = np.random.default_rng(0)
    ms.set_seed(0)
    config = ModelConfig(int(labels.max()) + 1, width=args.width)
    standard, native = (MobileNetV2(config, kernels=kind) for kind in ("standard", "native"))
    steps = [LossGradient(net, SMOOTHING) for net in (standard, native)]
    for net in (standard, native):
        net.set_train(True)
    names = [parameter.name for parameter in standard.trainable_params()]

    def run(step: LossGradient, batch: tuple[Any, Any]) -> tuple[float, Gradients]:
        loss, gradients = step(*(ms.Tensor(part) for part in batch))
        return float(loss), {name: g.asnumpy() for name, g in zip(names, gradients, strict=True)}

    velocity = {name: np.zeros(p.shape, np.float32) for name, p in zip(names, standard.trainable_params(), strict=True)}
    for step in range(args.states * args.every):
        chosen = random.integers(0, len(images), args.batch_size)
        batch = images[chosen], labels[chosen]
        before = parameter_values(standard)
        result = run(steps[0], batch)
        after = parameter_values(standard)
        if step % args.every == 0:
            load_values(native, before)
            native_result = run(steps[1], batch)
            load_values(native, before)
            load_values(standard, before)
            network = Network(before, block_shapes(args.width))
            sides = standard_sides(standard, batch[0]), native_sides(native, batch[0])
            row = compare((*result, sides[0]), (*native_result, sides[1]), network, batch)
            print(json.dumps({"step": step, **row}), flush=True)
        rate = args.lr * min(1.0, (step + 1) / 20)
        for name, gradient in result[1].items():
            np.add(0.9 * velocity[name], gradient, out=velocity[name])
            after[name] -= rate * velocity[name]
        load_values(standard, after)


if __name__ == "__main__":
    main()
