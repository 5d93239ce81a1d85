"""The options of a conversion: those that determine the result, and those that say how to compute it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imnet_prep.cluster import check_executor
from imnet_prep.errors import PlanError
from imnet_prep.images.check import ValidateOptions
from imnet_prep.process_pool import process_count
from imnet_prep.sources.classes import IMAGENET, read_classes
from imnet_prep.types import name_fault

LABEL_SPACES = ("found", "imagenet1k")
DUPLICATES = ("keep", "reject")
_BUDGET = re.compile(r"\d+|\d+(\.\d+)?%")


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options that determine the content of the shards, and so the digest of the plan.

    Attributes:
        seed: Determines the order of the images, 0 or more.
        shards: Number of shards per split; None for one per 64 MiB or 8,192 images, at most 128.
        label_space: ``found``, ``imagenet1k``, the path of a file of class names in label order, or these names.
        keep_classes: The path of a file of class names to keep, or None for all.
        max_per_class: Images to keep per class and split, chosen by the seed, or None for all.
        store: The limits of an image, and how it is stored.
        duplicates: ``keep``, or ``reject`` all but the first (val before train) of the images with the same bytes.
        val_fraction: The share of each class to move from train to val, or None for none.
        classes: What names the classes of sources that number them: ``imagenet1k``, the path of a list of names in
            label order, or None.
        salvage: Leave out the damaged stretches of archives; else they are errors.
    """

    seed: int = 0
    shards: int | None = None
    label_space: str | tuple[str, ...] = "found"
    keep_classes: Path | None = None
    max_per_class: int | None = None
    store: ValidateOptions = field(default_factory=ValidateOptions)
    duplicates: str = "keep"
    val_fraction: float | None = None
    classes: str | None = None
    salvage: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("--seed", self.seed, 0 <= self.seed < 1 << 63, "0 or more"),
            ("--shards", self.shards, self.shards is None or 1 <= self.shards <= 1000, "1 to 1000"),
            ("--max-per-class", self.max_per_class, self.max_per_class is None or self.max_per_class >= 1, "1 or more"),
            ("--val-fraction", self.val_fraction, self.val_fraction is None or 0 < self.val_fraction < 1, "0 to 1"),
            ("--duplicates", self.duplicates, self.duplicates in DUPLICATES, " or ".join(DUPLICATES)),
        )
        for name, value, good, expected in checks:
            if not good:
                raise PlanError(f"{name} is out of range", expected=expected, got=str(value))

    def class_names(self) -> Sequence[str]:
        """Return the names of numbered classes in label order, or none.

        Raises:
            SourceError: The list cannot be read.
        """
        return () if self.classes is None else read_classes(self.classes)

    def content(self) -> dict[str, Any]:
        """Return the options as the manifest records them: the content of files in place of their paths."""
        names = list(self.class_names())
        return {
            "duplicates": self.duplicates,
            "keep_classes": None if self.keep_classes is None else sorted(read_names(self.keep_classes)),
            "max_per_class": self.max_per_class,
            "max_pixels": self.store.max_pixels,
            "quality": self.store.quality if self.store.short_side is not None else None,
            "shards": self.shards,
            "short_side": self.store.short_side,
            **({} if self.val_fraction is None else {"val_fraction": self.val_fraction}),
            **({} if self.classes is None else {"classes": self.classes if self.classes == IMAGENET else names}),
            **({"salvage": True} if self.salvage else {}),
        }

    def label_names(self) -> list[str] | str:
        """Return the class names in label order, or the name of the label space.

        Raises:
            PlanError: It is neither a known name nor a file, or the file cannot be read.
        """
        if isinstance(self.label_space, tuple):
            return list(self.label_space)
        if self.label_space in LABEL_SPACES:
            return self.label_space
        if "/" not in self.label_space and not Path(self.label_space).exists():
            raise PlanError(
                f"unknown label space {self.label_space!r}",
                expected=f"{', '.join(LABEL_SPACES)}, or a file of class names",
            )
        return list(read_names(Path(self.label_space)))


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The options of the computation; the result does not depend on them.

    Attributes:
        workers: Worker processes; None for one per core that this process may use.
        max_rejected: The maximum number of rejected images, or their maximum share such as ``1%``. Those that
            ``--duplicates reject`` rejects do not count.
        executor: ``local`` or ``dask``.
        scheduler: Address of the Dask scheduler.
        force: Start over if another plan was begun, and replace a finished folder once the new one is whole.
    """

    workers: int | None = None
    max_rejected: str = "1%"
    executor: str = "local"
    scheduler: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        process_count(self.workers)  # raises if it is out of range
        if not _BUDGET.fullmatch(self.max_rejected):
            raise PlanError(
                "--max-rejected is not a budget", expected="a number or a share as 1%", got=self.max_rejected
            )
        check_executor(self.executor, self.scheduler)

    def allowed(self, found: int) -> float:
        """Return how many of ``found`` images may be rejected."""
        number = float(self.max_rejected.removesuffix("%"))
        return found * number / 100 if self.max_rejected.endswith("%") else number


def read_names(path: Path) -> tuple[str, ...]:
    """Read a list of class names, one per line; blank lines and everything after a tab are ignored.

    Raises:
        PlanError: The file cannot be read, is empty, or names a class twice.
    """
    names = tuple(name for line in _lines(path, "class names") if (name := line.split("\t")[0].strip()))
    if not names or len(set(names)) != len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)[:10]
        raise PlanError(f"{path}: not a list of class names", expected="each name once", got=", ".join(twice) or "none")
    return names


def read_renames(path: Path | None) -> Mapping[str, str]:
    """Read lines of ``old<TAB>new`` class names; return nothing without a file.

    Raises:
        PlanError: It cannot be read, or is not such a list.
    """
    if path is None:
        return {}
    renames: dict[str, str] = {}
    for line in filter(str.strip, _lines(path, "renamed classes")):
        pair = [part.strip() for part in line.split("\t")]
        if len(pair) != 2 or any(map(name_fault, pair)) or pair[0] in renames:
            raise PlanError(f"{path}: not a list of renamed classes", expected="lines of old<TAB>new", got=repr(line))
        renames[pair[0]] = pair[1]
    if not renames:
        raise PlanError(f"{path}: not a list of renamed classes", expected="lines of old<TAB>new", got="none")
    return renames


def _lines(path: Path, what: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # a name may hold any other separator
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read as a list of {what}", got=str(error)) from error
