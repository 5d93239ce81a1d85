"""What a run's checkpoint says of every image of a split: the scores, and each best guess with its probability."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import TrainError
from imnet_prep.loader.batches import open_batches
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import Manifest
from imnet_prep.types import Batch, ProgressCallback
from mbv2.data import eval_options, split_images
from mbv2.runtime import start_mindspore
from mbv2.scoring.score import Predict, Scores, check_classes, network_predict, score_batches
from mbv2.weights.checkpoint import build_network, read_checkpoint

BEST, LAST = "best.ckpt", "last.ckpt"


@dataclass(frozen=True, slots=True)
class Judged:
    """What the network said of each image of a split, in stored order.

    Attributes:
        manifest: Of the records.
        scores: Counts and confusion.
        label: int32 (images,), the true one. guess: int32 (images,), the best guess.
        confidence: float32 (images,), its probability.
    """

    manifest: Manifest
    scores: Scores
    label: NDArray[np.int32]
    guess: NDArray[np.int32]
    confidence: NDArray[np.float32]


def judge(run: Path, records: Path, split: str, device_target: str, progress: ProgressCallback) -> Judged:
    """Score the run's best checkpoint on a split, and keep what it says of each image.

    Raises:
        TrainError: The run has no checkpoint.
        RecordsError: The records cannot be read, or have no such split.
        CheckpointError: The checkpoint cannot be read, or is for other classes.
    """
    checkpoint = next((run / name for name in (BEST, LAST) if (run / name).is_file()), None)
    if checkpoint is None:
        raise TrainError(f"{run}: no checkpoint in it", expected=f"{BEST} or {LAST}")
    manifest = RecordsFolder.open(records).manifest
    total = split_images(manifest, records, split)
    start_mindspore(device_target)
    loaded = read_checkpoint(checkpoint)
    meta = loaded.meta
    check_classes(meta, manifest, checkpoint)
    options = eval_options(meta.batch_size, meta.image_size, meta.eval_crop)
    with open_batches(records, split, options, 0) as batches:
        keeper = _Keeper(network_predict(build_network(loaded)))
        scores = score_batches(
            keeper,
            keeper.labels_of(batches.epoch(0)),
            classes=len(manifest.classes),
            batch_size=meta.batch_size,
            total=total,
            progress=progress,
        )
    return Judged(manifest, scores, *keeper.found())


class _Keeper:
    """A predictor that remembers the best guess for every image; the filling of the last batch is cut off."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._guesses: list[NDArray[np.int32]] = []
        self._confidences: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.int32]] = []

    def __call__(self, image: NDArray[Any]) -> NDArray[np.float32]:
        logits = self._predict(image)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        self._guesses.append(logits.argmax(axis=1).astype(np.int32))
        self._confidences.append((1 / shifted.sum(axis=1)).astype(np.float32))
        return logits

    def labels_of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on and remember their labels."""
        for batch in batches:
            self._labels.append(batch.label)
            yield batch

    def found(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Return labels, guesses and their probabilities."""
        sizes = [len(label) for label in self._labels]
        cut = [
            [part[:size] for part, size in zip(parts, sizes, strict=True)]
            for parts in (self._guesses, self._confidences)
        ]
        return np.concatenate(self._labels), np.concatenate(cut[0]), np.concatenate(cut[1])
