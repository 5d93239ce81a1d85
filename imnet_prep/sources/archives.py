"""Tar archives, read in place: the official ones of ILSVRC2012 and plain ones of class folders."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Self

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources.base import Found, Source, is_hidden, is_image_name, make_ref, printable, suffix_of
from imnet_prep.sources.labels import WNID, Labels, labelled, official_split, read_tiny_annotations
from imnet_prep.sources.layout import Index
from imnet_prep.sources.tar import FILE, FOLDER, Member, walk
from imnet_prep.types import Reason, Rejected

_END_BYTES = 1024  # a tar ends in two blocks of zeros, at least
_MAX_ANNOTATIONS = 64 << 20  # bytes; Tiny-ImageNet's have half a MB
_Row = tuple[str, int, int]  # name, offset, size in bytes


def _walk_whole(file: PlainFile, path: Path, suffix: bytes = b"") -> Iterator[Member]:
    """Walk an archive; ``suffix`` is that of the archives in it, if it is a tar of tars.

    Raises:
        SourceError: It is cut: nothing can be read after the damage, and no zero blocks end it.
    """
    for found in walk(file, suffix=suffix):
        # Zeros at the end prove nothing in a tar of tars: every inner tar ends in them.
        if found.last and (suffix or not ends_in_zeros(file)):
            named = catalog.archives().get(path.name)
            whole = f" of {named.size_bytes}" if named is not None and named.size_bytes else ""
            about = f"{printable(found.name)} {found.damage}" if found.name else found.damage
            raise SourceError(
                f"{path} is not a whole tar archive ({path.stat().st_size} bytes{whole}): {about}",
                expected="an archive that ends in zero blocks",
                remedy="download or copy it again",
            )
        yield found


def ends_in_zeros(file: PlainFile) -> bool:
    """Return whether a tar has its end mark: then it is whole, and a member larger than the rest has a false size."""
    tail = file.read(_END_BYTES, max(0, file.size_bytes - _END_BYTES))
    return len(tail) == _END_BYTES and not any(tail)


def _files(members: Iterable[Member], split: str, class_name: str = "") -> Iterator[Member | Rejected]:
    """Yield the regular files with safe names; reject everything else but folders."""
    for found in members:
        if not found.fault:
            yield found
        elif found.kind != FOLDER:
            name = f"{class_name}/{found.name or class_name + '.tar'}" if class_name else found.name
            yield Rejected(split, printable(name), Reason.UNREADABLE, found.fault)


class NestedTar(Source):
    """A tar of one tar per class (``n01440764.tar``): the official training archive, or one of the same form."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        file, inner = PlainFile(self.path), list[_Row]()
        for found in _files(_walk_whole(file, self.path, b".tar"), self.split):
            if isinstance(found, Rejected):
                yield found
            elif (base := found.parts[-1]).endswith(".tar") and not is_hidden(base):
                inner.append((base.removesuffix(".tar"), found.offset, found.size_bytes))
            else:
                ignored[suffix_of(base)] += 1
        for class_name, rows in groupby(sorted(inner), key=itemgetter(0)):
            yield from _class_tars(file, rows, self.split, class_name, self.path)


def _class_tars(file: PlainFile, tars: Iterable[_Row], split: str, class_name: str, path: Path) -> Iterator[Found]:
    """Walk the tars of one class: yield first the rejected members, then the images by name."""
    rows: list[_Row] = []
    for _, start, size_bytes in tars:
        for found in _files(walk(file, start, start + size_bytes), split, class_name):
            if isinstance(found, Rejected):
                yield found
            elif (parts := found.parts) == [""]:
                yield Rejected(split, printable(f"{class_name}/{found.name}"), Reason.UNREADABLE, "it has no name")
            else:
                name = "/".join(parts[1:] if len(parts) > 1 and parts[0] == class_name else parts)
                rows.append((name, found.offset, found.size_bytes))
    for name, offset, size_bytes in sorted(rows):
        yield make_ref(split, class_name, name, str(path), offset, size_bytes)


class TarFolder(Source):
    """A folder of one tar per class: the official training archive, unpacked once."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        for path in sorted(self.path.iterdir()):
            if path.suffix == ".tar" and WNID.fullmatch(path.stem) and path.is_file():
                whole = [(path.stem, 0, path.stat().st_size)]
                yield from _class_tars(PlainFile(path), whole, self.split, path.stem, path)
            elif path.suffix == ".tar" and not is_hidden(path.name):
                raise SourceError(
                    f"{path} is no tar of a class beside others that are",
                    expected="a name like n01440764.tar, and a file that can be read",
                    remedy="rename it to its class, or move it away and give it alone",
                )
            elif is_image_name(path.name):
                yield Rejected(self.split, printable(path.name), Reason.UNLABELLED, "not in the tar of a class")
            else:
                ignored[suffix_of(path.name)] += 1


class FlatTar(Source):
    """A tar of images without class folders: the official validation archive, labelled by number, or the test one."""

    labels: Labels | None = None

    def unlabelled(self) -> Sequence[Self]:
        """Return the archive itself if it holds validation images whose classes are not known yet."""
        return [self] if self.split == "val" and self.labels is None else []

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        images: list[tuple[str, Member]] = []
        for found in _files(_walk_whole(PlainFile(self.path), self.path), self.split):
            if isinstance(found, Rejected):
                yield found
            elif is_image_name(base := found.parts[-1]):
                images.append((base, found))
            else:
                ignored[suffix_of(base)] += 1
        for row in labelled(images, self.split, self.labels, notes):
            if isinstance(row, Rejected):
                yield row
            else:
                wnid, base, member = row
                yield make_ref(self.split, wnid, base, str(self.path), member.offset, member.size_bytes)


class ClassTar(Source):
    """A tar of class folders, with or without ``train/`` and ``val/`` above them, and a folder around everything."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        index, file, tiny = Index(self.path), PlainFile(self.path), None
        for found in _files(_walk_whole(file, self.path), self.split or "train"):
            if isinstance(found, Rejected):
                yield found
                continue
            *folders, base = found.parts
            if base == "val_annotations.txt":
                data = file.read(min(found.size_bytes, _MAX_ANNOTATIONS), found.offset)
                tiny = read_tiny_annotations(data, f"{self.path}: {printable(found.name)}")
            if not is_image_name(base) or any(map(is_hidden, folders)):
                ignored[suffix_of(base)] += 1
            else:
                index.add(folders, base, found.offset, found.size_bytes)
        yield from index.found(str(self.path), self.split, tiny)


class Devkit(Source):
    """The development kit, or Kaggle's solution: the labels of the validation images."""

    has_images = False

    def __init__(self, path: Path, kind: str, labels: Labels) -> None:
        super().__init__(path, kind)
        self.labels = labels

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        return iter(())


def peek(path: Path) -> tuple[str, str]:
    """Recognize the layout of a tar by its first members.

    Returns:
        ``nested``, ``val``, ``test`` or ``classes``, and the name of the member that decided it.

    Raises:
        SourceError: It is no tar, is cut before the first image, or holds none.
    """
    seen = 0
    for found in walk(PlainFile(path)):
        if found.damage:
            if found.last and seen == 0:
                raise SourceError(f"{path} is not a tar archive that can be read", got=found.damage)
            continue
        seen += 1
        *folders, base = found.parts
        if found.kind == FILE and base.endswith(".tar") and not is_hidden(base):
            return "nested", base
        if found.kind == FILE and is_image_name(base):
            in_class = any(map(WNID.fullmatch, folders))
            return "classes" if in_class else official_split(base) or "classes", found.name
    raise SourceError(
        f"{path} holds no images", expected="class folders, class tars or ILSVRC2012 images", got=f"{seen} members"
    )
