"""Choose the class names of adopted records, from the stored file names or from a given label space."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from imnet_prep import catalog
from imnet_prep.build.options import read_names
from imnet_prep.check.rows import SEPARATORS
from imnet_prep.errors import IntegrityError, RecordsError

_WNID = re.compile(r"n\d{8}")
_UNSAFE = re.compile(r"[^0-9A-Za-z._-]+")


class NameFound(NamedTuple):
    """A label and what a ``file_name`` says about it: the folders, and the wnid at the start of the base name."""

    split: str
    label: int
    folders: tuple[str, ...]
    wnid: str


def name_found(split: str, label: int, stored: str) -> NameFound:
    """Return what a stored name says about its label; few of a million records say something new."""
    *folders, base = SEPARATORS.split(stored)
    beginning = base.split("_")[0]
    return NameFound(split, label, tuple(folders), beginning if _WNID.fullmatch(beginning) else "")


@dataclass(frozen=True, slots=True)
class Naming:
    """Class names, and how to name records.

    Attributes:
        classes: Names in label order.
        label_space: As in the manifest. convention: What the labels mean, in words.
        notes: Notes for the user.
        kept: By split, the number of leading parts to drop from a stored name; -1 keeps only its base name.
    """

    classes: tuple[str, ...]
    label_space: str
    convention: str
    notes: tuple[str, ...] = ()
    kept: dict[str, int] = field(default_factory=dict)

    def file_name(self, split: str, file: str, line: dict[str, Any]) -> str:
        """Return ``<class>/<name>`` of a record; a record without a name is named by its file and row."""
        parts = SEPARATORS.split(line["file_name"])
        base = parts[-1] or f"{_UNSAFE.sub('_', file)}-{line['row']:08d}"
        if line["label"] < 0:
            return base
        return "/".join([self.classes[line["label"]], *parts[self.kept.get(split, -1) : -1], base])


def choose_naming(found: Sequence[NameFound], label_space: str | None) -> Naming:
    """Choose the class names.

    Args:
        found: All labels and what the file names say about them.
        label_space: ``imagenet1k``, the path of a file of class names in label order, or None.

    Raises:
        RecordsError: A label has no name in the label space, or the list cannot be read.
        IntegrityError: A label goes with two classes, or a class with two labels.
    """
    if unlabelled := sorted({name.split for name in found if name.label < 0 and name.split != "test"}):
        raise RecordsError(f"split {unlabelled[0]}: records without a label", expected="labels from 0 on")
    labels = sorted({name.label for name in found if name.label >= 0})
    known, kept = _from_folders(found)
    known = known or _from_beginnings(found)
    if label_space is None:
        return replace(_named(labels, known), kept=kept)
    official = label_space == "imagenet1k"
    if not official and not Path(label_space).is_file():
        raise RecordsError(f"unknown label space {label_space!r}", expected="imagenet1k, or a file of class names")
    given = _official_names() if official else read_names(Path(label_space))
    if labels and labels[-1] >= len(given):
        raise RecordsError(
            f"label {labels[-1]} has no name in {label_space}", expected=f"labels from 0 to {len(given) - 1}"
        )
    for label, name in sorted(known.items()):
        if name in given and name != given[label]:
            raise IntegrityError(f"label {label} is {given[label]} by {label_space}", got=f"records of class {name}")
    return Naming(
        given,
        "imagenet1k" if official else "file",
        "adopted: as " + ("ILSVRC2012" if official else "the list that was given"),
        kept=kept,
    )


def _official_names() -> tuple[str, ...]:
    return tuple(wnid for wnid, *_ in catalog.synsets())


def _named(labels: Sequence[int], known: dict[int, str]) -> Naming:
    synsets = catalog.labels()
    if known and all(synsets.get(name) == label for label, name in known.items()):
        return Naming(
            _official_names(), "imagenet1k", "adopted: ILSVRC2012's labels, the 1,000 WordNet ids sorted, from 0"
        )
    size = labels[-1] + 1 if labels else 0
    width = len(str(max(0, size - 1)))
    names = tuple(known.get(label, f"{label:0{width}d}") for label in range(size))
    notes = []
    if missing := size - len(labels):
        notes.append(f"{missing} labels below {size} have no record; their classes are named by their numbers")
    if not known:
        notes.append("no class names in the records: classes are named by their labels (--label-space names them)")
    if len(set(names)) != len(names):
        raise IntegrityError("a class has the number of another label as its name", remedy="use --label-space")
    return Naming(
        names,
        "found" if list(names) == sorted(names) else "file",
        "adopted: the labels as the files have them",
        tuple(notes),
    )


def _from_folders(found: Sequence[NameFound]) -> tuple[dict[int, str], dict[str, int]]:
    """Return names by label from the folders in ``file_name``, and ``kept`` of :class:`Naming`.

    The class is the outermost folder in which the names of a split differ, so classes may have subfolders. If those
    folders do not match the labels one to one, it is the innermost. A split with all images in one folder has no names.
    """
    pairs: set[tuple[int, str]] = set()
    kept: dict[str, int] = {}
    for split in {name.split for name in found}:
        mine = {(name.label, name.folders) for name in found if name.split == split and name.label >= 0}
        labels = len({label for label, _ in mine})
        # With one label, its class is the last folder that all names have in common.
        common = os.path.commonprefix([folders for _, folders in mine])  # noqa: RUF071 - of tuples, not of characters
        outermost = len(common) - (labels == 1)
        for place in (outermost, -1):
            names = {(label, "".join(folders[place:][:1])) for label, folders in mine}
            classes = {name for _, name in names}
            said = "" not in classes and (len(classes) > 1 or labels == 1)
            if said and (place == -1 or len(names) == len(classes) == labels):
                pairs |= names
                kept[split] = place + 1 or -1
                break
    return _one_to_one(pairs), kept


def _from_beginnings(found: Sequence[NameFound]) -> dict[int, str]:
    """Return names by label from base names like ``n01440764_10026.JPEG``."""
    pairs = {(name.label, name.wnid) for name in found if name.label >= 0}
    return _one_to_one(pairs) if all(name for _, name in pairs) else {}


def _one_to_one(pairs: set[tuple[int, str]]) -> dict[int, str]:
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for label, name in sorted(pairs):
        if names.setdefault(label, name) != name:
            raise IntegrityError(f"label {label} goes with two classes", got=f"{names[label]} and {name}")
        if labels.setdefault(name, label) != label:
            raise IntegrityError(f"class {name} goes with two labels", got=f"{labels[name]} and {label}")
    return names
