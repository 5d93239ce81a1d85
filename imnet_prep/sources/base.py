"""What every source is: references in order, what it is for the manifest, and notes for a person."""

from __future__ import annotations

import heapq
import os
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from imnet_prep.files import PlainFile
from imnet_prep.types import SPLITS, ImageRef, ProgressCallback, RawImage, Reason, Rejected, name_fault

_SUFFIXES = "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff mpo heic heif avif jp2 jxl"  # the last five: rejected
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split(" "))
MAX_SOURCE_BYTES = 1 << 29  # read into memory as one image; 512 MiB is an archive or a mistake, not a photograph
_OPEN_ARCHIVES = 32  # file descriptors kept a process
Found = ImageRef | Rejected


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """A source as the manifest records it: no path, so that a moved input gives the same manifest.

    Attributes:
        kind: The layout, e.g. ``imagefolder`` or ``ilsvrc2012-train-tar``.
        name: Base name of an archive; empty for a folder, whose name says nothing about its content.
        size_bytes: Of the archive, or of all images of a folder.
        md5: Hex digest of an archive, empty for a folder.
        sha256: Hex digest of an archive, empty for a folder.
        official: An archive whose digests are the catalogued ones.
        images: References it gives, or None where it gives none by nature (a devkit).
    """

    kind: str
    name: str
    size_bytes: int
    md5: str
    sha256: str
    official: bool
    images: int | None


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """A split of a source, counted: images, classes (0 where unlabelled) and bytes."""

    split: str
    images: int
    classes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """What ``--dry-run`` says of a source: found = images of all splits + rejected."""

    kind: str
    name: str
    splits: tuple[SplitSummary, ...]
    rejected: int
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Tally:
    images: Counter[str] = field(default_factory=Counter)
    size_bytes: Counter[str] = field(default_factory=Counter)
    classes: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    rejected: int = 0

    def add(self, found: Found) -> None:
        if isinstance(found, Rejected):
            self.rejected += 1
            return
        self.images[found.split] += 1
        self.size_bytes[found.split] += found.size_bytes
        if found.class_name:
            self.classes[found.split].add(found.class_name)


class Source(ABC):
    """Images in one folder or archive.

    Attributes:
        kind: The layout.
        split: Of its images; where it has several, the one that was asked for, or empty for all.
        name: Base name of the folder or archive, for messages.
        path: Where it is.
        notes: What a person should know (files ignored, val images missing); complete once :meth:`refs` ran to its end.
    """

    def __init__(self, path: Path, kind: str, split: str = "") -> None:
        self.path, self.kind, self.split = path, kind, split
        self.name = path.name or path.resolve().name
        self.notes: tuple[str, ...] = ()
        self._tally: _Tally | None = None

    @abstractmethod
    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        """Yield references sorted by split, class and name; append notes, count by suffix what is passed over."""

    def info(self, progress: ProgressCallback | None = None) -> SourceInfo:
        """Say what the source is; an archive is read once, whole, to compute its digests.

        A folder's name is left out: a copy elsewhere gives the same manifest.

        Raises:
            SourceError: An official archive is damaged, or is another one than its name says.
        """
        tally = self._counted()
        size, images = tally.size_bytes.total(), tally.images.total()
        return SourceInfo(self.kind, "", size, "", "", official=False, images=images)

    def refs(self) -> Iterator[Found]:
        """Yield every image found, sorted by split, class and name; what cannot be one is ``Rejected``.

        The order depends on names alone. A second image of the same name in a split is rejected. One class at a time
        is held in memory.

        Raises:
            SourceError: The source turned out damaged on the way.
        """
        tally, notes, ignored = _Tally(), list[str](), Counter[str]()
        for found in _unique(self._walk(notes, ignored)):
            tally.add(found)
            yield found
        self._tally, self.notes = tally, (*notes, *ignored_note(ignored, self.name))

    def summary(self) -> SourceSummary:
        """Count what is there; free after :meth:`refs` ran to its end, else it runs it."""
        tally = self._counted()
        splits = tuple(
            SplitSummary(split, tally.images[split], len(tally.classes[split]), tally.size_bytes[split])
            for split in SPLITS
            if tally.images[split]
        )
        return SourceSummary(self.kind, self.name, splits, tally.rejected, self.notes)

    def _counted(self) -> _Tally:
        if self._tally is None:
            for _ in self.refs():
                pass
        assert self._tally is not None
        return self._tally


def merge(sources: Iterable[Source]) -> Iterator[Found]:
    """Yield the images of several sources as one, sorted by split, class and name, names unique within a split.

    Where two sources hold an image of the same split and name, the first source's is kept.
    """
    streams = [_keyed(source.refs(), place) for place, source in enumerate(sources)]
    return _unique(found for _, found in heapq.merge(*streams, key=lambda pair: pair[0]))


_Key = tuple[int, str, str, int]


def _keyed(found: Iterable[Found], place: int) -> Iterator[tuple[_Key, Found]]:
    key: _Key = (-1, "", "", place)
    for item in found:
        if isinstance(item, ImageRef):
            key = (SPLITS.index(item.split), item.class_name, item.file_name, place)
        yield key, item  # a rejection stays where it was met


def _unique(found: Iterable[Found]) -> Iterator[Found]:
    last: tuple[str, str] | None = None
    for item in found:
        if isinstance(item, ImageRef):
            this = (item.split, item.file_name)
            if this == last:
                yield Rejected(*this, Reason.DUPLICATE_NAME, f"another image of this name is in the {item.split} split")
                continue
            last = this
        yield item


def is_image_name(name: str) -> bool:
    """Tell by its suffix whether a file is meant to be an image; its content decides later."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem and dot) and suffix.lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Tell a name that file managers leave behind (``.DS_Store``, ``._cat.jpg``, ``__MACOSX``)."""
    return name.startswith(".") or name in {"__MACOSX", "@eaDir", "Thumbs.db"}


def make_ref(split: str, class_name: str, name: str, path: str, offset: int, size_bytes: int) -> Found:
    """Return the reference, or the rejection where the name cannot be a record's or the size cannot be an image's."""
    file_name = f"{class_name}/{name}" if class_name else name
    if fault := name_fault(file_name):
        return Rejected(split, printable(file_name), Reason.UNREADABLE, fault)
    if size_bytes > MAX_SOURCE_BYTES:
        return Rejected(split, file_name, Reason.TOO_LARGE, f"{size_bytes} bytes, at most {MAX_SOURCE_BYTES} are read")
    return ImageRef(split, class_name, file_name, path, offset, size_bytes)


def printable(name: str) -> str:
    """Escape what a line of text cannot hold."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "(no name)"


def ignored_note(ignored: Counter[str], name: str) -> list[str]:
    """Say which files were passed over, by suffix; nothing where none were."""
    if not ignored:
        return []
    kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in sorted(ignored.items()))
    return [f"{name}: {sum(ignored.values())} other files ignored ({kinds})"]


def suffix_of(name: str) -> str:
    """Return the suffix as counted in notes, lower case, printable."""
    return printable(suffix.lower()) if (suffix := os.path.splitext(name)[1]) else ""


_archive = lru_cache(maxsize=_OPEN_ARCHIVES)(PlainFile)  # one set a process


def read(ref: ImageRef) -> RawImage | Rejected:
    """Read an image's bytes.

    Args:
        ref: Where they lie. A tar's members never begin at 0, so offset 0 is a plain file, opened and closed.

    Returns:
        The bytes, or a rejection as ``UNREADABLE`` where the file is gone, shorter, longer or not to be read.
    """
    try:
        data = (
            _archive(ref.path).read(ref.size_bytes, ref.offset)
            if ref.offset
            else PlainFile(ref.path).read(ref.size_bytes + 1, 0)
        )
    except OSError as exc:
        return Rejected(ref.split, ref.file_name, Reason.UNREADABLE, exc.strerror or type(exc).__name__)
    if len(data) != ref.size_bytes:
        detail = f"{len(data)} bytes read, {ref.size_bytes} expected: changed since it was listed"
        return Rejected(ref.split, ref.file_name, Reason.UNREADABLE, detail)
    return RawImage(ref, data)
