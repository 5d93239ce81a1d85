"""Folders of images: class folders, flat labelled folders, downloads; one class in memory at a time."""

import json
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imnet_prep.errors import DownloadError, SourceError
from imnet_prep.sources.base import (
    Found,
    Source,
    ignored_note,
    is_hidden,
    make_ref,
    meta_text,
    printable,
)
from imnet_prep.sources.foreign import ENDINGS
from imnet_prep.sources.labels import WNID, Labels, labelled
from imnet_prep.sources.layout import SPLIT_FOLDERS
from imnet_prep.sources.tree import (
    Entry,
    Tree,
    has_image,
    is_folder,
    is_image,
    kind_of,
    listed,
    listing,
    visible_folders,
)
from imnet_prep.types import SPLITS, ImageRef, Reason, Rejected

_SEPARATOR = "\x1f"  # no URL and no file name of the journal holds a control character
_ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".parquet", *ENDINGS)


@dataclass(slots=True)
class ClassFolders:
    """``<folder>/<class>/<image>``; ``below`` is a folder between class and image (``images/``) left out of names."""

    split: str
    folder: Path
    below: str = ""

    def walk(self, tree: Tree, ignored: Counter[str], notes: list[str]) -> Iterator[Found]:
        """Yield the images, class by class."""
        classes = list[os.DirEntry[str]]()
        for entry in visible_folders(self.folder, ignored):
            if entry.is_symlink():
                tree.claim(entry, f"{self.split}/{entry.name}")
            classes.append(entry)
        yield from self._loose({entry.name for entry in classes}, ignored)
        empty, deep = list[str](), dict[str, int]()
        for entry in classes:
            files = sorted(
                (file.name.removeprefix(self.below), file) for file in tree.images(entry, f"{self.split}/{entry.name}")
            )
            self._check_inside({name.partition("/")[0] for name, _ in files if "/" in name}, entry)
            if not files:
                empty.append(entry.name)
            elif all("/" in name for name, _ in files):
                deep[entry.name] = len({name.partition("/")[0] for name, _ in files})
            for name, file in files:
                yield _found(self.split, entry.name, name, file)
        self._check_depths(deep, len(classes) - len(empty))
        if empty:
            notes.append(f"{self.split}: {len(empty)} class folders without images ({listed(empty)})")
        if deep and len(deep) + len(empty) == len(classes):
            notes.append(f"{self.split}: classes are {listed([*deep])}; their images are in folders inside these")
        if named := [entry.name for entry in classes if entry.name.lower() in SPLIT_FOLDERS]:
            notes.append(f"{self.split}: {listed(named)} is taken as a class, as it lies beside other classes")

    def _check_inside(self, folders: set[str], entry: os.DirEntry[str]) -> None:
        """Refuse a class folder with split folders in it: their images would all become one split."""
        if splits := sorted(name for name in folders if name.lower() in SPLIT_FOLDERS):
            raise SourceError(
                f"{entry.path} has folders of splits in it ({listed(splits)})",
                expected=f"{splits[0]}/{printable(entry.name)}/<image>: splits above classes",
                remedy=f"move the splits up; rename {splits[0]} if it is no split; give {entry.path} if it is no class",
            )

    def _check_depths(self, deep: dict[str, int], classes: int) -> None:
        """Refuse one folder of folders beside few others: its folders are more likely the classes."""
        for name, inside in deep.items():
            if len(deep) == 1 < inside and 1 < classes <= inside + 1:
                raise SourceError(
                    f"{self.folder / name} can be a class, or hold {inside} classes",
                    expected=f"images directly in {printable(name)}, as in the folders beside it",
                    remedy=f"give {self.folder / name} alone, or move its images up",
                )

    def _loose(self, classes: set[str], ignored: Counter[str]) -> Iterator[Found]:
        """Reject the images beside the class folders; refuse the tar of a class that was not unpacked."""
        for entry in listing(self.folder):
            if entry.name in classes or is_folder(entry):
                continue
            if is_image(entry):
                yield _without_class(self.split, entry.name)
                continue
            stem, dot, suffix = entry.name.rpartition(".")
            if dot and suffix == "tar" and WNID.fullmatch(stem) and stem not in classes:
                raise SourceError(
                    f"{self.folder} holds class folders and tars of other classes",
                    got=entry.name,
                    remedy=f"unpack each tar into a folder of its name ({stem}/), or move it away",
                )
            ignored[kind_of(entry)] += 1


@dataclass(slots=True)
class FlatFolder:
    """``<folder>/<image>``, labelled by a list, or not at all (the test split)."""

    split: str
    folder: Path
    labels: Labels | None = None

    def walk(self, tree: Tree, ignored: Counter[str], notes: list[str]) -> Iterator[Found]:
        """Yield the images by class and name."""
        files = [(file.name, file) for file in tree.images(self.folder, self.split)]
        if self.labels is not None:  # a number labels one image, not its namesakes in folders beside it
            yield from (_without_class(self.split, name, "in a folder inside it") for name, _ in files if "/" in name)
            files = [(name, file) for name, file in files if "/" not in name]
        for found in labelled(files, self.split, self.labels, notes):
            yield found if isinstance(found, Rejected) else _found(self.split, *found)


Part = ClassFolders | FlatFolder


class FolderSource(Source):
    """A folder whose splits are :class:`ClassFolders` or :class:`FlatFolder`.

    Args:
        path: The folder.
        kind: The layout.
        parts: Its splits.
        split: The one to take, or empty for all.

    Attributes:
        remarks: Notes on how the layout was read.

    Raises:
        SourceError: It has no such split.
    """

    def __init__(self, path: Path, kind: str, parts: Sequence[Part], split: str = "") -> None:
        super().__init__(path, kind)
        wanted = [part for part in parts if split in ("", part.split)]
        if not wanted:
            have = " and ".join(sorted(part.split for part in parts))
            raise SourceError(f"{path} has no {split} split", expected=f"a folder {split}", got=have)
        self._parts = sorted(wanted, key=lambda part: SPLITS.index(part.split))
        self._known = [part.folder for part in parts]
        self.remarks: tuple[str, ...] = ()

    def unlabelled(self) -> Sequence[FlatFolder]:
        """Return the parts that hold validation images whose classes are not known yet."""
        flat = (part for part in self._parts if isinstance(part, FlatFolder))
        return [part for part in flat if part.split == "val" and part.labels is None]

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        notes += (*self.remarks, *archives_note(self.path))
        yield from _beside(self.path, self._known, self._parts[0].split)
        class_of = dict[str, str]()  # of folders outside, in all splits
        for part in self._parts:
            passed = Counter[str]()  # for a note per split
            label = self.name if part.folder == self.path else f"{self.name}/{part.folder.relative_to(self.path)}"
            yield from part.walk(Tree((self.path, part.folder), passed, class_of), passed, notes)
            notes += ignored_note(passed, printable(label))


def data_files(folder: Path) -> list[str]:
    """Return the names of the archives and data files directly in a folder, but for devkits."""
    files = [entry.name for entry in listing(folder) if not is_folder(entry) and not is_hidden(entry.name)]
    return [name for name in files if name.lower().endswith(_ARCHIVES) and "devkit" not in name]


def archives_note(folder: Path, known: str = "\0") -> list[str]:
    """Return a note that names the archives and data files in a folder that do not end in ``known``, if any."""
    names = [name for name in data_files(folder) if not name.lower().endswith(known)]
    name = printable(folder.resolve().name)
    return [f"{name}: data files beside the images are not read ({listed(names)})"] if names else []


def _beside(path: Path, parts: Sequence[Path], split: str) -> Iterator[Found]:
    """Reject images that lie beside the folders of a layout.

    Raises:
        SourceError: A whole folder with images lies there.
    """
    above = {folder for part in parts for folder in part.parents if folder.is_relative_to(path)}
    for folder in sorted(above - set(parts)):
        for entry in listing(folder):
            if is_image(entry):
                yield _without_class(split, (folder / entry.name).relative_to(path).as_posix())
        for entry in visible_folders(folder, Counter()):
            inside = folder / entry.name
            if inside not in above and inside not in parts and has_image(inside):
                names = ", ".join(sorted(str(part.relative_to(path)) for part in parts))
                raise SourceError(
                    f"{inside} holds images that are outside of {names}",
                    expected="images in the folders of the recognized layout alone",
                    remedy="move them into a class folder, or away, or give the folders with images one by one",
                )


class DownloadFolder(Source):
    """A folder made by ``imnet-prep download``: the images that its journal lists as finished, each with its URL."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        from imnet_prep.download.journal import read_finished  # other sources start faster without it

        classes = defaultdict[str, bytearray](bytearray)  # packed rows: a list may have produced millions of images
        try:
            for done in read_finished(self.path):
                name = done.path.rpartition("/")[2]
                meta = meta_text(json.loads(done.meta)) if done.meta else ""
                row = _SEPARATOR.join((name, done.path, str(done.size_bytes), str(done.status), done.url, meta))
                classes[done.wnid] += row.encode("utf-8", "surrogateescape") + b"\n"
        except DownloadError as error:
            raise SourceError(error.what, expected=error.expected, got=error.got, remedy=error.remedy) from error
        except sqlite3.DatabaseError as error:
            raise SourceError(f"{self.path}: its journal.sqlite cannot be read", got=str(error)) from error
        strangers = [entry.name for entry in listing(self.path) if is_image(entry)]
        folders = {entry.name: entry for entry in visible_folders(self.path, Counter())}
        tree = Tree((self.path,), Counter())
        for wnid in sorted(classes.keys() | folders.keys()):
            rows = classes[wnid].decode("utf-8", "surrogateescape").split("\n")[:-1]
            known = set[str]()
            for name, path, size_bytes, status, url, meta in sorted(row.split(_SEPARATOR) for row in rows):
                known.add(path)
                found = make_ref(self.split, wnid, name, str(self.path / path), 0, int(size_bytes))
                code = int(status) if status.isdecimal() else None
                yield replace(found, url=url, status=code, meta=meta) if isinstance(found, ImageRef) else found
            files = tree.images(folders[wnid], wnid) if wnid in folders else ()
            strangers += [name for file in files if (name := f"{wnid}/{file.name}") not in known]
        yield from (
            _without_class(self.split, name, "not in the journal of the download") for name in sorted(strangers)
        )


def _without_class(split: str, name: str, detail: str = "not in a class folder") -> Rejected:
    """Return the rejection of an image without a class."""
    return Rejected(split, printable(name), Reason.UNLABELLED, detail)


def _found(split: str, class_name: str, name: str, file: Entry) -> Found:
    if file.fault:
        return Rejected(split, printable(f"{class_name}/{name}" if class_name else name), Reason.UNREADABLE, file.fault)
    return make_ref(split, class_name, name, file.path, 0, file.size_bytes)
