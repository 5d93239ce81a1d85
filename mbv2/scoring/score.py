"""The one scoring loop: every image once, the last partial batch included; whoever wants more of it watches.

The graph is compiled for one batch size; a last batch that is smaller is filled up, and the filling is never counted.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import Interrupted, TrainError
from imnet_prep.types import Progress, ProgressCallback
from mbv2.data import AnyBatch, batch_inputs, fill_rows
from mbv2.kernels import explained
from mbv2.runtime import runtime
from mbv2.training.ranks import sum_counts, sum_floats

TOP = 5
Predict = Callable[[NDArray[Any]], NDArray[np.float32]]  # images or features of the compiled batch size -> logits
Observer = Callable[[AnyBatch, NDArray[np.float32]], None]  # called with each batch and its logits, filling left out


class Tally(Protocol):
    """An observer that counts: its counts are added up over ranks and printed with the scores."""

    counts: NDArray[np.int64]

    def __call__(self, batch: AnyBatch, logits: NDArray[np.float32]) -> None:
        """Count a batch."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 eval --json`` adds."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found.

    Attributes:
        images: Images scored.
        correct1: Images whose label is the best guess.
        correct5: Images whose label is among the five best.
        loss: Mean cross-entropy, without label smoothing.
        confusion: int64 (classes, classes), rows the true label, columns the best guess.
        tallies: What was counted besides.
    """

    images: int
    correct1: int
    correct5: int
    loss: float
    confusion: NDArray[np.int64]
    tallies: tuple[Tally, ...] = ()

    @property
    def top1(self) -> float:
        """Share of images whose label is the best guess."""
        return self.correct1 / self.images

    @property
    def top5(self) -> float:
        """Share of images whose label is among the five best guesses."""
        return self.correct5 / self.images

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 eval --json`` prints."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "correct1": self.correct1,
            "correct5": self.correct5,
            "images": self.images,
            **{key: value for tally in self.tallies for key, value in tally.to_json().items()},
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        return [
            ("images", f"{self.images}"),
            ("top-1", f"{self.top1:.4f} ({self.correct1})"),
            *([("top-5", f"{self.top5:.4f} ({self.correct5})")] if len(self.confusion) > TOP else []),
            ("loss", f"{self.loss:.4f}"),
            *(row for tally in self.tallies for row in tally.rows()),
        ]


def label_ranks(logits: NDArray[np.float32], label: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count the classes that come before the true one; equal logits are ordered by class number.

    A row with a logit that is not finite ranks last, and never among the first five: a broken network must not score.

    Returns:
        int64 (N,), 0 where the label is the best guess.
    """
    rows = np.arange(len(label))
    finite = np.isfinite(logits).all(1)
    own = logits[rows, label][:, None]
    before = np.arange(logits.shape[1])[None, :] < label[:, None]
    ranks = ((logits > own) | ((logits == own) & before)).sum(1)
    return np.where(finite, ranks, max(TOP, logits.shape[1]))


def score_batches(
    predict: Predict,
    batches: Iterable[AnyBatch],
    *,
    classes: int,
    batch_size: int,
    total: int,
    observers: Sequence[Observer] = (),
    left_out: Callable[[], int] = lambda: 0,
    reduce: Callable[[Scores], Scores] = lambda scores: scores,
    stop: Callable[[], bool] = lambda: False,
    progress: ProgressCallback | None = None,
) -> Scores:
    """Score every image of an iterable of batches.

    Args:
        predict: Images or pooled features (batch_size, ...) to logits float32 (batch_size, classes).
        batches: Batches of at most ``batch_size`` images.
        classes: Number of classes.
        batch_size: What ``predict`` was compiled for.
        total: Images there must be, on all ranks together.
        observers: Called with each batch and its logits.
        left_out: Says how many bad images were left out of them; asked after the last batch.
        reduce: Adds up what several ranks scored.
        stop: Says whether to leave.
        progress: Called after each batch.

    Raises:
        TrainError: Another number of images came than the manifest says.
        Interrupted: ``stop`` said so.
    """
    images = correct1 = correct5 = 0
    loss = 0.0
    confusion = np.zeros((classes, classes), np.int64)
    for batch in batches:
        if stop():
            raise Interrupted("evaluation stopped", got=f"{images} of {total} images scored")
        logits = predict(fill_rows(batch_inputs(batch), batch_size))[: len(batch)]
        ranks = label_ranks(logits, batch.label)
        images += len(batch)
        correct1 += int((ranks < 1).sum())
        correct5 += int((ranks < TOP).sum())
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        loss += float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(batch)), batch.label]).sum())
        np.add.at(confusion, (batch.label, logits.argmax(1)), 1)
        for observe in observers:
            observe(batch, logits)
        if progress:
            done = min(total, images * runtime().ranks)  # ranks score as many images each, but for the last batch
            progress(Progress(done, total, note=f"top-1 {correct1 / images:.4f}"))
    scores = reduce(Scores(images, correct1, correct5, loss / max(1, images), confusion))
    if not total - left_out() <= scores.images <= total:
        raise TrainError("evaluation did not see every image", expected=f"{total} images", got=f"{scores.images}")
    return scores


def sum_over_ranks(scores: Scores) -> Scores:
    """Add up the scores of all ranks: counts exactly, losses to float32."""
    if runtime().ranks == 1:
        return scores
    images, correct1, correct5 = sum_counts(np.array([scores.images, scores.correct1, scores.correct5]))
    loss = sum_floats(np.array([scores.loss * scores.images], np.float32))[0]
    confusion = sum_counts(scores.confusion)
    return Scores(int(images), int(correct1), int(correct5), float(loss) / max(1, int(images)), confusion)


def network_predict(net: Any) -> Predict:
    """Wrap a cell in evaluation mode as a function from NumPy to NumPy."""
    import mindspore as ms

    def predict(inputs: NDArray[Any]) -> NDArray[np.float32]:
        with explained():
            outputs: NDArray[np.float32] = net(ms.Tensor(inputs)).asnumpy()
        return outputs

    return predict


def write_per_class(path: Path, scores: Scores, class_names: tuple[str, ...]) -> None:
    """Write a CSV row a class: label, name, images, correct, accuracy, and the class it is most often taken for.

    Raises:
        TrainError: The file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(["label", "class", "images", "correct1", "top1", "most_confused_with"])
            writer.writerows(_class_row(label, scores, class_names) for label in range(len(class_names)))
    except OSError as error:
        raise TrainError(f"cannot write {path}", got=error.strerror or str(error)) from error


def _class_row(label: int, scores: Scores, class_names: tuple[str, ...]) -> list[object]:
    others = scores.confusion[label].copy()
    images, correct = int(others.sum()), int(others[label])
    others[label] = 0
    worst = class_names[int(others.argmax())] if others.any() else ""
    return [label, class_names[label], images, correct, f"{correct / images:.6f}" if images else "", worst]
