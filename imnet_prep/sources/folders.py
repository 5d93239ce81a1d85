"""Folders of images: class folders, flat labelled folders, Tiny-ImageNet; one class in memory at a time."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from imnet_prep.sources.base import (
    Found,
    Source,
    ignored_note,
    is_hidden,
    is_image_name,
    make_ref,
    printable,
    suffix_of,
)
from imnet_prep.sources.labels import Labels, class_of
from imnet_prep.types import SPLITS, Reason, Rejected

_MAX_DEPTH = 16  # folders below a class folder


class _Entry(NamedTuple):
    """A file below a folder: its path within, its size, or why it cannot be read."""

    name: str
    path: str
    size_bytes: int
    fault: str = ""


@dataclass(frozen=True, slots=True)
class ClassFolders:
    """``<folder>/<class>/<image>``; ``below`` is a folder between class and image, ``images/``, no part of the name."""

    split: str
    folder: Path
    below: str = ""

    def walk(self, ignored: Counter[str], notes: list[str]) -> Iterator[Found]:
        """Yield the images of one class after the other."""
        root, empty = os.stat(self.folder), []
        for entry in _listing(self.folder):
            if is_hidden(entry.name) or not _is_folder(entry):
                ignored[suffix_of(entry.name)] += 1
                continue
            files = list(_files(Path(entry.path), "", {(root.st_dev, root.st_ino)}, ignored))
            if not files:
                empty.append(printable(entry.name))
            for name, file in sorted((file.name.removeprefix(self.below), file) for file in files):
                yield _found(self.split, entry.name, name, file)
        if empty:
            listed = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
            notes.append(f"{self.split}: {len(empty)} class folders without images ({listed})")


@dataclass(frozen=True, slots=True)
class FlatFolder:
    """``<folder>/<image>``, labelled by a list, or not at all (the test split)."""

    split: str
    folder: Path
    labels: Labels | None = None

    def walk(self, ignored: Counter[str], notes: list[str]) -> Iterator[Found]:
        """Yield the images by class and name."""
        labelled: list[tuple[str, _Entry]] = []
        for file in _files(self.folder, "", set(), ignored, deep=self.labels is None):
            wnid = class_of(file.name, self.split, self.labels)
            if isinstance(wnid, Rejected):
                yield wnid
            else:
                labelled.append((wnid, file))
        labelled.sort()
        for wnid, file in labelled:
            yield _found(self.split, wnid, file.name, file)
        if self.labels is not None:
            notes += self.labels.missing(file.name for _, file in labelled)


Part = ClassFolders | FlatFolder


def needs_labels(part: Part) -> bool:
    """Tell whether a part holds validation images whose classes are not known yet."""
    return isinstance(part, FlatFolder) and part.split == "val" and part.labels is None


def with_labels(parts: Sequence[Part], labels: Labels) -> list[Part]:
    """Return the parts, with labels for those that need them."""
    return [FlatFolder(part.split, part.folder, labels) if needs_labels(part) else part for part in parts]


class FolderSource(Source):
    """A folder whose splits are :class:`ClassFolders` or :class:`FlatFolder`."""

    def __init__(self, path: Path, kind: str, parts: Sequence[Part]) -> None:
        super().__init__(path, kind)
        self.parts = sorted(parts, key=lambda part: SPLITS.index(part.split))

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        for part in self.parts:
            passed = Counter[str]()  # a note a split, in place of one for the folder
            label = self.name if part.folder == self.path else f"{self.name}/{part.folder.relative_to(self.path)}"
            yield from part.walk(passed, notes)
            notes += ignored_note(passed, printable(label))


def _found(split: str, class_name: str, name: str, file: _Entry) -> Found:
    if file.fault:
        return Rejected(split, printable(f"{class_name}/{name}" if class_name else name), Reason.UNREADABLE, file.fault)
    return make_ref(split, class_name, name, file.path, 0, file.size_bytes)


def _files(
    folder: Path, within: str, above: set[tuple[int, int]], ignored: Counter[str], *, deep: bool = True
) -> Iterator[_Entry]:
    """Yield the images in and below a folder. ``above`` holds the folders on the way: a link back to one is a loop."""
    try:
        here = os.stat(folder)
        listing = _listing(folder)
    except OSError as exc:
        yield _Entry(within or ".", str(folder), 0, f"the folder cannot be read: {exc.strerror}")
        return
    if (here.st_dev, here.st_ino) in above or within.count("/") > _MAX_DEPTH:
        ignored["links back to a folder above"] += 1
        return
    for entry in listing:
        is_folder = not is_hidden(entry.name) and _is_folder(entry)
        if is_folder and deep:
            inside = above | {(here.st_dev, here.st_ino)}
            yield from _files(Path(entry.path), f"{within}{entry.name}/", inside, ignored)
        elif is_folder:
            ignored["folders"] += 1
        elif is_hidden(entry.name) or not is_image_name(entry.name):
            ignored[suffix_of(entry.name)] += 1
        else:
            yield _entry(entry, f"{within}{entry.name}")


def _entry(entry: os.DirEntry[str], name: str) -> _Entry:
    try:
        state = entry.stat()
    except OSError as exc:  # a link to nothing, or to itself
        return _Entry(name, entry.path, 0, exc.strerror or type(exc).__name__)
    return _Entry(name, entry.path, state.st_size, "" if stat.S_ISREG(state.st_mode) else "not a regular file")


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def has_image(folder: Path, depth: int = 2) -> bool:
    """Tell whether there is an image in a folder, or up to ``depth`` folders below: stops at the first."""
    try:
        listing = _listing(folder)
    except OSError:
        return False
    if any(is_image_name(entry.name) and not is_hidden(entry.name) and not _is_folder(entry) for entry in listing):
        return True
    folders = (entry for entry in listing if not is_hidden(entry.name) and _is_folder(entry))
    return depth > 0 and any(has_image(Path(entry.path), depth - 1) for entry in folders)


def folders_in(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted, hidden ones left out; links to folders are followed."""
    return [Path(entry.path) for entry in _listing(folder) if not is_hidden(entry.name) and _is_folder(entry)]
