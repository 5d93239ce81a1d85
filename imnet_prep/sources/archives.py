"""Tar archives, read in place: the official ones of ILSVRC2012 and plain ones of class folders."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources.base import Found, Source, is_hidden, is_image_name, make_ref, printable, suffix_of
from imnet_prep.sources.labels import WNID, Labels, labelled, official_split, read_tiny_annotations
from imnet_prep.sources.layout import Index
from imnet_prep.sources.samples import Samples, is_sample, split_of
from imnet_prep.sources.tar import FILE, FOLDER, Member, loose_zeros, walk
from imnet_prep.sources.tree import is_image
from imnet_prep.types import Reason, Rejected

_END_BYTES = 1024  # a tar ends in two blocks of zeros, at least
_SEARCH_BYTES = 1 << 30  # looked through for the end of a damaged stretch, where it is only named
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")
_OFFICIAL_TRAIN = re.compile(r"(n\d{8})_\d+\.[A-Za-z]+")
_MAX_ANNOTATIONS = 64 << 20  # bytes; Tiny-ImageNet's have half a MB
_Row = tuple[str, int, int]  # name, offset, size in bytes


def walk_whole(
    source: Source, file: PlainFile, path: Path, start: int = 0, end: int | None = None, *, suffix: bytes = b""
) -> Iterator[Member]:
    """Walk an archive, or one inside it, for a source. Where a member is named, its damage is yielded as well.

    Args:
        source: It skips damaged stretches if it may.
        file: The outermost archive.
        path: Its path.
        start: First byte of the archive to walk. end: One past its last byte; None for the end of the file.
        suffix: That of the archives in it, if it is a tar of tars; its damaged stretches are yielded and not skipped.

    Raises:
        SourceError: It is damaged, and the source is not to be salvaged.
    """
    last: Member | None = None  # without damage
    for found in walk(file, start, end, suffix=suffix, search_bytes=None if source.salvage else _SEARCH_BYTES):
        if found.damage:
            before = printable(last.name) if last else "its beginning"
            about = f"{printable(found.name)}: {found.damage}" if found.name else found.damage
            # Zeros at the end prove nothing in a tar of tars: every inner tar ends in them.
            if found.last and not source.salvage and (suffix or not ends_in_zeros(file)):
                named = catalog.archives().get(path.name)
                whole = f" of {named.size_bytes}" if named is not None and named.size_bytes else ""
                raise SourceError(
                    f"{path} is not a whole tar archive ({file.size_bytes} bytes{whole}): {about}, after {before}",
                    expected="an archive that ends in zero blocks",
                    remedy="download or copy it again; --salvage converts the rest and says what is skipped",
                )
            if not (suffix and source.salvage):
                source.skip(path, f"{about}, after {before}", found.offset, found.size_bytes)
            if not (found.name or suffix):
                continue
        else:
            last = found
        yield found
    if start == 0 and end in (None, file.size_bytes) and last is not None and (zeros := loose_zeros(file, last)):
        source.leave_out(path, "zeros at the end, more than tar writes", file.size_bytes - zeros, zeros)


def ends_in_zeros(file: PlainFile) -> bool:
    """Return whether a tar has its end mark: then it is whole, and a member larger than the rest has a false size."""
    tail = file.read(_END_BYTES, max(0, file.size_bytes - _END_BYTES))
    return len(tail) == _END_BYTES and not any(tail)


def safe_files(members: Iterable[Member], split: str, class_name: str = "") -> Iterator[Member | Rejected]:
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
        file, inner, nameless = PlainFile(self.path), defaultdict[str, list[tuple[int, int]]](list), list[Member]()
        for found in walk_whole(self, file, self.path, suffix=b".tar"):
            *_, base = found.parts
            is_class = base.endswith(".tar") and not is_hidden(base)
            if found.damage and not is_class:
                nameless.append(found)
            elif is_class and (found.damage or not found.fault):  # a stretch may hold most of it
                inner[base.removesuffix(".tar")].append((found.offset, found.size_bytes))
            elif found.kind != FOLDER and (found.fault or not is_image_name(base)):
                yield from _other(found, self, ignored)
            elif found.kind != FOLDER:
                detail = "not in the tar of a class"
                yield Rejected(self.split, printable(found.name), Reason.UNLABELLED, detail)
        orphans = defaultdict[str, list[_Row]](list)
        for stretch in nameless:
            end = stretch.offset + stretch.size_bytes
            for item in safe_files(walk_whole(self, file, self.path, stretch.offset, end), self.split):
                if isinstance(item, Rejected):
                    yield item
                elif match := _OFFICIAL_TRAIN.fullmatch(item.parts[-1]):
                    orphans[match[1]].append((item.parts[-1], item.offset, item.size_bytes))
                elif is_image_name(item.parts[-1]):
                    detail = "the name of its class is in a damaged stretch"
                    yield Rejected(self.split, printable(item.name), Reason.UNLABELLED, detail)
        for class_name in sorted(inner.keys() | orphans.keys()):
            yield from _class_tars(self, file, self.path, class_name, inner[class_name], orphans[class_name])


def _other(found: Member, source: Source, ignored: Counter[str]) -> Iterator[Rejected]:
    """Count a member that is no image, or reject one that cannot be read.

    Raises:
        SourceError: It is an archive, whose images would be lost.
    """
    base = found.parts[-1]
    if found.fault:
        yield Rejected(source.split or "train", printable(found.name), Reason.UNREADABLE, found.fault)
    elif base.lower().endswith(_ARCHIVES) and not is_hidden(base):
        raise _archive_within(f"{source.path}: {printable(found.name)}")
    else:
        ignored[suffix_of(base)] += 1


def _archive_within(name: str) -> SourceError:
    return SourceError(
        f"{name} is an archive that is not read here",
        expected="images, or one uncompressed tar per class",
        remedy="unpack it, and give the folder",
    )


def _class_tars(
    source: Source,
    file: PlainFile,
    path: Path,
    class_name: str,
    tars: Iterable[tuple[int, int]],
    others: Iterable[_Row] = (),
) -> Iterator[Found]:
    """Walk the tars of one class: yield first the rejected members, then its images and ``others`` of it by name."""
    images, split = list(others), source.split
    for start, size_bytes in tars:
        members = walk_whole(source, file, path, start, start + size_bytes)
        for found in safe_files(members, split, class_name):
            if isinstance(found, Rejected):
                yield found
            elif (parts := found.parts) == [""]:
                yield Rejected(split, printable(f"{class_name}/{found.name}"), Reason.UNREADABLE, "it has no name")
            else:
                name = "/".join(parts[1:] if len(parts) > 1 and parts[0] == class_name else parts)
                images.append((name, found.offset, found.size_bytes))
    for name, offset, size_bytes in sorted(images):
        yield make_ref(split, class_name, name, str(path), offset, size_bytes)


class TarFolder(Source):
    """A folder of one tar per class: the official training archive, unpacked once."""

    def archives(self) -> Sequence[Path]:
        """Return its tars."""
        return [path for path in sorted(self.path.iterdir()) if path.suffix == ".tar" and path.is_file()]

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        for path in sorted(self.path.iterdir()):
            if path.suffix == ".tar" and WNID.fullmatch(path.stem) and path.is_file():
                file = PlainFile(path)
                yield from _class_tars(self, file, path, path.stem, [(0, file.size_bytes)])
            elif path.suffix == ".tar" and not is_hidden(path.name):
                raise SourceError(
                    f"{path} is no tar of a class beside others that are",
                    expected="a name like n01440764.tar, and a file that can be read",
                    remedy="rename it to its class, or move it away and give it alone",
                )
            elif path.name.lower().endswith(_ARCHIVES) and not is_hidden(path.name):
                raise _archive_within(str(path))
            elif is_image(path):
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
        for found in safe_files(walk_whole(self, PlainFile(self.path), self.path), self.split):
            if isinstance(found, Rejected):
                yield found
            elif is_image_name(base := found.parts[-1]):
                images.append((base, found))
            else:
                yield from _other(found, self, ignored)
        for row in labelled(images, self.split, self.labels, notes):
            if isinstance(row, Rejected):
                yield row
            else:
                wnid, base, member = row
                yield make_ref(self.split, wnid, base, str(self.path), member.offset, member.size_bytes)


class ClassTar(Source):
    """A tar of class folders, with or without ``train/`` and ``val/`` above them, and a folder around everything.

    It turns out to be a WebDataset if its images have their labels beside them.
    """

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        index, file, tiny, samples = Index(self.path), PlainFile(self.path), None, Samples()
        samples.begin(self.path, file, split_of(self.path.stem) or self.split or "train")
        for found in safe_files(walk_whole(self, file, self.path), self.split or "train"):
            if isinstance(found, Rejected):
                yield found
                continue
            *folders, base = found.parts
            if samples.add(found, folders, base):
                index.add(folders, base, found.offset, found.size_bytes)
                continue
            if base == "val_annotations.txt":
                data = file.read(min(found.size_bytes, _MAX_ANNOTATIONS), found.offset)
                tiny = read_tiny_annotations(data, f"{self.path}: {printable(found.name)}")
            yield from _other(found, self, ignored)
        samples.end()
        if samples.are_there:
            self.kind = "webdataset"
            ignored.clear()
            yield from samples.found_in(self, notes, ignored)
        else:
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
    seen, before, file = 0, "", PlainFile(path)
    members = walk(file)
    for found in members:
        *folders, base = found.parts
        if found.kind == FILE and base.endswith(".tar") and not is_hidden(base):
            return "nested", base
        if found.damage:
            # The next header may be in the tar of a class whose own header is damaged: look for the next class.
            if seen == 0 and (
                tar := next((item for item in walk(file, suffix=b".tar") if item.name.endswith(".tar")), None)
            ):
                return "nested", tar.parts[-1]
            if seen == 0 and found.last:
                raise SourceError(f"{path} is not a tar archive that can be read", got=found.damage)
            continue
        seen += 1
        if found.kind == FILE and is_image_name(base):
            beside = next(members, found).name
            if any(map(WNID.fullmatch, folders)) or is_sample(found.name, before) or is_sample(found.name, beside):
                return "classes", found.name
            return official_split(base) or "classes", found.name
        before = found.name
    raise SourceError(
        f"{path} holds no images", expected="class folders, class tars or ILSVRC2012 images", got=f"{seen} members"
    )
