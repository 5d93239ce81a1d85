"""The best guess of a run's checkpoint for every image of a split, with its probability, for reports."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog
from imnet_prep.errors import TrainError
from imnet_prep.records.manifest import Manifest
from imnet_prep.types import ProgressCallback
from mbv2.data import AnyBatch
from mbv2.scoring.evaluate import read_evaluation
from mbv2.scoring.score import Scores, network_predict
from mbv2.weights.checkpoint import build_network

BEST, LAST = "best.ckpt", "last.ckpt"


@dataclass(frozen=True, slots=True)
class Guesses:
    """What a network guessed of each image of a split, in stored order; labels are the network's.

    Attributes:
        manifest: Of the records.
        titles: Class names with their words, in label order.
        scores: Counts and confusion.
        label: int32 (images,), the true one. guess: int32 (images,), the best guess.
        confidence: float32 (images,), its probability.
    """

    manifest: Manifest
    titles: tuple[str, ...]
    scores: Scores
    label: NDArray[np.int32]
    guess: NDArray[np.int32]
    confidence: NDArray[np.float32]


class GuessCollector:
    """An observer of the scoring loop that keeps labels, best guesses and their probabilities."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]] = []

    def __call__(self, batch: AnyBatch, logits: NDArray[np.float32]) -> None:
        """Keep what a batch says."""
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        best = logits.argmax(axis=1).astype(np.int32)
        self._parts.append((batch.label, best, (1 / chances.sum(axis=1)).astype(np.float32)))

    def found(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Return labels, guesses and their probabilities."""
        label, guess, confidence = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        return label, guess, confidence


def best_guesses(run: Path, records: Path, split: str, device_target: str, progress: ProgressCallback) -> Guesses:
    """Score the run's best checkpoint on a split, and keep its best guess for each image.

    Raises:
        TrainError: The run has no checkpoint.
        RecordsError: The records cannot be read, or have no such split.
        CheckpointError: The checkpoint cannot be read, or is for other classes.
    """
    checkpoint = next((run / name for name in (BEST, LAST) if (run / name).is_file()), None)
    if checkpoint is None:
        raise TrainError(f"{run}: no checkpoint in it", expected=f"{BEST} or {LAST}")
    found = read_evaluation(checkpoint, records, split, device_target)
    collector = GuessCollector()
    scores = found.score(network_predict(build_network(found.loaded)), observers=[collector], progress=progress)
    words = dict(zip(found.manifest.classes, found.manifest.class_words, strict=True))
    titles = (f"{name} {(words.get(name) or catalog.class_words(name)).split(',')[0]}" for name in found.class_names)
    return Guesses(found.manifest, tuple(title.strip() for title in titles), scores, *collector.found())
