"""The formats of an export: class folders, and WebDataset tars."""

import io
import json
import os
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from imnet_prep.build.export_names import Repeated, class_folders, image_path, sample_key, with_digest
from imnet_prep.errors import IntegrityError
from imnet_prep.images.formats import sniff
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.record_list import RecordLine
from imnet_prep.sources.samples import CLASS_KEYS, class_of
from imnet_prep.types import ImageFault

CLASS_NAMES = "classnames.txt"  # beside the tars, in label order
FORMATS = ("imagefolder", "webdataset")
_NAMING = {*CLASS_KEYS, "file_name"}
_TAR_BYTES, _TAR_IMAGES = 512 << 20, 10_000  # of a tar: the usual sizes


class Names:
    """The path of each image of a split, relative to the split or the set of tars."""

    def __init__(self, folder: RecordsFolder, split: str, to: str) -> None:
        self._classes, self._folders = folder.manifest.classes, class_folders(folder.manifest.classes)
        self._path = image_path if to == "imagefolder" else sample_key
        self._repeated = Repeated(self._plain(line) for line in folder.lines(split))

    def path(self, line: RecordLine) -> str:
        """Return the path of a record's image: an image path, or the key of a sample."""
        path = self._plain(line)
        return with_digest(path, line.file_name) if path in self._repeated else path

    def _plain(self, line: RecordLine) -> str:
        if not 0 <= line.label < len(self._classes):
            return self._path(line.file_name)
        class_name = self._classes[line.label]
        return f"{self._folders[class_name]}/{self._path(line.file_name.removeprefix(f'{class_name}/'))}"


class Writer(Protocol):
    """Write images in one format."""

    def write(self, split: str, path: str, image: bytes, line: RecordLine) -> None:
        """Write an image, and what is known of it.

        Raises:
            OSError: The disk is full or fails.
        """

    def end_split(self, split: str, images: int) -> None:
        """End a split.

        Raises:
            IntegrityError: Not all of its images are there.
        """

    def close(self) -> None:
        """Close what is open."""


class ClassFolders(Writer):
    """``<split>/<class>/<name>`` in a folder."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, set[Path]()

    def write(self, split: str, path: str, image: bytes, line: RecordLine) -> None:
        """Write an image."""
        place = self._root / split / path
        if place.parent not in self._made:
            place.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(place.parent)
        with place.open("xb") as file:
            file.write(image)

    def end_split(self, split: str, images: int) -> None:
        """Count the files of a split."""
        found = sum(len(files) for _, _, files in os.walk(self._root / split))
        _check_count(self._root / split, images, found)

    def close(self) -> None:
        """Do nothing: each file is closed once it is written."""


class Tars(Writer):
    """``<split>-<number>.tar`` in a folder, and the names of the classes in label order."""

    def __init__(self, root: Path, classes: tuple[str, ...]) -> None:
        self._root, self._classes = root, classes
        self._tar: tarfile.TarFile | None = None
        self._opened = ExitStack()
        self._number = self._images = self._bytes = self._written = 0
        names = "".join(f"{name}\n" for name in classes)
        (root / CLASS_NAMES).write_text(names, encoding="utf-8", newline="\n")

    def write(self, split: str, path: str, image: bytes, line: RecordLine) -> None:
        """Write a sample: the image, its label as ``.cls`` and all that is known of it as ``.json``."""
        if self._tar is None or self._bytes >= _TAR_BYTES or self._images >= _TAR_IMAGES:
            self.close()
            stream = self._opened.enter_context((self._root / f"{split}-{self._number:05d}.tar").open("xb"))
            self._opened.callback(lambda: os.fsync(stream.fileno()))
            self._opened.callback(stream.flush)
            self._tar = self._opened.enter_context(tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT))
            self._number, self._images, self._bytes = self._number + 1, 0, 0
        is_labelled = 0 <= line.label < len(self._classes)
        name = self._classes[line.label] if is_labelled else ""
        known = {
            "class": name if name and class_of(name) == name else None,  # "7" would be read as a label
            "label": line.label if is_labelled else None,
            "file_name": line.file_name,
            "url": line.url or None,
            "status": line.status,
        }
        # Of the source, and not what this image is called here: a reader must not take them for it.
        meta = {f"source_{key}" if key in _NAMING else key: value for key, value in (line.meta or {}).items()}
        values = meta | {key: value for key, value in known.items() if value is not None}
        files = {_suffix(image): image, "json": json.dumps(values, sort_keys=True, ensure_ascii=False).encode()}
        if is_labelled:
            files["cls"] = str(line.label).encode()
        for suffix, data in files.items():
            member = tarfile.TarInfo(f"{path}.{suffix}")
            member.size, member.mode = len(data), 0o644
            self._tar.addfile(member, io.BytesIO(data))
        self._images, self._bytes, self._written = self._images + 1, self._bytes + len(image), self._written + 1

    def end_split(self, split: str, images: int) -> None:
        """Finish the last tar of a split."""
        self.close()
        written, self._written, self._number = self._written, 0, 0
        _check_count(self._root / f"{split}-*.tar", images, written)

    def close(self) -> None:
        """Finish the tar at hand, and flush it to the disk."""
        self._tar = None
        self._opened.close()


def _check_count(place: Path, expected: int, found: int) -> None:
    if found != expected:
        raise IntegrityError(
            f"{place}: not all images are there",
            expected=f"{expected} images",
            got=str(found),
            remedy="check the disk, then run the same command again",
        )


def _suffix(image: bytes) -> str:
    """Return the suffix of an image; nearly all are JPEGs, but adopted records may hold others."""
    try:
        return sniff(image).lower().replace("jpeg", "jpg")
    except ImageFault:
        return "jpg"
