"""Tar archives, read where they lie: the official ones of ILSVRC2012 and plain ones of class folders."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, takewhile
from operator import itemgetter
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources.base import Found, Source, SourceInfo, is_hidden, is_image_name, make_ref, printable, suffix_of
from imnet_prep.sources.digests import check_official, digests
from imnet_prep.sources.labels import TEST_NAME, VAL_NAME, WNID, Labels, class_of, tiny_labels
from imnet_prep.sources.tar import Damage, Kind, Member, walk
from imnet_prep.types import SPLITS, ProgressCallback, Reason, Rejected

_END_BYTES = 1024  # a tar ends in two blocks of zeros, at least
_MAX_ANNOTATIONS = 64 << 20  # bytes; Tiny-ImageNet's have half a MB
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
}  # fmt: skip
_Row = tuple[str, int, int]  # name, offset, size in bytes


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
        return SourceInfo(self.kind, printable(self.path.name), size, md5, sha256, official, images)

    def _images(self) -> int | None:
        return self._counted().images.total()

    def _members(self, file: PlainFile, suffix: bytes = b"") -> Iterator[Member | Damage]:
        """Walk the archive; ``suffix`` is that of the archives in it, where it holds such.

        Raises:
            SourceError: It is cut: nothing can be read after the damage, and no zero blocks end it.
        """
        for found in walk(file, 0, file.size_bytes, suffix=suffix):
            # Zeros at the end prove nothing where there are inner tars: every one of them has them.
            if isinstance(found, Damage) and found.last and (suffix or not ends_in_zeros(file)):
                raise self._cut(found)
            yield found

    def _cut(self, damage: Damage) -> SourceError:
        named = catalog.archives().get(self.path.name)
        whole = f" of {named.size_bytes}" if named is not None and named.size_bytes else ""
        about = f"{printable(damage.name)} {damage.fault}" if damage.name else damage.fault
        return SourceError(
            f"{self.path} is not a whole tar archive ({self.path.stat().st_size} bytes{whole}): {about}",
            expected="an archive that ends in zero blocks",
            remedy="download or copy it again",
        )


def _open(path: Path) -> PlainFile:
    try:
        return PlainFile(path)
    except OSError as exc:
        raise SourceError(f"{path} cannot be opened", got=exc.strerror or str(exc)) from exc


def ends_in_zeros(file: PlainFile) -> bool:
    """Tell whether a tar has its end: then a member that claims more than there is lies, and the tar is not cut."""
    tail = file.read(_END_BYTES, max(0, file.size_bytes - _END_BYTES))
    return len(tail) == _END_BYTES and not any(tail)


def _files(members: Iterable[Member | Damage], split: str, class_name: str = "") -> Iterator[Member | Rejected]:
    """Yield the regular files of honest names; what is neither that nor a folder is rejected."""
    for found in members:
        if isinstance(found, Member) and not found.fault:
            yield found
        elif isinstance(found, Damage) or found.kind is not Kind.FOLDER:
            name = f"{class_name}/{found.name or class_name + '.tar'}" if class_name else found.name
            yield Rejected(split, printable(name), Reason.UNREADABLE, found.fault)


class NestedTar(TarSource):
    """A tar of one tar a class (``n01440764.tar``): the official training archive, or one's own in its shape."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        file, inner = _open(self.path), list[_Row]()
        for found in _files(self._members(file, suffix=b".tar"), self.split):
            if isinstance(found, Rejected):
                yield found
            elif found.parts[-1].endswith(".tar") and not is_hidden(found.parts[-1]):
                inner.append((found.parts[-1].removesuffix(".tar"), found.offset, found.size_bytes))
            else:
                ignored[suffix_of(found.parts[-1])] += 1
        for class_name, rows in groupby(sorted(inner), key=itemgetter(0)):
            yield from _class_tars(file, rows, self.split, class_name, self.path)


def _class_tars(file: PlainFile, tars: Iterable[_Row], split: str, class_name: str, path: Path) -> Iterator[Found]:
    """Walk the tars of one class: first what is no image, then the images by name."""
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
    """A folder of one tar a class: the official training archive, unpacked once."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        for path in sorted(self.path.iterdir()):
            if path.suffix == ".tar" and WNID.fullmatch(path.stem) and path.is_file():
                file = _open(path)
                whole = (path.stem, 0, file.size_bytes)
                yield from _class_tars(file, [whole], self.split, path.stem, path)
            else:
                ignored[suffix_of(path.name)] += 1


class FlatTar(TarSource):
    """A tar of images without class folders: the official validation archive, labelled by number, or the test one."""

    labels: Labels | None = None

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        file, rows = _open(self.path), list[tuple[str, str, int, int]]()
        for found in _files(self._members(file), self.split):
            if isinstance(found, Rejected):
                yield found
                continue
            base = found.parts[-1]
            if not is_image_name(base) or is_hidden(base):
                ignored[suffix_of(base)] += 1
            elif isinstance(wnid := class_of(base, self.split, self.labels), Rejected):
                yield wnid
            else:
                rows.append((wnid, base, found.offset, found.size_bytes))
        rows.sort()
        for wnid, base, offset, size_bytes in rows:
            yield make_ref(self.split, wnid, base, str(self.path), offset, size_bytes)
        if self.labels is not None:
            notes += self.labels.missing(row[1] for row in rows)


class ClassTar(TarSource):
    """A tar of class folders, under ``train/`` and ``val/`` or not, and under a folder of its own or not."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        groups = defaultdict[tuple[str, ...], bytearray](bytearray)  # packed, for there may be millions of images
        file, tiny = _open(self.path), None
        for found in _files(self._members(file), self.split or "train"):
            if isinstance(found, Rejected):
                yield found
                continue
            *folders, base = found.parts
            if base == "val_annotations.txt":
                lines = file.read(min(found.size_bytes, _MAX_ANNOTATIONS), found.offset).decode("utf-8", "replace")
                tiny = tiny_labels(lines.splitlines(), f"{self.path}: {printable(found.name)}")
            if not is_image_name(base) or is_hidden(base) or any(map(is_hidden, folders)):
                ignored[suffix_of(base)] += 1
            else:
                name = base.encode("utf-8", "surrogateescape")
                groups[tuple(folders)] += b"%b\x00%d\x00%d\x00" % (name, found.offset, found.size_bytes)
        yield from self._laid_out(groups, tiny)

    def _laid_out(self, groups: dict[tuple[str, ...], bytearray], tiny: Labels | None) -> Iterator[Found]:
        """Turn folders into splits and classes, and yield them in order."""
        root = _common_root(list(groups))
        has_splits = any(len(key) > root + 1 and key[root] in SPLIT_FOLDERS for key in groups)
        classes = defaultdict[tuple[int, str], list[_Row]](list)
        for key in list(groups):
            below, split = key[root:], self.split or "train"
            if has_splits and below and below[0] in SPLIT_FOLDERS:
                split, below = SPLIT_FOLDERS[below[0]], below[1:]
            if tiny is not None and below[-1:] == ("images",):
                below = below[:-1]
            if has_splits and self.split not in ("", split):
                continue
            labels = tiny if split == "val" and not below else None
            fields = groups.pop(key).decode("utf-8", "surrogateescape").split("\x00")
            rows = zip(fields[0::3], map(int, fields[1::3]), map(int, fields[2::3]), strict=False)  # the last is empty
            for name, offset, size_bytes in sorted(rows):
                class_name = (labels.of(name) or "") if labels else "".join(below[:1])
                if class_name or split == "test":
                    row = ("/".join((*below[1:], name)), offset, size_bytes)
                    classes[SPLITS.index(split), class_name].append(row)
                else:
                    yield Rejected(split, printable("/".join((*key, name))), Reason.UNLABELLED, "not in a class folder")
        for place, class_name in sorted(classes):
            for name, offset, size_bytes in sorted(classes[place, class_name]):
                yield make_ref(SPLITS[place], class_name, name, str(self.path), offset, size_bytes)


def _common_root(folders: list[tuple[str, ...]]) -> int:
    """Count the folders around all images that are neither split nor class: at least one is left for the class."""
    levels = zip(*(parts[:-1] for parts in folders), strict=False)
    shared = takewhile(lambda names: len(set(names)) == 1 and names[0] not in SPLIT_FOLDERS, levels)
    return len(list(shared))


class Devkit(TarSource):
    """The development kit, or Kaggle's solution: no images, but the labels of the validation ones."""

    def __init__(self, path: Path, kind: str, labels: Labels) -> None:
        super().__init__(path, kind)
        self.labels = labels

    def info(self, progress: ProgressCallback | None = None) -> SourceInfo:
        """Digest the archive; a folder has none."""
        if self.path.is_dir():
            return SourceInfo(self.kind, "", 0, "", "", official=False, images=None)
        return super().info(progress)

    def _images(self) -> int | None:
        return None

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        return iter(())


def peek(path: Path) -> tuple[str, str]:
    """Look at the first members of a tar.

    Returns:
        ``nested``, ``val``, ``test`` or ``classes``, and the first telling member's name.

    Raises:
        SourceError: It is no tar, is cut before anything could be told, or holds nothing.
    """
    file, seen = PlainFile(path), 0
    for found in walk(file, 0, file.size_bytes):
        if isinstance(found, Damage):
            if found.last and seen == 0:
                raise SourceError(f"{path} is not a tar archive that can be read", got=found.fault)
            continue
        seen += 1
        *folders, base = found.parts
        if found.kind is not Kind.FILE or is_hidden(base):
            continue
        if base.endswith(".tar"):
            return "nested", base
        if is_image_name(base):
            in_class = any(WNID.fullmatch(folder) for folder in folders)
            flat = "val" if VAL_NAME.fullmatch(base) else "test" if TEST_NAME.fullmatch(base) else "classes"
            return "classes" if in_class else flat, found.name
    raise SourceError(
        f"{path} holds no images", expected="class folders, class tars or ILSVRC2012 images", got=f"{seen} members"
    )
