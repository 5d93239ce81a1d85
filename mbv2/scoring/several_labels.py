"""Scoring against several right labels an image, as "Are we done with ImageNet?" gives them for the validation set.

Source:
    Beyer et al. 2020, https://github.com/google-research/reassessed-imagenet: ``real.json`` is a list with one list of
    labels for each validation image, in the order of the numbers in their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import TrainError
from imnet_prep.types import record_id

RealLabels = Mapping[int, frozenset[int]]  # record id -> right labels, of images that have any
_NUMBER = re.compile(r"ILSVRC2012_val_0*(\d+)\.")


@dataclass(frozen=True, slots=True)
class RealScores:
    """What scoring against several labels found.

    Attributes:
        images: Images with at least one right label.
        correct1: Those whose best guess is one of them.
        left_out: Images without a label: not scored.
    """

    images: int = 0
    correct1: int = 0
    left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 eval --json`` adds; the share is null where no image has a label."""
        share = self.correct1 / self.images if self.images else None
        return {
            "real_top1": share,
            "real_correct1": self.correct1,
            "real_images": self.images,
            "real_left_out": self.left_out,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        share = f"{self.correct1 / self.images:.4f}" if self.images else "none"
        return [
            ("real labels", f"{share} ({self.correct1} of {self.images}; {self.left_out} without a label left out)")
        ]


def score_real(
    labels: RealLabels, ids: NDArray[np.uint64], logits: NDArray[np.float32], before: RealScores
) -> RealScores:
    """Add a batch to the scores; equal logits are ordered by class, and a row that is not finite counts as wrong.

    Args:
        labels: From :func:`read_real_labels`.
        ids: uint64 (N,), record ids.
        logits: float32 (N, classes).
        before: The scores so far.
    """
    images, correct1, left_out = before.images, before.correct1, before.left_out
    for key, row in zip(ids.tolist(), logits, strict=True):
        right = labels.get(key)
        if right is None:
            left_out += 1
            continue
        images += 1
        correct1 += bool(np.isfinite(row).all()) and int(row.argmax()) in right
    return RealScores(images, correct1, left_out)


def read_real_labels(path: Path, split: str, file_names: Iterable[str], class_names: tuple[str, ...]) -> RealLabels:
    """Read right labels: a list by ImageNet validation number, or a map from file names.

    Args:
        path: JSON. A list holds a list of labels for each validation image; a map's keys are file names as in the
            records (``<wnid>/<name>``) or base names. A label is a number in the records' order, or a class name.
        split: The split that is scored.
        file_names: Of its records.
        class_names: Of the records, in label order.

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
    numbers = {name: number for number, name in enumerate(class_names)}
    found: dict[int, frozenset[int]] = {}
    known = False
    for name in file_names:
        entry = _entry(document, name)
        known = known or entry is not None
        right = _labels(entry, numbers, f"{path}: {name}")
        if right:
            found[record_id(split, name)] = right
    if not known:
        expected = "names as in the records" if isinstance(document, dict) else "records of the ImageNet validation set"
        raise TrainError(f"{path} names no image of the split {split!r}", expected=expected)
    return found


def _entry(document: list[Any] | dict[str, Any], name: str) -> Any:
    base = name.rpartition("/")[2]
    if isinstance(document, dict):
        return document.get(name, document.get(base))
    match = _NUMBER.match(base)
    place = int(match[1]) - 1 if match else -1
    return document[place] if 0 <= place < len(document) else None


def _labels(entry: Any, numbers: dict[str, int], where: str) -> frozenset[int]:
    if entry is None:
        return frozenset()
    if not isinstance(entry, list):
        raise TrainError(where, expected="a list of labels", got=repr(entry))
    right = set()
    for label in entry:
        number = numbers.get(label, -1) if isinstance(label, str) else label
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(numbers):
            expected = f"a class name of the records, or a number below {len(numbers)}"
            remedy = "numbers of ImageNet's 1,000 classes need records of `to-mindrecord --label-space imagenet1k`"
            raise TrainError(where, expected=expected, got=repr(label), remedy=remedy)
        right.add(number)
    return frozenset(right)
