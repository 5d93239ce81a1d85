"""Filter, sort and search the records of a folder, and group equal ones, in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import PipelineError
from imnet_prep.records.line_index import ListIndex
from imnet_prep.records.table import RowTable
from imnet_prep.show.gather import CHANGES
from imnet_prep.types import Change

Positions = NDArray[np.int32]
MAX_SIDE = 1 << 20
MAX_TEXT = 200
FEW = 10_000  # occurrences of a word
CACHED_LISTS = 8  # lists that are kept, of 4 to 8 bytes per record
SHAPES = {
    "landscape": "wider than tall",
    "portrait": "taller than wide",
    "square": "square",
    "long": "longer than 2 to 1",
}
SORTS = {
    "": "as stored",
    "name": "file name",
    "small": "smallest first",
    "large": "largest first",
    "narrow": "narrowest first",
    "wide": "widest first",
    "light": "fewest bytes first",
    "heavy": "most bytes first",
}
_DESCENDING = {"large": "small", "wide": "narrow", "heavy": "light"}


def number_of(given: Mapping[str, str], name: str, low: int, high: int, default: int) -> int:
    """Return a whole number of a query.

    Raises:
        PipelineError: It is out of range.
    """
    text = given.get(name) or str(default)
    digits = text.removeprefix("-")[:24]
    if not (digits.isascii() and digits.isdecimal() and low <= int(text[:24]) <= high):
        raise PipelineError(f"{name} is out of range", expected=f"{low} to {high}", got=repr(text[:40]))
    return int(text[:24])


@dataclass(frozen=True, slots=True)
class Query:
    """Which records a list has, and in which order; the defaults take all, as stored.

    Attributes:
        split: Of this split. label: Of this class.
        name: With all of these words in their file_name.
        change: Of which this was changed or noticed (:class:`~imnet_prep.types.Change`), or ``none``.
        shape: A key of ``SHAPES``. sort: A key of ``SORTS``.
        least: The short side has so many pixels or more. most: Or fewer.
    """

    split: str = ""
    label: int | None = None
    name: str = ""
    change: str = ""
    shape: str = ""
    sort: str = ""
    least: int = 0
    most: int = MAX_SIDE

    @classmethod
    def parse(cls, given: Mapping[str, str], splits: Sequence[str], classes: int) -> Self:
        """Read a query from the parameters of a URL.

        Args:
            given: The parameters.
            splits: The splits that there are. classes: The number of classes.

        Raises:
            PipelineError: A value is none of those that are possible.
        """
        choices = {"split": splits, "change": (*CHANGES, "none"), "shape": tuple(SHAPES), "sort": tuple(SORTS)}
        texts = {name: given.get(name, "") for name in choices}
        for name, text in texts.items():
            if text and text not in choices[name]:
                expected = ", ".join(filter(None, choices[name]))
                raise PipelineError(f"{name} is unknown", expected=f"one of {expected}", got=repr(text[:40]))
        return cls(
            label=number_of(given, "label", -1, classes - 1, 0) if given.get("label") else None,
            name=" ".join(given.get("name", "")[:MAX_TEXT].split()),
            least=number_of(given, "least", 0, MAX_SIDE, 0),
            most=number_of(given, "most", 0, MAX_SIDE, MAX_SIDE),
            **texts,
        )

    def values(self) -> dict[str, object]:
        """Return what differs from the defaults, as the parameters of a URL."""
        return {one.name: value for one in fields(self) if (value := asdict(self)[one.name]) != one.default}


class Columns:
    """What the lists of a folder need of each record, in stored order; about 120 bytes per record with its name.

    Attributes:
        ids: uint64 (N,). label: int32 (N,). width: int32 (N,), pixels. height: int32 (N,), pixels.
        size: int64 (N,), stored bytes. changes: uint16 (N,), see :class:`~imnet_prep.records.line_index.ListIndex`.
        first_of_class: The position of the first record of each label.
        same: int32, positions of the records whose bytes are stored more than once, those of the same bytes together.
        groups: int64, where each group begins in ``same``, and the end of the last.
        across_classes: bool, by group: its labels differ. across_splits: Likewise.
    """

    def __init__(self, tables: Sequence[RowTable], lists: Sequence[ListIndex]) -> None:
        """Join the splits of a folder."""
        self._lists = lists
        self.ids = np.concatenate([table.ids for table in tables])
        self.label = np.concatenate([table.label for table in tables])
        self.width = np.concatenate([table.width for table in tables])
        self.height = np.concatenate([table.height for table in tables])
        self.size = np.concatenate([table.size for table in tables])
        self.changes = np.concatenate([index.changes for index in lists])
        self._starts = np.cumsum([0, *(len(table) for table in tables)])
        self._lowered = [index.names.lower() for index in lists]
        labels, first = np.unique(self.label, return_index=True)
        self.first_of_class = dict(zip(labels.tolist(), first.tolist(), strict=True))
        self._orders = self._sort()
        self._group(np.concatenate([table.digest for table in tables]))
        self.find = lru_cache(CACHED_LISTS)(self._find)

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, position: int) -> tuple[int, int]:
        """Return the number of a record's split, and its position there."""
        split = int(np.searchsorted(self._starts, position, "right")) - 1
        return split, position - int(self._starts[split])

    def name(self, position: int) -> str:
        """Return the listed file_name of a record."""
        split, number = self.place(position)
        return self._lists[split].name(number)

    def _sort(self) -> dict[str, NDArray[np.int32]]:
        names = [name for index in self._lists for name in index.names.split(b"\n")[:-1]]
        keys = {
            "small": np.minimum(self.width, self.height),
            "narrow": self.width / np.maximum(1, self.height),
            "light": self.size,
        }
        orders = {key: np.argsort(values, kind="stable").astype(np.int32) for key, values in keys.items()}
        return {"name": np.array(sorted(range(len(names)), key=names.__getitem__), np.int32), **orders}

    def _group(self, digests: NDArray[np.uint64]) -> None:
        """Group the records of equal bytes, in the order of their first."""
        order = np.argsort(digests, kind="stable").astype(np.int32)
        equal = digests[order][1:] == digests[order][:-1]
        inside = np.concatenate([[False], equal])
        repeated = inside | np.concatenate([equal, [False]])
        same, first = order[repeated], np.flatnonzero(~inside[repeated])
        lengths = np.diff(np.append(first, len(same)))
        by_first = np.argsort(same[first], kind="stable")
        self.groups = np.concatenate([[0], np.cumsum(lengths[by_first])])
        shift = np.repeat(first[by_first] - self.groups[:-1], lengths[by_first])
        self.same = same[np.arange(len(same)) + shift]
        split = np.searchsorted(self._starts, self.same, "right")
        self.across_classes, self.across_splits = (
            _differ(values, self.groups[:-1]) for values in (self.label[self.same], split)
        )

    def _find(self, query: Query, split: int | None) -> Positions:
        """Return the positions of the records that a query asks for, in its order.

        Args:
            query: The query.
            split: The number of its split; None for all.
        """
        kept = self._kept(query, split)
        if not query.sort:
            return np.flatnonzero(kept).astype(np.int32)
        order = self._orders[_DESCENDING.get(query.sort, query.sort)]
        if query.sort in _DESCENDING:
            order = order[::-1]
        return np.asarray(order[kept[order]])

    def _kept(self, query: Query, split: int | None) -> NDArray[np.bool_]:
        kept = np.ones(len(self), np.bool_)
        width, height = self.width, self.height
        if split is not None:
            kept[: self._starts[split]] = kept[self._starts[split + 1] :] = False
        if query.label is not None:
            kept &= self.label == query.label
        if query.change == "none":
            kept &= self.changes == 0
        elif query.change:
            kept &= (self.changes >> list(Change).index(Change(query.change)) & 1).astype(np.bool_)
        if query.shape:
            kept &= _has_shape(query.shape, width, height)
        if query.least or query.most < MAX_SIDE:
            short = np.minimum(width, height)
            kept &= (short >= query.least) & (short <= query.most)
        for word in query.name.split():
            kept &= self._with_word(word.encode(errors="replace").lower())
        return kept

    def _with_word(self, word: bytes) -> NDArray[np.bool_]:
        """Return which names contain a word; A to Z match a to z.

        A word of few names is found one occurrence after the other, another by comparing all text with each byte of it.
        """
        parts = []
        for index, names in zip(self._lists, self._lowered, strict=True):
            at = names.find(word)
            places: list[int] = []
            while at >= 0 and len(places) < FEW:
                places.append(at)
                at = names.find(word, at + 1)
            if at < 0:
                found = np.zeros(len(index.changes), np.bool_)
                found[np.searchsorted(index.starts, places, "right") - 1] = True
            else:
                text = np.frombuffer(names, np.uint8)
                begins = text == word[0]
                for place, byte in enumerate(word[1:], 1):
                    begins[:-place] &= text[place:] == byte  # no name is left before its end: no word has a newline
                found = np.logical_or.reduceat(begins, index.starts[:-1])
            parts.append(found)
        return np.concatenate(parts)


def _has_shape(shape: str, width: NDArray[np.int32], height: NDArray[np.int32]) -> NDArray[np.bool_]:
    if shape == "long":
        return np.greater(np.maximum(width, height), 2 * np.minimum(width, height))
    if shape == "square":
        return np.equal(width, height)
    return np.greater(width, height) if shape == "landscape" else np.less(width, height)


def _differ(values: NDArray[np.int32] | NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each group of values whether it has different ones."""
    if not len(starts):
        return np.zeros(0, np.bool_)
    return np.asarray(np.minimum.reduceat(values, starts) != np.maximum.reduceat(values, starts))
