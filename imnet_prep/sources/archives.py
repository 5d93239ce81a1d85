"""Tar archives, read where they lie: the official ones of ILSVRC2012 and plain ones of class folders."""

from __future__ import annotations

import os
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources.base import (
    Found,
    Source,
    SourceInfo,
    ignored_note,
    is_hidden,
    is_image_name,
    make_ref,
    printable,
    suffix_of,
)
from imnet_prep.sources.digests import check_official, digests
from imnet_prep.sources.labels import TEST_NAME, VAL_NAME, WNID, Labels, tiny_labels
from imnet_prep.sources.tar import Damage, Kind, Member, clean_parts, member_fault, walk
from imnet_prep.types import ProgressCallback, Reason, Rejected

END_BYTES = 1024  # a tar ends in two blocks of zeros, at least
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip


class TarSource(Source):
    """An archive: what all of them share."""

    def info(self, progress: ProgressCallback | None = None) -> SourceInfo:
        """Read the archive once for its digests, and compare them with the catalogue."""
        try:
            size, md5, sha256 = digests(self.path, progress)
        except OSError as exc:
            raise SourceError(f"{self.path} cannot be read", got=exc.strerror or str(exc)) from exc
        official, note = check_official(self.path, size, md5, sha256)
        images = self._images()
        if note and note not in self.notes:
            self.notes = (*self.notes, note)
        return SourceInfo(self.kind, self.path.name, size, md5, sha256, official, images)

    def _images(self) -> int | None:
        return sum(self._counted().images.values())

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        """Give a descriptor and the size; errors of the file system become a :class:`SourceError`."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise SourceError(f"{self.path} cannot be opened", got=exc.strerror or str(exc)) from exc
        try:
            yield descriptor, os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def _cut(self, damage: Damage) -> SourceError:
        named = catalog.archives().get(self.path.name)
        size = self.path.stat().st_size
        whole = f" of {named.size_bytes}" if named is not None and named.size_bytes else ""
        about = f"{printable(damage.name)} {damage.detail}" if damage.name else damage.detail
        return SourceError(
            f"{self.path} is not a whole tar archive ({size} bytes{whole}): {about}",
            expected="an archive that ends in zero blocks",
            remedy="download or copy it again",
        )

    def _walk(self, notes: list[str]) -> Iterator[Found]:
        with self._opened() as (descriptor, size):
            yield from self._index(descriptor, size, notes)

    @abstractmethod
    def _index(self, descriptor: int, size: int, notes: list[str]) -> Iterator[Found]: ...

    def _outer(self, descriptor: int, size: int, split: str, bad: list[Rejected]) -> Iterator[Member]:
        """Walk a plain tar: regular files of honest names; what is not goes to ``bad``.

        Raises:
            SourceError: The archive is cut: nothing can be read after the damage, and no zero blocks end it.
        """
        for found in walk(descriptor, 0, size):
            if isinstance(found, Damage):
                if found.last and not _ends_in_zeros(descriptor, size):
                    raise self._cut(found)
                bad.append(_rejected(split, found.name, found.detail))
            elif found.kind is not Kind.FOLDER:
                fault = _fault(found)
                if fault:
                    bad.append(_rejected(split, found.name, fault))
                else:
                    yield found


def _ends_in_zeros(descriptor: int, size: int) -> bool:
    """Tell whether a tar has its end: then a member that claims more than there is lies, and the tar is not cut."""
    tail = os.pread(descriptor, END_BYTES, max(0, size - END_BYTES))
    return len(tail) == END_BYTES and not any(tail)


def _fault(member: Member) -> str:
    if member.kind is not Kind.FILE:
        return f"a {member.kind.value} in the archive, not a file"
    return member_fault(member.name)


def _rejected(split: str, name: str, detail: str) -> Rejected:
    return Rejected(split, printable(name), Reason.UNREADABLE, detail)


class NestedTar(TarSource):
    """A tar of one tar a class (``n01440764.tar``): the official training archive, or one's own in its shape."""

    def __init__(self, path: Path, kind: str, split: str) -> None:
        super().__init__(path)
        self.kind, self.split = kind, split

    def _index(self, descriptor: int, size: int, notes: list[str]) -> Iterator[Found]:
        bad: list[Rejected] = []
        ignored: Counter[str] = Counter()
        inner = []
        for found in walk(descriptor, 0, size, suffix=b".tar"):
            if isinstance(found, Damage):
                if found.last:  # zeros at the end prove nothing here: every inner tar has them
                    raise self._cut(found)
                bad.append(_rejected(self.split, found.name, found.detail))
            elif found.kind is not Kind.FOLDER:
                fault, base = _fault(found), (clean_parts(found.name) or [""])[-1]
                if fault:
                    bad.append(_rejected(self.split, found.name, fault))
                elif base.endswith(".tar") and not is_hidden(base):
                    inner.append((base.removesuffix(".tar"), found))
                else:
                    ignored[suffix_of(base)] += 1
        yield from bad
        inner.sort(key=lambda pair: (pair[0], pair[1].offset))
        for class_name, tars in groupby(inner, key=lambda pair: pair[0]):
            rows: list[_Row] = []
            for _, tar in tars:
                end = tar.offset + tar.size_bytes
                yield from _class_tar(descriptor, tar.offset, end, self.split, class_name, rows)
            for name, offset, size_bytes in sorted(rows):
                yield make_ref(self.split, class_name, name, str(self.path), offset, size_bytes)
        notes += ignored_note(ignored, self.name)


_Row = tuple[str, int, int]  # name, offset, size in bytes


def _class_tar(
    descriptor: int, start: int, end: int, split: str, class_name: str, rows: list[_Row]
) -> Iterator[Rejected]:
    """Walk one class's tar: its images go to ``rows``, what is none is yielded."""
    for found in walk(descriptor, start, end):
        if isinstance(found, Damage):
            yield _rejected(split, f"{class_name}/{found.name or class_name + '.tar'}", found.detail)
        elif found.kind is not Kind.FOLDER:
            fault = _fault(found)
            parts = clean_parts(found.name)
            if fault or not parts:
                yield _rejected(split, f"{class_name}/{found.name}", fault or "it has no name")
            else:
                name = "/".join(parts[1:] if len(parts) > 1 and parts[0] == class_name else parts)
                rows.append((name, found.offset, found.size_bytes))


class TarFolder(Source):
    """A folder of one tar a class: the official training archive, unpacked once."""

    kind = "folder-of-class-tars"

    def __init__(self, path: Path, split: str) -> None:
        super().__init__(path)
        self.split = split

    def _walk(self, notes: list[str]) -> Iterator[Found]:
        ignored: Counter[str] = Counter()
        for path in sorted(self.path.iterdir()):
            if path.suffix != ".tar" or not WNID.fullmatch(path.stem) or not path.is_file():
                ignored[suffix_of(path.name)] += 1
                continue
            rows: list[_Row] = []
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                end = os.fstat(descriptor).st_size
                yield from _class_tar(descriptor, 0, end, self.split, path.stem, rows)
            finally:
                os.close(descriptor)
            for name, offset, size_bytes in sorted(rows):
                yield make_ref(self.split, path.stem, name, str(path), offset, size_bytes)
        notes += ignored_note(ignored, self.name)


class FlatTar(TarSource):
    """A tar of images without class folders: the official validation archive, labelled by number, or the test one."""

    def __init__(self, path: Path, kind: str, split: str, labels: Labels | None) -> None:
        super().__init__(path)
        self.kind, self.split, self.labels = kind, split, labels

    def _index(self, descriptor: int, size: int, notes: list[str]) -> Iterator[Found]:
        bad: list[Rejected] = []
        ignored: Counter[str] = Counter()
        rows, names = [], []
        for member in self._outer(descriptor, size, self.split, bad):
            base = (clean_parts(member.name) or [""])[-1]
            if not is_image_name(base) or is_hidden(base):
                ignored[suffix_of(base)] += 1
                continue
            names.append(base)
            wnid = "" if self.labels is None else self.labels.of(base)
            if wnid is None:
                assert self.labels is not None
                detail = f"not in {self.labels.origin}"
                bad.append(Rejected(self.split, printable(base), Reason.UNLABELLED, detail))
            else:
                rows.append((wnid, base, member.offset, member.size_bytes))
        yield from bad
        rows.sort()
        for wnid, base, offset, size_bytes in rows:
            yield make_ref(self.split, wnid, base, str(self.path), offset, size_bytes)
        if self.labels is not None:
            notes += self.labels.missing(names)
        notes += ignored_note(ignored, self.name)


class _Rows:
    """The images of a class, packed: a name costs its bytes, a place 16 more."""

    __slots__ = ("_names", "_offsets", "_sizes")

    def __init__(self) -> None:
        self._names, self._offsets, self._sizes = bytearray(), array("Q"), array("Q")

    def add(self, name: str, offset: int, size_bytes: int) -> None:
        self._names += name.encode("utf-8", "surrogateescape") + b"\x00"
        self._offsets.append(offset)
        self._sizes.append(size_bytes)

    def sorted(self) -> list[tuple[str, int, int]]:
        names = [name.decode("utf-8", "surrogateescape") for name in bytes(self._names).split(b"\x00")[:-1]]
        return sorted(zip(names, self._offsets, self._sizes, strict=True))


class ClassTar(TarSource):
    """A tar of class folders, under ``train/`` and ``val/`` or not, and under a folder of its own or not."""

    kind = "class-tar"

    def __init__(self, path: Path, split: str | None) -> None:
        super().__init__(path)
        self.split = split

    def _index(self, descriptor: int, size: int, notes: list[str]) -> Iterator[Found]:
        bad: list[Rejected] = []
        ignored: Counter[str] = Counter()
        groups: dict[tuple[str, ...], _Rows] = {}
        annotations: Member | None = None
        split = self.split or "train"
        for member in self._outer(descriptor, size, split, bad):
            *folders, base = clean_parts(member.name) or [""]
            if base == "val_annotations.txt":
                annotations = member
            if not is_image_name(base) or any(is_hidden(part) for part in (*folders, base)):
                ignored[suffix_of(base)] += 1
            else:
                groups.setdefault(tuple(folders), _Rows()).add(base, member.offset, member.size_bytes)
        yield from bad
        tiny = None
        if annotations is not None:
            length = min(annotations.size_bytes, 64 << 20)
            lines = PlainFile(self.path).read(length, annotations.offset).decode("utf-8", "replace")
            tiny = tiny_labels(lines.splitlines(), f"{self.path}: {printable(annotations.name)}")
        yield from self._laid_out(groups, tiny, split)
        notes += ignored_note(ignored, self.name)

    def _laid_out(self, groups: dict[tuple[str, ...], _Rows], tiny: Labels | None, split: str) -> Iterator[Found]:
        """Turn folders into splits and classes, and yield them in order."""
        root = _common_root(list(groups))
        has_splits = any(len(key) > root + 1 and key[root] in SPLIT_FOLDERS for key in groups)
        classes: dict[tuple[int, str], list[tuple[str, int, int]]] = {}
        order = ("train", "val", "test")
        for key, rows in groups.items():
            below, where = key[root:], split
            if has_splits and below and below[0] in SPLIT_FOLDERS:
                where, below = SPLIT_FOLDERS[below[0]], below[1:]
            if tiny is not None and below and below[-1] == "images":
                below = below[:-1]
            if self.split is not None and has_splits and where != self.split:
                continue
            for name, offset, size_bytes in rows.sorted():
                labelled = tiny is not None and where == "val" and not below
                class_name = (tiny.of(name) if labelled and tiny is not None else None) or (below[0] if below else "")
                if not class_name and where != "test":
                    yield Rejected(where, printable("/".join((*key, name))), Reason.UNLABELLED, "not in a class folder")
                    continue
                full = "/".join((*below[1:], name))
                classes.setdefault((order.index(where), class_name), []).append((full, offset, size_bytes))
        for place, class_name in sorted(classes):
            for name, offset, size_bytes in sorted(classes[place, class_name]):
                yield make_ref(order[place], class_name, name, str(self.path), offset, size_bytes)


def _common_root(folders: list[tuple[str, ...]]) -> int:
    """Count the folders around all images that are neither split nor class: at least one is left for the class."""
    if not folders or any(not key for key in folders):
        return 0
    depth = min(len(key) for key in folders) - 1
    root = 0
    while root < depth and len({key[root] for key in folders}) == 1 and folders[0][root] not in SPLIT_FOLDERS:
        root += 1
    return root


class Devkit(TarSource):
    """The development kit: no images, but the labels of the validation ones."""

    kind = "ilsvrc2012-devkit"

    def __init__(self, path: Path, labels: Labels) -> None:
        super().__init__(path)
        self.labels = labels

    def info(self, progress: ProgressCallback | None = None) -> SourceInfo:
        """Digest the archive; a folder has none."""
        if self.path.is_dir():
            return SourceInfo(self.kind, "", 0, "", "", official=False, images=None)
        return super().info(progress)

    def _images(self) -> int | None:
        return None

    def _walk(self, notes: list[str]) -> Iterator[Found]:
        return iter(())

    def _index(self, descriptor: int, size: int, notes: list[str]) -> Iterator[Found]:
        return iter(())


class LabelFile(Devkit):
    """Kaggle's LOC_val_solution.csv, given by itself."""

    kind = "kaggle-val-solution"


def peek(path: Path) -> tuple[str, str]:
    """Look at the first members of a tar.

    Returns:
        ``nested``, ``val``, ``test`` or ``classes``, and the first telling member's name.

    Raises:
        SourceError: It is no tar, is cut before anything could be told, or holds nothing.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, seen = os.fstat(descriptor).st_size, 0
        for found in walk(descriptor, 0, size):
            if isinstance(found, Damage):
                if found.last and seen == 0:
                    raise SourceError(f"{path} is not a tar archive that can be read", got=found.detail)
                continue
            seen += 1
            base = (clean_parts(found.name) or [""])[-1]
            if found.kind is not Kind.FILE or is_hidden(base):
                continue
            if base.endswith(".tar"):
                return "nested", base
            if is_image_name(base):
                flat = "val" if VAL_NAME.fullmatch(base) else "test" if TEST_NAME.fullmatch(base) else "classes"
                in_class = any(WNID.fullmatch(part) for part in clean_parts(found.name)[:-1])
                return ("classes" if in_class else flat), found.name
    finally:
        os.close(descriptor)
    raise SourceError(
        f"{path} holds no images", expected="class folders, class tars or ILSVRC2012 images", got=f"{seen} members"
    )
