"""Walk folders: find the images in and below them, each folder once, whatever links there are."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.images.formats import sniff
from imnet_prep.sources.base import is_hidden, is_image_name, printable, suffix_of
from imnet_prep.types import ImageFault

_NOWHERE = "links that lead nowhere"
_MAGIC_BYTES = 16  # as many as tell an image format
_OTHERS = "cls csv db gz html json jsonl log mat md npy npz parquet py tar tsv txt xml yaml yml zip"
_NO_IMAGES = frozenset(_OTHERS.split(" "))


class Entry(NamedTuple):
    """A file below a folder: its path within, its size, or why it cannot be read."""

    name: str
    path: str
    size_bytes: int
    fault: str = ""


class Tree:
    """The folders of a source, each of which is read once.

    A link to a folder of the same tree is not followed, as the images are found there. Other links are. Folders are
    compared by their real paths, since not every file system has stable inode numbers.

    Args:
        tops: The folders whose images are found anyway.
        ignored: Counts what is passed over.
        class_of: Receives the class of each folder outside the tree, by its real path.
    """

    def __init__(self, tops: Sequence[Path], ignored: Counter[str], class_of: dict[str, str] | None = None) -> None:
        self._tops = [os.path.realpath(top) for top in tops]
        self._ignored = ignored
        self._class_of = {} if class_of is None else class_of

    def claim(self, entry: os.DirEntry[str], class_name: str) -> None:
        """Reserve the target of a link for a class.

        Raises:
            SourceError: It is the folder of another class.
        """
        target = os.path.realpath(entry.path)
        inside = self._is_inside(target)
        other = os.path.basename(target) if inside else self._class_of.setdefault(target, class_name)
        if inside or other != class_name:
            raise _two_classes(entry, target, other)

    def images(self, top: Path | os.DirEntry[str], class_name: str) -> Iterator[Entry]:
        """Yield the images in and below a folder.

        Raises:
            OSError: A folder cannot be read.
            SourceError: Links lead from two classes to one folder.
        """
        todo = [(os.fspath(top), "", os.path.realpath(top))]
        while todo:
            folder, within, real = todo.pop()
            for entry in listing(folder):
                if is_folder(entry):
                    if target := self._enter(entry, real, class_name):
                        todo.append((entry.path, f"{within}{entry.name}/", target))
                elif is_image_name(entry.name):
                    yield _entry(entry, f"{within}{entry.name}")
                elif hides_image(entry):
                    yield Entry(
                        f"{within}{entry.name}", entry.path, 0, "an image, but its name does not say so: add .jpg"
                    )
                else:
                    self._ignored[kind_of(entry)] += 1

    def _enter(self, entry: os.DirEntry[str], parent: str, class_name: str) -> str:
        """Return the real path of a folder to read, or an empty string if it is not to be read here."""
        linked = entry.is_symlink()
        target = os.path.realpath(entry.path) if linked else os.path.join(parent, entry.name)
        if self._is_inside(target):
            if not linked:
                return target
        elif not (linked and self.is_above(target)):
            if target not in self._class_of:
                self._class_of[target] = class_name
                return target
            if (other := self._class_of[target]) != class_name:
                raise _two_classes(entry, target, other)
        self._ignored["links to folders that are read elsewhere"] += 1
        return ""

    def _is_inside(self, path: str) -> bool:
        """Return whether a folder lies in the tree, in no hidden folder."""
        return any(
            path.startswith(os.path.join(top, "")) and not any(map(is_hidden, Path(path[len(top) :]).parts))
            for top in self._tops
        )

    def is_above(self, path: str) -> bool:
        """Return whether a folder is the tree itself or one above it."""
        return any(os.path.join(top, "").startswith(os.path.join(path, "")) for top in self._tops)


def _two_classes(entry: os.DirEntry[str], target: str, other: str) -> SourceError:
    return SourceError(
        f"{entry.path} leads to images of another class ({printable(other)})",
        expected="each image in one class",
        got=f"a link to {printable(target)}",
        remedy="remove the link",
    )


def _entry(entry: os.DirEntry[str], name: str) -> Entry:
    try:
        state = entry.stat()
    except OSError as error:  # a link to nothing, or to itself
        return Entry(name, entry.path, 0, error.strerror or type(error).__name__)
    return Entry(name, entry.path, state.st_size, "" if stat.S_ISREG(state.st_mode) else "not a regular file")


def is_image(entry: os.DirEntry[str] | Path) -> bool:
    """Return whether a visible entry is an image by its name, or else by its content, and no folder."""
    return (is_image_name(entry.name) and not is_folder(entry)) or hides_image(entry)


def hides_image(entry: os.DirEntry[str] | Path) -> bool:
    """Return whether a visible file begins like an image, though its name has no suffix of one."""
    if is_hidden(entry.name) or entry.name.rpartition(".")[2].lower() in _NO_IMAGES:
        return False
    try:
        return (
            entry.is_file() and sniff(PlainFile(os.fspath(entry)).read(_MAGIC_BYTES, 0)) != "BMP"
        )  # 2 letters prove nothing
    except (OSError, ImageFault):
        return False


def kind_of(entry: os.DirEntry[str]) -> str:
    """Return what an ignored entry is counted as."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        return _NOWHERE
    return "hidden folders" if os.path.isdir(entry.path) else suffix_of(entry.name)


def listing(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str] | Path) -> bool:
    """Return whether an entry is a visible folder; links are followed."""
    try:
        return entry.is_dir() and not is_hidden(entry.name)
    except OSError:  # a link to itself
        return False


def has_image(folder: Path) -> bool:
    """Return whether there is an image in or below a folder; stop at the first.

    Raises:
        OSError: A folder cannot be read.
    """
    return next(Tree((folder,), Counter()).images(folder, ""), None) is not None


def first_image(folder: Path) -> str:
    """Return the name of the first image directly in a folder, or an empty string."""
    return next((entry.name for entry in listing(folder) if is_image(entry)), "")


def visible_folders(folder: Path, ignored: Counter[str]) -> list[os.DirEntry[str]]:
    """Return the visible folders directly in a folder, by name; links are followed, but not to a folder above.

    Raises:
        SourceError: A link that may stand for a folder leads nowhere.
    """
    tree, folders = Tree((folder,), ignored), list[os.DirEntry[str]]()
    for entry in listing(folder):
        if is_folder(entry):
            if entry.is_symlink() and tree.is_above(os.path.realpath(entry.path)):
                ignored["links back to a folder above"] += 1
            else:
                folders.append(entry)
        elif kind_of(entry) == _NOWHERE and not is_hidden(entry.name) and not is_image_name(entry.name):
            raise SourceError(
                f"{entry.path} is a link that leads nowhere, and may stand for a folder of images",
                got=f"a link to {printable(os.path.realpath(entry.path))}",
                remedy="mount or restore its target, or remove the link",
            )
    return folders


def listed(names: Sequence[str]) -> str:
    """Return the first ten names in a line of text."""
    return ", ".join(map(printable, names[:10])) + (", ..." if len(names) > 10 else "")
