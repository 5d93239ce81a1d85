"""Folders of images: class folders, flat labelled folders, downloads; one class in memory at a time."""

import os
import sqlite3
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from imnet_prep.errors import DownloadError, SourceError
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
from imnet_prep.sources.labels import Labels, labelled
from imnet_prep.types import SPLITS, ImageRef, Reason, Rejected

_MAX_DEPTH = 16  # folders below a class folder
_SEPARATOR = "\x1f"  # no URL and no file name of the journal holds a control character


class _Entry(NamedTuple):
    """A file below a folder: its path within, its size, or why it cannot be read."""

    name: str
    path: str
    size_bytes: int
    fault: str = ""


@dataclass(slots=True)
class ClassFolders:
    """``<folder>/<class>/<image>``; ``below`` is a folder between class and image (``images/``) left out of names."""

    split: str
    folder: Path
    below: str = ""

    def walk(self, ignored: Counter[str], notes: list[str]) -> Iterator[Found]:
        """Yield the images, class by class."""
        root, empty = os.stat(self.folder), []
        for entry in _listing(self.folder):
            if not _is_folder(entry):
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


@dataclass(slots=True)
class FlatFolder:
    """``<folder>/<image>``, labelled by a list, or not at all (the test split)."""

    split: str
    folder: Path
    labels: Labels | None = None

    def walk(self, ignored: Counter[str], notes: list[str]) -> Iterator[Found]:
        """Yield the images by class and name."""
        files = ((file.name, file) for file in _files(self.folder, "", set(), ignored, deep=self.labels is None))
        for found in labelled(files, self.split, self.labels, notes):
            yield found if isinstance(found, Rejected) else _found(self.split, *found)


Part = ClassFolders | FlatFolder


class FolderSource(Source):
    """A folder whose splits are :class:`ClassFolders` or :class:`FlatFolder`."""

    def __init__(self, path: Path, kind: str, parts: Sequence[Part]) -> None:
        super().__init__(path, kind)
        self._parts = sorted(parts, key=lambda part: SPLITS.index(part.split))

    def unlabelled(self) -> Sequence[FlatFolder]:
        """Return the parts that hold validation images whose classes are not known yet."""
        flat = (part for part in self._parts if isinstance(part, FlatFolder))
        return [part for part in flat if part.split == "val" and part.labels is None]

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        for part in self._parts:
            passed = Counter[str]()  # for a note per split
            label = self.name if part.folder == self.path else f"{self.name}/{part.folder.relative_to(self.path)}"
            yield from part.walk(passed, notes)
            notes += ignored_note(passed, printable(label))


class DownloadFolder(Source):
    """A folder made by ``imnet-prep download``: the images that its journal lists as finished, each with its URL."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        from imnet_prep.download.journal import read_finished  # other sources start faster without it

        classes = defaultdict[str, bytearray](bytearray)  # packed rows: a list may have produced millions of images
        try:
            for done in read_finished(self.path):
                name = done.path.rpartition("/")[2]
                row = _SEPARATOR.join((name, done.path, str(done.size_bytes), str(done.status), done.url))
                classes[done.wnid] += row.encode("utf-8", "surrogateescape") + b"\n"
        except DownloadError as error:
            raise SourceError(error.what, expected=error.expected, got=error.got, remedy=error.remedy) from error
        except sqlite3.DatabaseError as error:
            raise SourceError(f"{self.path}: its journal.sqlite cannot be read", got=str(error)) from error
        for wnid in sorted(classes):
            rows = classes[wnid].decode("utf-8", "surrogateescape").split("\n")[:-1]
            for name, path, size_bytes, status, url in sorted(row.split(_SEPARATOR) for row in rows):
                found = make_ref(self.split, wnid, name, str(self.path / path), 0, int(size_bytes))
                known = int(status) if status.isdecimal() else None
                yield replace(found, url=url, status=known) if isinstance(found, ImageRef) else found


def _found(split: str, class_name: str, name: str, file: _Entry) -> Found:
    if file.fault:
        return Rejected(split, printable(f"{class_name}/{name}" if class_name else name), Reason.UNREADABLE, file.fault)
    return make_ref(split, class_name, name, file.path, 0, file.size_bytes)


def _files(
    folder: Path, within: str, above: set[tuple[int, int]], ignored: Counter[str], *, deep: bool = True
) -> Iterator[_Entry]:
    """Yield the images in and below a folder; ``above`` holds its parents, to detect a link back to one of them."""
    try:
        here, listing = os.stat(folder), _listing(folder)
    except OSError as error:
        yield _Entry(within or ".", str(folder), 0, f"the folder cannot be read: {error.strerror}")
        return
    if (here.st_dev, here.st_ino) in above or within.count("/") > _MAX_DEPTH:
        ignored["links back to a folder above"] += 1
        return
    for entry in listing:
        if deep and _is_folder(entry):
            inside = above | {(here.st_dev, here.st_ino)}
            yield from _files(Path(entry.path), f"{within}{entry.name}/", inside, ignored)
        elif is_image_name(entry.name) and not _is_folder(entry):
            yield _entry(entry, f"{within}{entry.name}")
        else:
            ignored["folders" if _is_folder(entry) else suffix_of(entry.name)] += 1


def _entry(entry: os.DirEntry[str], name: str) -> _Entry:
    try:
        state = entry.stat()
    except OSError as error:  # a link to nothing, or to itself
        return _Entry(name, entry.path, 0, error.strerror or type(error).__name__)
    return _Entry(name, entry.path, state.st_size, "" if stat.S_ISREG(state.st_mode) else "not a regular file")


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a visible folder; links are followed."""
    try:
        return entry.is_dir() and not is_hidden(entry.name)
    except OSError:  # a link to itself
        return False


def has_image(folder: Path, depth: int = 2) -> bool:
    """Return whether there is an image in a folder, or up to ``depth`` folders below; stop at the first."""
    try:
        listing = _listing(folder)
    except OSError:
        return False
    if any(is_image_name(entry.name) and not _is_folder(entry) for entry in listing):
        return True
    return depth > 0 and any(has_image(Path(entry.path), depth - 1) for entry in listing if _is_folder(entry))


def folders_in(folder: Path) -> list[Path]:
    """Return the visible folders directly in a folder, sorted; links to folders are followed."""
    return [Path(entry.path) for entry in _listing(folder) if _is_folder(entry)]
