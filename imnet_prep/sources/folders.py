"""Folders of images: class folders, flat labelled folders, Tiny-ImageNet; one class in memory at a time."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from imnet_prep.sources.labels import Labels
from imnet_prep.types import Reason, Rejected

_MAX_DEPTH = 16  # folders below a class folder


@dataclass(frozen=True, slots=True)
class ClassFolders:
    """``<folder>/<class>/<image>``; ``below`` names a folder between class and image that is no part of the name."""

    split: str
    folder: Path
    below: str = ""


@dataclass(frozen=True, slots=True)
class FlatFolder:
    """``<folder>/<image>``, labelled by a list, or not at all (the test split)."""

    split: str
    folder: Path
    labels: Labels | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file below a folder: its path within, its size, or why it cannot be read."""

    name: str
    path: str
    size_bytes: int
    fault: str = ""


class FolderSource(Source):
    """A folder whose splits are :class:`ClassFolders` or :class:`FlatFolder`."""

    def __init__(self, path: Path, kind: str, parts: Sequence[ClassFolders | FlatFolder]) -> None:
        super().__init__(path)
        self.kind = kind
        order = ("train", "val", "test")
        self.parts = sorted(parts, key=lambda part: order.index(part.split))

    def _walk(self, notes: list[str]) -> Iterator[Found]:
        for part in self.parts:
            ignored: Counter[str] = Counter()
            label = self.name if part.folder == self.path else f"{self.name}/{part.folder.relative_to(self.path)}"
            if isinstance(part, ClassFolders):
                yield from _class_folders(part, ignored, notes)
            else:
                yield from _flat(part, ignored, notes)
            notes += ignored_note(ignored, printable(label))


def _class_folders(part: ClassFolders, ignored: Counter[str], notes: list[str]) -> Iterator[Found]:
    root = os.stat(part.folder)
    empty = []
    for entry in _listing(part.folder):
        if is_hidden(entry.name) or not _is_folder(entry):
            ignored[suffix_of(entry.name)] += 1
            continue
        files = list(_files(Path(entry.path), "", {(root.st_dev, root.st_ino)}, ignored))
        if not files:
            empty.append(printable(entry.name))
        prefix = f"{part.below}/" if part.below else ""
        named = sorted((file.name.removeprefix(prefix), file.path, file) for file in files)
        for name, _, file in named:
            yield _found(part.split, entry.name, name, file)
    if empty:
        listed = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
        notes.append(f"{part.split}: {len(empty)} class folders without images ({listed})")


def _flat(part: FlatFolder, ignored: Counter[str], notes: list[str]) -> Iterator[Found]:
    files = list(_files(part.folder, "", set(), ignored, deep=part.labels is None))
    if part.labels is None:
        for file in sorted(files, key=lambda file: (file.name, file.path)):
            yield _found(part.split, "", file.name, file)
        return
    labelled = []
    for file in files:
        wnid = part.labels.of(file.name)
        if wnid is None:
            yield Rejected(part.split, printable(file.name), Reason.UNLABELLED, f"not in {part.labels.origin}")
        else:
            labelled.append((wnid, file.name, file))
    labelled.sort(key=lambda row: row[:2])
    for wnid, name, file in labelled:
        yield _found(part.split, wnid, name, file)
    notes += part.labels.missing(file.name for file in files)


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
        name = f"{within}{entry.name}"
        if is_hidden(entry.name):
            ignored[suffix_of(entry.name)] += 1
        elif _is_folder(entry):
            if deep:
                yield from _files(Path(entry.path), f"{name}/", above | {(here.st_dev, here.st_ino)}, ignored)
            else:
                ignored["folders"] += 1
        elif not is_image_name(entry.name):
            ignored[suffix_of(entry.name)] += 1
        else:
            yield _entry(entry, name)


def _entry(entry: os.DirEntry[str], name: str) -> _Entry:
    try:
        state = entry.stat()
    except OSError as exc:  # a link to nothing, or to itself
        return _Entry(name, entry.path, 0, exc.strerror or type(exc).__name__)
    if not stat.S_ISREG(state.st_mode):
        return _Entry(name, entry.path, 0, "not a regular file")
    return _Entry(name, entry.path, state.st_size)


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
    """The folders directly in a folder, sorted, hidden ones left out; links to folders are followed."""
    return [Path(entry.path) for entry in _listing(folder) if not is_hidden(entry.name) and _is_folder(entry)]
