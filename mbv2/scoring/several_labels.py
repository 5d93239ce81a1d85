"""Scoring against several right labels an image, as "Are we done with ImageNet?" gives them for the validation set.

Source:
    Beyer et al. 2020, https://github.com/google-research/reassessed-imagenet: ``real.json`` is a list with one list of
    labels for each validation image, in the order of the numbers in their names.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog
from imnet_prep.errors import TrainError
from imnet_prep.types import record_id
from mbv2.data import AnyBatch

RealLabels = Mapping[int, frozenset[int]]  # record id -> right labels, of images that have any
_NUMBER = re.compile(r"ILSVRC2012_val_0*(\d+)[._]")


class RealTally:
    """Scores against several right labels; equal logits are ordered by class, and a row not finite counts as wrong.

    Attributes:
        counts: int64 (3,): images with at least one right label, those whose best guess is one of them, and images
            without a label, which are not scored.
    """

    def __init__(self, labels: RealLabels) -> None:
        self.counts = np.zeros(3, np.int64)
        self._labels = labels

    def __call__(self, batch: AnyBatch, logits: NDArray[np.float32]) -> None:
        """Count a batch."""
        for key, row in zip(batch.record_id.tolist(), logits, strict=True):
            right = self._labels.get(key)
            correct = right is not None and bool(np.isfinite(row).all()) and int(row.argmax()) in right
            self.counts += [right is not None, correct, right is None]

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 eval --json`` adds; the share is null where no image has a label."""
        images, correct1, left_out = self.counts.tolist()
        share = correct1 / images if images else None
        return {"real_top1": share, "real_correct1": correct1, "real_images": images, "real_left_out": left_out}

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        images, correct1, left_out = self.counts.tolist()
        share = f"{correct1 / images:.4f}" if images else "none"
        return [("real labels", f"{share} ({correct1} of {images}; {left_out} without a label left out)")]


def read_real_labels(path: Path, split: str, file_names: Iterable[str], class_names: tuple[str, ...]) -> RealLabels:
    """Read right labels: a list by ImageNet validation number, or a map from file names.

    Args:
        path: JSON. A list holds a list of labels for each validation image; a map's keys are file names as in the
            records (``<wnid>/<name>``) or base names. A label is a class name or a number in the checkpoint's order;
            in a list, and where the classes are wnids, it is ImageNet's number, 0 to 999, and classes that the
            checkpoint lacks are passed over.
        split: The split that is scored.
        file_names: Of its records.
        class_names: Of the checkpoint, in label order.

    Returns:
        The right labels, in the checkpoint's order.

    Raises:
        TrainError: The file is unreadable, of another form, for other classes, or for none of these images.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"cannot read real labels {path}", expected="JSON", got=str(error)) from error
    if not isinstance(document, list | dict):
        expected = "a list of lists, or a map from file names to lists"
        raise TrainError(f"{path} holds no real labels", expected=expected, got=type(document).__name__)
    numbers = _label_numbers(class_names, imagenet=isinstance(document, list))
    found: dict[int, frozenset[int]] = {}
    known = False
    for name in file_names:
        entry = _entry(document, name, path)
        known = known or entry is not None
        right = _labels(entry, numbers, f"{path}: {name}")
        if right:
            found[record_id(split, name)] = right
    if not known:
        expected = "names as in the records" if isinstance(document, dict) else "records of the ImageNet validation set"
        raise TrainError(f"{path} names no image of the split {split!r}", expected=expected)
    return found


def _label_numbers(class_names: tuple[str, ...], *, imagenet: bool) -> dict[str | int, int | None]:
    """Return the checkpoint's label of every name and number that may stand in the file; None: it lacks that class."""
    labels: dict[str | int, int | None] = {name: label for label, name in enumerate(class_names)}
    wnids = [synset.wnid for synset in catalog.synsets()]
    if imagenet and set(class_names) <= set(wnids):
        return labels | {number: labels.get(wnid) for number, wnid in enumerate(wnids)}
    return labels | {number: number for number in range(len(class_names))}


def _entry(document: list[Any] | dict[str, Any], name: str, path: Path) -> Any:
    base = name.rpartition("/")[2]
    if isinstance(document, dict):
        return document.get(name, document.get(base))
    match = _NUMBER.match(base)
    if not match:
        return None
    place = int(match[1]) - 1
    if not 0 <= place < len(document):
        raise TrainError(f"{path} has no entry for {name}", expected="one for each image", got=f"{len(document)}")
    return document[place]


def _labels(entry: Any, numbers: dict[str | int, int | None], where: str) -> frozenset[int]:
    if entry is None:
        return frozenset()
    if not isinstance(entry, list):
        raise TrainError(where, expected="a list of labels", got=repr(entry))
    for label in entry:
        if isinstance(label, bool) or not isinstance(label, str | int) or label not in numbers:
            highest = max(number for number in numbers if isinstance(number, int))
            expected = f"a class name of the checkpoint, or a number up to {highest}"
            raise TrainError(where, expected=expected, got=repr(label))
    return frozenset(number for label in entry if (number := numbers[label]) is not None)
