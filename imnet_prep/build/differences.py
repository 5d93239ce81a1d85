"""Say in what a plan differs from the one that made a folder, or that was begun there."""

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from imnet_prep.build.plan import Plan, load_plan, shard_refs
from imnet_prep.records.manifest import Manifest

_UNKNOWN = "other images, options or version"
_NO_OPTIONS = {"max_pixels"}
_OF_RESHARDING = {"seed", "shards"}  # the other options in its manifest are those of the records that it took


@dataclass(frozen=True, slots=True)
class Made:
    """What is known of an earlier plan.

    Attributes:
        options: As the manifest records them, with ``seed`` and ``label_space``.
        classes: Names in label order.
        found: Images found, rejected ones too, by split.
        database: The plan itself, or None.
    """

    options: Mapping[str, Any]
    classes: Sequence[str]
    found: Mapping[str, int]
    database: Path | None = None

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        """Return what a finished folder says of its plan."""
        options = {**manifest.options, "seed": manifest.seed, "label_space": manifest.label_space}
        found = {name: split.images + sum(split.rejected.values()) for name, split in manifest.splits.items()}
        return cls(options, manifest.classes, found)

    @classmethod
    def of_plan(cls, plan: Plan, options: Mapping[str, Any]) -> Self:
        """Return the same of a plan with the options that it was made with."""
        found = Counter({name: split.images for name, split in plan.splits.items()})
        found.update(item.split for item in plan.rejected)
        return cls(options, plan.classes, found, plan.database)


def options_of(plan: Plan) -> dict[str, Any]:
    """Return the options of a plan, as :class:`Made` compares them."""
    return {**plan.options.content(), "seed": plan.options.seed, "label_space": plan.label_space}


def begun_plan(database: Path, note: Mapping[str, Any], plan: Plan) -> Made | None:
    """Return what is known of the plan that was begun; None where it cannot be read, or an old version began it."""
    before = load_plan(database, plan.options)
    return None if before is None or "options" not in note else Made.of_plan(before, note["options"])


def differences(before: Made | None, plan: Plan) -> str:
    """Return in what a plan differs from an earlier one: the options that do, else the classes, else the images."""
    if before is None:
        return _UNKNOWN
    now = Made.of_plan(plan, options_of(plan))
    names = _OF_RESHARDING if _takes_records(plan) else {**before.options, **now.options}.keys() - _NO_OPTIONS
    other = [name for name in sorted(names) if before.options.get(name) != now.options.get(name)]
    if other:
        values = ((f"--{name.replace('_', '-')}", before.options.get(name), now.options.get(name)) for name in other)
        return ", ".join(f"{name} was {_value(one)}, now {_value(two)}" for name, one, two in values)
    parts = list(_classes(before.classes, now.classes))
    if before.database is not None and not parts:
        with suppress(sqlite3.Error):
            parts = _images(before.database, plan.database)
    if not parts:
        splits = {**before.found, **now.found}
        pairs = ((name, before.found.get(name, 0), now.found.get(name, 0)) for name in splits)
        parts = [f"{name} had {one:,} images, now {two:,}" for name, one, two in pairs if one != two]
    return ", ".join(parts) or "the images have other names, sizes or URLs, or another version made it"


def _takes_records(plan: Plan) -> bool:
    return any(ref.line for ref in shard_refs(plan.database, 1, 2))


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} names from {value[0]} on"
    return "not given" if value is None else str(value)


def _classes(before: Sequence[str], now: Sequence[str]) -> Iterator[str]:
    for names, what in ((sorted(set(now) - set(before)), "new"), (sorted(set(before) - set(now)), "gone")):
        if names:
            yield f"{'1 class is' if len(names) == 1 else f'{len(names):,} classes are'} {what} (the first {names[0]})"


def _images(before: Path, now: Path) -> list[str]:
    """Compare the images of two plans, each in its file."""
    parts: list[str] = []
    with closing(sqlite3.connect(now)) as connection:
        connection.execute("ATTACH ? AS before", (os.fsencode(before),))
        for columns, one, two, what in (
            ("split, file_name", "main", "before", "new"),
            ("split, file_name", "before", "main", "gone"),
            ("split, file_name, size, url, status, meta", "main", "before", "changed"),
        ):
            query = f"SELECT {columns} FROM {one}.image EXCEPT SELECT {columns} FROM {two}.image"
            count, first = connection.execute(f"SELECT COUNT(*), MIN(file_name) FROM ({query})").fetchone()
            if count and not (what == "changed" and parts):
                parts.append(f"{count:,} {'image is' if count == 1 else 'images are'} {what} (the first {first})")
    return parts
