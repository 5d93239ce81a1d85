"""How fast the network runs on this machine: whole training steps, or inference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from imnet_prep.errors import TrainError

MODES = ("train", "eval")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure.

    Attributes:
        mode: ``train``: a full step, from a uint8 batch to the updated weights; ``eval``: uint8 batch to logits.
        batch_size: Images a step.
        image_size: Side of the input, in pixels.
        width: Width multiplier.
        classes: Classes of the head.
        steps: Measured steps; the first steps, with compilation, are left out.
        kernels: ``auto``, ``native`` or ``standard``, see :mod:`mbv2.network.model`.
        precision: Of a training step's activations, or of inference, see there.
    """

    mode: str = "train"
    batch_size: int = 32
    image_size: int = 224
    width: float = 1.0
    classes: int = 1000
    steps: int = 10
    kernels: str = "auto"
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise TrainError("unknown bench mode", expected=f"one of {', '.join(MODES)}", got=repr(self.mode))
        for name in ("batch_size", "image_size", "classes", "steps"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} is out of range", expected="at least 1", got=str(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured.

    Attributes:
        images_per_s: From the median step.
        step_ms: Median. fastest_ms, slowest_ms: The extremes.
        compile_s: The first step, with the graph's compilation.
        kernels: One line that names the operators in use.
        mode, batch_size, image_size, width, steps, precision: As run.
    """

    images_per_s: float
    step_ms: float
    fastest_ms: float
    slowest_ms: float
    compile_s: float
    kernels: str
    mode: str
    batch_size: int
    image_size: int
    width: float
    steps: int
    precision: str


def bench(options: BenchOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> BenchResult:
    """Measure steps on random images.

    Args:
        options: What to measure.
        progress: Called with the steps done and the steps in all, warm-up included.

    Raises:
        TrainError: The operators asked for are not usable here.
    """
    from mbv2.runtime import start_mindspore

    start_mindspore("CPU")
    run, kernels = prepare(options)
    warm_up = 2
    times = []
    for step in range(1 + warm_up + options.steps):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        progress(step + 1, 1 + warm_up + options.steps)
    measured = sorted(times[1 + warm_up :])
    median = statistics.median(measured)
    return BenchResult(
        images_per_s=options.batch_size / median,
        step_ms=median * 1e3,
        fastest_ms=measured[0] * 1e3,
        slowest_ms=measured[-1] * 1e3,
        compile_s=times[0],
        kernels=kernels,
        mode=options.mode,
        batch_size=options.batch_size,
        image_size=options.image_size,
        width=options.width,
        steps=options.steps,
        precision=options.precision,
    )


def prepare(options: BenchOptions) -> tuple[Callable[[], Any], str]:
    """Build the network and give a function that runs one step to its end, and the name of the operators in it."""
    import mindspore as ms

    from mbv2 import kernels
    from mbv2.network.model import MobileNetV2, ModelConfig
    from mbv2.recipe import Recipe
    from mbv2.training.optimizer import step_controls
    from mbv2.training.step import TrainStep, dropout_mask

    random = np.random.default_rng(0)
    size = (options.batch_size, options.image_size, options.image_size, 3)
    image = ms.Tensor(random.integers(0, 256, size, dtype=np.uint8))
    config = ModelConfig(options.classes, width=options.width)
    where = "precision" if options.mode == "train" else "inference"
    net = MobileNetV2(config, kernels=options.kernels, **{where: options.precision})
    name = kernels.describe() if net.kernels == "native" else "standard operators"
    if options.mode == "eval":
        net.set_train(False)
        return lambda: net(image).asnumpy(), name
    recipe = Recipe()
    step = TrainStep(net, recipe, options.classes)
    label = ms.Tensor(random.integers(0, options.classes, options.batch_size, dtype=np.int32))
    mask = ms.Tensor(dropout_mask(0, 0, (options.batch_size, net.feature_count), recipe.dropout))
    weight = ms.Tensor(np.ones(options.batch_size, np.float32))
    controls = ms.Tensor(step_controls(recipe, 0.01, 0))
    return lambda: step(image, mask, label, label, weight, controls).asnumpy(), name
