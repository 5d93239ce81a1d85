"""Which label of a checkpoint each class of a records folder is: by name, or by number where the names are numbers.

Folders of evaluation sets are named by wnid (ImageNet-R, ImageNet-A), or by label number (ImageNet-V2's 0 to 999),
which a conversion sorts as text: 0, 1, 10, 100, 101. A few of the checkpoint's classes are enough.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog
from imnet_prep.errors import CheckpointError
from mbv2.data import AnyBatch
from mbv2.scoring.score import TOP, label_ranks
from mbv2.weights.checkpoint import Meta


def checkpoint_labels(meta: Meta, classes: tuple[str, ...], where: Path) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Find the checkpoint's label of each class of a records folder.

    Names are compared first. Where the records' names are all numbers, they are taken as labels of a checkpoint that
    has ImageNet's 1,000 classes, or no names. A checkpoint without names and of as many classes has the records' order.

    Args:
        meta: Of the checkpoint.
        classes: Of the records, in label order.
        where: The checkpoint, for messages.

    Returns:
        int32 (classes of the records,), and the checkpoint's class names in its own label order; where it has none,
        the records' names, or the label for a class that they lack.

    Raises:
        CheckpointError: The checkpoint does not know a class of the records.
    """
    count = int(meta.model["classes"])
    numbers = {name: label for label, name in enumerate(meta.class_names)}
    if all(name in numbers for name in classes):
        return np.array([numbers[name] for name in classes], np.int32), meta.class_names
    by_number = not numbers or meta.class_names == tuple(synset.wnid for synset in catalog.synsets())
    labels = [int(name) if name.isascii() and name.isdigit() else -1 for name in classes]
    if by_number and min(labels) >= 0 and max(labels) < count and len(set(labels)) == len(labels):
        return np.array(labels, np.int32), meta.class_names or tuple(map(str, range(count)))
    if not numbers and count == len(classes):
        return np.arange(count, dtype=np.int32), classes
    if not numbers:
        remedy = "use records of its own classes, or fine-tune with --pretrained"
        expected, got = f"the records' {len(classes)} classes", f"{count}"
        raise CheckpointError(f"{where} is for another class count", expected=expected, got=got, remedy=remedy)
    unknown = [name for name in classes if name not in numbers]
    expected = f"only classes of the checkpoint, which has {count}, in the records"
    got = f"{unknown[0]!r}" + (f", and {len(unknown) - 1} more" if len(unknown) > 1 else "")
    remedy = "use records of its own classes (imnet-prep reshard --keep-classes), or fine-tune with --pretrained"
    raise CheckpointError(f"{where} is for other classes", expected=expected, got=got, remedy=remedy)


class SubsetTally:
    """Scores among the records' classes alone, where the checkpoint has more: an image's other logits do not count.

    Attributes:
        counts: int64 (3,): images, those whose label is the best such guess, and those where it is among the five best.
    """

    def __init__(self, labels: NDArray[np.int32], classes: int) -> None:
        self.counts = np.zeros(3, np.int64)
        self._labels = np.sort(labels)  # equal logits stay ordered by class number
        self._place = np.full(classes, -1, np.int32)
        self._place[self._labels] = np.arange(len(labels), dtype=np.int32)

    def __call__(self, batch: AnyBatch, logits: NDArray[np.float32]) -> None:
        """Count a batch."""
        ranks = label_ranks(logits[:, self._labels], self._place[batch.label])
        self.counts += [len(batch), (ranks < 1).sum(), (ranks < TOP).sum()]

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 eval --json`` adds."""
        images, correct1, correct5 = self.counts.tolist()
        shares = {"subset_top1": correct1 / images, "subset_top5": correct5 / images}
        return {"subset_classes": len(self._labels), **shares}

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        images, *correct = self.counts.tolist()
        shares = [f"top-{k} {count / images:.4f} ({count})" for k, count in zip((1, TOP), correct, strict=True)]
        shown = shares if len(self._labels) > TOP else shares[:1]
        return [(f"among the {len(self._labels)} classes of the records", ", ".join(shown))]
