"""The pages of the browser: overview, classes, lists of images, rejected images, duplicates, and one record."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from flask import abort, request

from imnet_prep.errors import PipelineError
from imnet_prep.loader.options import TrainOptions
from imnet_prep.loader.random_numbers import MAX_SEED
from imnet_prep.show.browse_data import VIEW_SIDE, Library
from imnet_prep.show.browse_lists import MAX_SIDE, SHAPES, SORTS, Query, number_of
from imnet_prep.show.gather import CHANGES

Route = Callable[[str], Callable[[Callable[..., Any]], object]]
Page = Callable[..., str]
MOSAIC, PAGE_IMAGES, PAGE_CLASSES, PAGE_REJECTED, PAGE_GROUPS, GROUP_IMAGES = 32, 60, 40, 50, 16, 8
_MAX_NUMBER = 1 << 31
_DRAWS = {  # of the form on a record's page: captions and defaults
    "crop": ("smallest crop", 0.08),
    "flip": ("flip", 0.5),
    "jitter": ("colour jitter", 0.0),
    "ops": ("RandAugment operations", 0.0),
    "erase": ("erasing", 0.0),
}


@dataclass(frozen=True, slots=True)
class Tile:
    """A record in a grid: the path of its page after ``/record/``, its file name, class and pixels."""

    place: str
    name: str
    words: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Pages:
    """A list that comes in pages.

    Attributes:
        path: The path of its URL. values: The other parameters.
        number: The page that is shown, from 1. size: Items per page. count: Items in all.
    """

    path: str
    values: dict[str, object]
    number: int
    size: int
    count: int

    @property
    def last(self) -> int:
        """The number of pages, at least 1."""
        return max(1, -(-self.count // self.size))

    @property
    def items(self) -> slice:
        """The items of the page that is shown."""
        return slice((self.number - 1) * self.size, self.number * self.size)

    def link(self, number: int) -> str:
        """Return the URL of a page; empty if there is none of that number."""
        values = {**self.values, "page": number} if number > 1 else self.values
        return f"{self.path}{'?' if values else ''}{urlencode(values)}" if 1 <= number <= self.last else ""


def add_lists(get: Route, library: Library, page: Page) -> None:
    """Add the pages that list classes and images."""

    @get("/")
    def overview() -> str:
        draw = number_of(request.args, "draw", 0, _MAX_NUMBER, 0)
        total = len(library.columns)
        chosen = np.random.default_rng(draw).choice(total, min(MOSAIC, total), replace=False, shuffle=False)
        splits = library.manifest.splits.values()
        changes = sum((Counter(split.changes) for split in splits), Counter[str]())
        return page(
            "browse_overview.html",
            area="overview",
            tiles=[_tile(library, position) for position in sorted(chosen.tolist())],
            draw=draw,
            rejected=sum(sum(split.rejected.values()) for split in splits),
            repeated=len(library.columns.same) - len(library.columns.across_splits),
            changes=[(change, text, changes[change]) for change, text in CHANGES.items() if changes[change]],
        )

    @get("/classes")
    def classes() -> str:
        search = request.args.get("q", "")[:200]
        labels = library.find_classes(search)
        pages = _pages("/classes", {"q": search} if search else {}, PAGE_CLASSES, len(labels))
        first = library.columns.first_of_class
        shown = [(label, _tile(library, first[label]) if label in first else None) for label in labels[pages.items]]
        unlabelled = len(library.find(Query(label=-1))) if -1 in first else 0
        return page(
            "browse_classes.html", area="classes", search=search, shown=shown, pages=pages, unlabelled=unlabelled
        )

    @get("/images")
    def images() -> str:
        return listed(_query(library))

    @get("/class/<int(signed=True):label>")
    def class_page(label: int) -> str:
        if not -1 <= label < len(library.manifest.classes):
            abort(404)
        return listed(replace(_query(library), label=label))

    def listed(query: Query) -> str:
        found = library.find(query)
        path, values = _list_address(query)
        pages = _pages(path, values, PAGE_IMAGES, len(found))
        return page(
            "browse_images.html",
            area="images",
            query=query,
            pages=pages,
            tiles=[_tile(library, position) for position in found[pages.items].tolist()],
            to_record=urlencode(query.values() or {"split": ""}),
            choices={
                "split": {name: name for name in library.splits},
                "change": {**CHANGES, "none": "Nothing"},
                "shape": SHAPES,
                "sort": SORTS,
            },
            max_side=MAX_SIDE,
        )


def add_reviews(get: Route, library: Library, page: Page) -> None:
    """Add the pages that list what deserves a second look: rejected images and duplicates."""

    @get("/rejected")
    def rejected() -> str:
        index = library.rejected()
        values = {name: text for name in ("reason", "split") if (text := request.args.get(name, "")[:200])}
        kept = np.ones(len(index.reasons), np.bool_)
        for name, text in values.items():
            kept &= (index.reasons if name == "reason" else index.splits) == text
        numbers = np.flatnonzero(kept)
        pages = _pages("/rejected", dict(values), PAGE_REJECTED, len(numbers))
        shown = numbers[pages.items].tolist()
        return page(
            "browse_rejected.html",
            area="rejected",
            pages=pages,
            items=list(zip(shown, index.read(shown), strict=True)),
            values=values,
            choices={
                name: dict(sorted(Counter(every.tolist()).items()))
                for name, every in (("reason", index.reasons), ("split", index.splits))
            },
        )

    @get("/duplicates")
    def duplicates() -> str:
        columns = library.columns
        every = np.ones(len(columns.across_splits), np.bool_)
        kinds = {"": every, "classes": columns.across_classes, "splits": columns.across_splits}
        kind = request.args.get("across", "")
        if kind not in kinds:
            abort(404)
        groups = np.flatnonzero(kinds[kind])
        pages = _pages("/duplicates", {"across": kind} if kind else {}, PAGE_GROUPS, len(groups))
        shown = []
        for group in groups[pages.items].tolist():
            same = columns.same[columns.groups[group] : columns.groups[group + 1]]
            tiles = [_tile(library, position) for position in same[:GROUP_IMAGES].tolist()]
            shown.append((len(same), tiles, bool(columns.across_classes[group]), bool(columns.across_splits[group])))
        counts = {name: int(which.sum()) for name, which in kinds.items()}
        return page("browse_duplicates.html", area="duplicates", kind=kind, pages=pages, shown=shown, counts=counts)


def add_record(get: Route, library: Library, page: Page) -> None:
    """Add the page of one record."""

    @get("/record/<split>/<int:number>")
    def record(split: str, number: int) -> str:
        position, columns = library.splits[split].start + number, library.columns
        label, values = int(columns.label[position]), train_values(request.args)
        train_options(values)
        own = Query(split=split, label=label if label < len(library.manifest.classes) else None)
        query, here, around = _neighbours(library, position, own)
        path, of_list = _list_address(query)
        list_page = here.place // PAGE_IMAGES + 1
        row = library.row(position)
        return page(
            "browse_record.html",
            area="images",
            tile=_tile(library, position),
            row=row,
            line=library.line(position),
            fields=library.fields(position),
            record_id=int(columns.ids[position]),
            label=label,
            here=here,
            around=around,
            of_list=query.values() or {"split": ""},
            list_link=Pages(path, of_list, list_page, PAGE_IMAGES, here.count).link(list_page),
            list_words=_described(library, query),
            changes=CHANGES,
            form=_DRAWS,
            values=values,
            seed=number_of(request.args, "seed", 0, MAX_SEED, 0),
            side=VIEW_SIDE,
        )


@dataclass(frozen=True, slots=True)
class Here:
    """Where a record is in a list: its place from 0, and the number of records there."""

    place: int
    count: int


def _neighbours(library: Library, position: int, own: Query) -> tuple[Query, Here, tuple[str, str]]:
    """Return the list that a record is looked at in, where it is there, and the places of those before and after.

    Args:
        library: The records.
        position: The record.
        own: The list of its class and split, which is used where the URL names none that the record is in.
    """
    asked = _query(library)
    for query in [asked, own] if asked.values() or "split" in request.args else [own]:
        found = library.find(query)
        at = np.flatnonzero(found == position)
        if len(at):
            break
    here = Here(int(at[0]), len(found))
    before, after = (
        _place(library, int(found[place])) if 0 <= place < here.count else ""
        for place in (here.place - 1, here.place + 1)
    )
    return query, here, (before, after)


def _query(library: Library) -> Query:
    return Query.parse(request.args, list(library.splits), len(library.manifest.classes))


def _pages(path: str, values: dict[str, object], size: int, count: int) -> Pages:
    pages = Pages(path, values, number_of(request.args, "page", 1, _MAX_NUMBER, 1), size, count)
    if pages.number > pages.last:
        abort(404)
    return pages


def _list_address(query: Query) -> tuple[str, dict[str, object]]:
    """Return the path of a list and its other parameters."""
    values = query.values()
    label = values.pop("label", None)
    return ("/images" if label is None else f"/class/{label}"), values


def _place(library: Library, position: int) -> str:
    split, number = library.place(position)
    return f"{quote(split)}/{number}"


def _tile(library: Library, position: int) -> Tile:
    columns = library.columns
    label = int(columns.label[position])
    manifest = library.manifest
    known = 0 <= label < len(manifest.classes)
    words = (manifest.class_words[label].partition(",")[0] or manifest.classes[label]) if known else "no label"
    size = int(columns.width[position]), int(columns.height[position])
    return Tile(_place(library, position), columns.name(position), words, *size)


def _described(library: Library, query: Query) -> str:
    """Return what a list holds, in words."""
    parts = [f"split {query.split}"] if query.split else []
    if query.label is not None:
        parts.append(f"class {library.manifest.classes[query.label]}" if query.label >= 0 else "without a label")
    if query.name:
        parts.append(f"named {query.name}")
    if query.change:
        parts.append("changed in nothing" if query.change == "none" else CHANGES[query.change].lower())
    if query.shape:
        parts.append(SHAPES[query.shape])
    if query.least:
        parts.append(f"short side from {query.least}")
    if query.most < MAX_SIDE:
        parts.append(f"short side up to {query.most}")
    if query.sort:
        parts.append(SORTS[query.sort])
    return ", ".join(parts) or "all images"


def train_values(given: Mapping[str, str]) -> dict[str, float]:
    """Return the augmentation that a query asks for.

    Raises:
        PipelineError: A value is not a number.
    """
    values: dict[str, float] = {}
    for name, (caption, default) in _DRAWS.items():
        text = given.get(name) or default
        try:
            values[name] = float(text)
            if not math.isfinite(values[name]):
                raise ValueError(text)
        except ValueError as error:
            raise PipelineError(f"{caption} is not a number", got=repr(text)[:40]) from error
    return values


def train_options(values: dict[str, float]) -> TrainOptions:
    """Turn the values of the form into the loader's options.

    Raises:
        PipelineError: One is out of range.
    """
    jitter = values["jitter"]
    return TrainOptions(
        batch_size=1,
        image_size=VIEW_SIDE,
        scale=(values["crop"], 1.0),
        flip_prob=values["flip"],
        color_jitter=(jitter, jitter, jitter, 0.0),
        randaugment_ops=int(values["ops"]),
        erasing_prob=values["erase"],
    )
