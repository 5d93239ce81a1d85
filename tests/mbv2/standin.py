"""In-memory batches in the shape of the pipeline's, so that the trainer is tested without records."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imnet_prep.types import Batch
from mbv2.data import RunData


def coloured_images(count: int, classes: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Draw noise around a colour that depends on the class."""
    rng = np.random.default_rng(seed)
    label = np.arange(count, dtype=np.int32) % classes
    colours = np.random.default_rng(1).integers(40, 216, (classes, 1, 1, 3))
    noise = rng.normal(0, 25, (count, size, size, 3))
    return np.clip(colours[label] + noise, 0, 255).astype(np.uint8), label


@dataclass(frozen=True)
class MemorySource:
    """Batches of arrays; a training source draws its order from (seed, epoch) and drops the last partial batch."""

    image: NDArray[np.uint8]
    label: NDArray[np.int32]
    batch_size: int
    training: bool
    seed: int = 0
    delay_s: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.label), self.batch_size)
        return whole + (rest > 0 and not self.training)

    def epoch(self, number: int, start_step: int = 0) -> Iterator[Batch]:
        order = np.arange(len(self.label))
        if self.training:
            order = np.random.default_rng([self.seed, number]).permutation(len(order))
        for step in range(start_step, self.steps_per_epoch):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            time.sleep(self.delay_s)
            yield Batch(self.image[rows], self.label[rows], rows.astype(np.uint64))


def memory_data(
    *, images: int = 40, val: int = 13, classes: int = 3, size: int = 32, batch: int = 8, delay_s: float = 0.0
) -> RunData:
    """Make a whole run's data: ``val`` is no multiple of ``batch`` on purpose; ``delay_s`` slows training batches."""
    train_set = coloured_images(images, classes, size, seed=2)
    val_set = coloured_images(val, classes, size, seed=3)
    names = tuple(f"class{number}" for number in range(classes))
    source = MemorySource(*val_set, batch, training=False) if val else None
    ordered = MemorySource(*train_set, batch, training=False)
    train = MemorySource(*train_set, batch, training=True, delay_s=delay_s)
    counts = tuple(np.bincount(train_set[1], minlength=classes).tolist())
    return RunData(names, f"{images}-{val}-{size}", train, images, counts, ordered.epoch, source, val)
