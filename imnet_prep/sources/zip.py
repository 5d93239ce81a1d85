"""Zip archives of class folders, read in place: photographs, and Kaggle's copy of ImageNet."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from imnet_prep.errors import SourceError
from imnet_prep.sources.base import Found, Source, is_hidden, is_image_name, printable, suffix_of
from imnet_prep.sources.labels import (
    KAGGLE_SOLUTION,
    Labels,
    kaggle_labels,
    official_split,
    read_kaggle_solution,
    read_tiny_annotations,
)
from imnet_prep.sources.layout import SPLIT_FOLDERS, Index
from imnet_prep.sources.tar import FOLDER
from imnet_prep.sources.zip_directory import DEFLATED, Entry, Zip
from imnet_prep.types import ImageRef, Reason, Rejected

_MAX_LIST_BYTES = 64 << 20  # Kaggle's solution has 2 MB
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_WEBDATASET = ".cls"


class ClassZip(Source):
    """A zip of class folders, as :class:`~imnet_prep.sources.archives.ClassTar` is a tar of them.

    Attributes:
        labels: The classes of validation images without class folders.

    Raises:
        SourceError: It is not a whole zip archive, or holds no images that are read in place.
        OSError: It cannot be read.
    """

    labels: Labels | None = None

    def __init__(self, path: Path, split: str) -> None:
        lists, archives, samples, images = dict[str, Entry](), list[str](), 0, 0
        archive, self._is_flat = Zip(path), False
        for entry in archive.entries():
            *folders, base = entry.parts
            if base in (KAGGLE_SOLUTION, "val_annotations.txt") and not any(map(is_hidden, folders)):
                lists[base] = entry
            elif _is_image(entry):
                images += 1
                above = SPLIT_FOLDERS.get(folders[-1].lower()) if folders else ""
                self._is_flat |= above == "val" and official_split(base) == "val"
            elif base.lower().endswith(_ARCHIVES) and not is_hidden(base):
                archives.append(base)
            samples += base.endswith(_WEBDATASET)
        if samples or not images:
            raise self._refused(path, images, samples, archives)
        super().__init__(path, "kaggle-zip" if self._is_flat else "class-zip", split)
        beside = path.with_name(KAGGLE_SOLUTION)
        if found := lists.get(KAGGLE_SOLUTION):
            self.labels = kaggle_labels(archive.read(found, _MAX_LIST_BYTES), KAGGLE_SOLUTION)
        elif self._is_flat and beside.is_file():
            self.labels = read_kaggle_solution(beside)
        elif found := lists.get("val_annotations.txt"):
            data = archive.read(found, _MAX_LIST_BYTES)
            self.labels = read_tiny_annotations(data, f"{path}: {printable(found.name)}")

    @staticmethod
    def _refused(path: Path, images: int, samples: int, archives: Sequence[str]) -> SourceError:
        got = f"{images} images" if images else ", ".join(map(printable, archives[:5])) or "none"
        if samples:
            return SourceError(
                f"{path} is a zip of WebDataset samples",
                expected="class folders",
                got=f"{samples} files *{_WEBDATASET}",
                remedy="unpack it and pack its files into a tar, which is read as a WebDataset",
            )
        return SourceError(
            f"{path} holds no images that are read in place",
            expected="class folders with images",
            got=got,
            remedy="unpack it and give the folder or the archives in it",
        )

    def unlabelled(self) -> Sequence[Self]:
        """Return the archive itself if it holds validation images whose classes are not known yet."""
        return [self] if self._is_flat and self.labels is None and self.split in ("", "val") else []

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        archive, index, split = Zip(self.path), Index(self.path), self.split or "train"
        archives: list[str] = []
        for entry in archive.entries():
            if entry.kind == FOLDER:
                archive.place(entry)
                continue
            *folders, base = entry.parts
            start, differs = archive.place(entry)
            if differs or (entry.fault and _is_image(entry)):
                yield Rejected(split, printable(entry.name), Reason.UNREADABLE, differs or entry.fault)
            elif _is_image(entry):
                packed = entry.packed_bytes if entry.method == DEFLATED else 0
                index.add(folders, base, start, entry.size_bytes, packed, entry.crc32)
            else:
                ignored[suffix_of(base)] += 1
                if base.lower().endswith(_ARCHIVES) and not is_hidden(base):
                    archives.append(entry.name)
        archive.check_whole()
        if archives:
            listed = ", ".join(map(printable, archives[:5])) + (", ..." if len(archives) > 5 else "")
            notes.append(f"{self.name}: archives in it are not read ({listed})")
        names: list[str] = []  # of the validation images
        for found in index.found(str(self.path), self.split, self.labels):
            if isinstance(found, ImageRef) and found.split == "val" and self._is_flat:
                names.append(found.file_name)
            yield found
        if self.labels is not None and self._is_flat and self.split in ("", "val"):
            notes += self.labels.missing(names)


def _is_image(entry: Entry) -> bool:
    *folders, base = entry.parts
    hidden = any(is_hidden(folder) for folder in folders if folder != "..")
    return entry.kind != FOLDER and is_image_name(base) and not hidden
