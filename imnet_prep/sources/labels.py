"""Labels kept apart from the images: the devkit, Kaggle's CSV, Tiny-ImageNet's annotations.

Validation images are labelled by the number in their name, never by their position in a list of files.
Source: the readme of ILSVRC2012_devkit_t12; Kaggle's LOC_val_solution.csv; tiny-imagenet-200's val_annotations.txt.
"""

import csv
import io
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from imnet_prep.errors import SourceError
from imnet_prep.sources.base import printable
from imnet_prep.types import Reason, Rejected

T = TypeVar("T")
_OFFICIAL_NAME = re.compile(r"ILSVRC2012_(val|test)_(\d{8})\.[A-Za-z]+")
WNID = re.compile(r"n\d{8}")
KAGGLE_SOLUTION = "LOC_val_solution.csv"
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_MAX_DEVKIT_MEMBER_BYTES = 64 << 20  # the real meta.mat has 0.1 MB
_NOT_MATLAB = (  # what SciPy raises for damaged files
    AttributeError, EOFError, IndexError, KeyError, MemoryError, NotImplementedError, OSError, OverflowError, TypeError,
    ValueError, struct.error, zlib.error,
)  # fmt: skip
_LISTED = 20  # missing names listed in a note


def official_split(name: str) -> str:
    """Return ``val`` or ``test`` for the base name of an official image of that split, else an empty string."""
    return match[1] if (match := _OFFICIAL_NAME.fullmatch(name)) else ""


@dataclass(frozen=True, slots=True)
class Labels:
    """The classes of images by their number or name.

    Attributes:
        origin: The list's name in messages.
        by_key: Class name by val number (as a string without leading zeros) or by file name.
        numbered: Keys are numbers.
    """

    origin: str
    by_key: Mapping[str, str]
    numbered: bool

    def _key(self, name: str) -> str:
        base = name.rpartition("/")[2]
        if not self.numbered:
            return base
        match = _OFFICIAL_NAME.fullmatch(base)
        return str(int(match[2])) if match and match[1] == "val" else ""

    def of(self, name: str) -> str | None:
        """Return the class of an image by its name, or None."""
        return self.by_key.get(self._key(name))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return a note with the listed images that are missing; nothing if there are none."""
        absent = self.by_key.keys() - {self._key(name) for name in names}
        if not absent:
            return []
        names = sorted(f"ILSVRC2012_val_{int(key):08d}" if self.numbered else key for key in absent)
        listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
        return [f"{len(absent)} of {len(self.by_key)} images in {self.origin} are missing: {listed}"]


def labelled(
    files: Iterable[tuple[str, T]], split: str, labels: Labels | None, notes: list[str]
) -> Iterator[tuple[str, str, T] | Rejected]:
    """Yield the class, name and item of each file, sorted; before them, the rejections of files without a label.

    Args:
        files: The name of each file, and an item to return with it.
        split: The split of the files.
        labels: Their classes, or None for files without classes.
        notes: Receives a note on images that the labels list and ``files`` lacks.
    """
    rows: list[tuple[str, str, T]] = []
    for name, item in files:
        wnid = labels.of(name) if labels else ""
        if labels and wnid is None:
            yield Rejected(split, printable(name), Reason.UNLABELLED, f"not in {labels.origin}")
        else:
            rows.append((wnid or "", name, item))
    yield from sorted(rows, key=itemgetter(0, 1))
    if labels is not None:
        notes += labels.missing(name for _, name, _ in rows)


def read_devkit(path: Path) -> Labels:
    """Read the validation labels from the devkit, a ``.tar.gz`` or its unpacked folder.

    Raises:
        SourceError: It is not the devkit, or its parts contradict each other.
    """
    files = _devkit_folder(path) if path.is_dir() else _devkit_archive(path)
    for name in (_META, _TRUTH):
        if name not in files:
            raise SourceError(f"{path} is not the ILSVRC2012 devkit", expected=f"data/{name} in it", got="no such file")
    wnid_of, labels = _read_meta(files[_META], path), {}
    for number, line in enumerate(files[_TRUTH].decode("ascii", "replace").split(), start=1):
        wnid = wnid_of.get(int(line)) if line.isdecimal() else None
        if wnid is None:
            raise SourceError(
                f"{path}: line {number} of {_TRUTH} is not the ILSVRC2012_ID of a class",
                expected=f"one of {len(wnid_of)} ids",
                got=line[:20],
            )
        labels[str(number)] = wnid
    if not labels:
        raise SourceError(f"{path}: {_TRUTH} is empty", remedy="download the devkit again")
    return Labels("the devkit's ground truth", labels, numbered=True)


def _devkit_folder(path: Path) -> dict[str, bytes]:
    places = [folder / name for name in (_META, _TRUTH) for folder in (path, path / "data")]  # data/ is preferred
    return {
        place.name: place.read_bytes()
        for place in places
        if place.is_file() and place.stat().st_size <= _MAX_DEVKIT_MEMBER_BYTES
    }


def _devkit_archive(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in (_META, _TRUTH) and member.isreg() and member.size <= _MAX_DEVKIT_MEMBER_BYTES:
                    stream = archive.extractfile(member)
                    files[name] = stream.read() if stream else b""
                if len(files) == 2:
                    break
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise SourceError(
            f"{path} is not the ILSVRC2012 devkit", expected="a tar.gz that can be read", got=str(error)
        ) from error
    return files


def _read_meta(data: bytes, path: Path) -> dict[int, str]:
    """Return wnid by ILSVRC2012_ID of the classes, which are the leaves of the hierarchy."""
    from scipy.io import loadmat

    try:
        table = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"].reshape(-1)
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_children"])) for row in table]
    except _NOT_MATLAB as error:
        raise SourceError(f"{path}: {_META} cannot be read", expected="a MATLAB v5 file", got=str(error)) from error
    return {number: wnid for number, wnid, children in rows if children == 0}


def read_kaggle_solution(path: Path) -> Labels:
    """Read Kaggle's LOC_val_solution.csv.

    Raises:
        SourceError: It is not that file.
        OSError: It cannot be read.
    """
    return kaggle_labels(path.read_bytes(), str(path))


def kaggle_labels(data: bytes, origin: str) -> Labels:
    """Read the content of LOC_val_solution.csv: ``ImageId,PredictionString``; the class is the string's first token.

    Raises:
        SourceError: It is not that.
    """
    rows: list[tuple[str, str]] = []
    try:
        for row in csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline=""), strict=True):
            match = re.fullmatch(r"ILSVRC2012_val_(\d{8})(\.[A-Za-z]+)?", row[0].strip()) if row else None
            if match and len(row) > 1 and (tokens := row[1].split()):
                rows.append((str(int(match[1])), tokens[0]))
    except csv.Error as error:
        raise SourceError(f"{origin} is damaged", got=str(error), remedy="download it again") from error
    labels = _consistent(rows, origin)
    if not labels:
        raise SourceError(f"{origin} is not Kaggle's {KAGGLE_SOLUTION}", expected="ILSVRC2012_val_... rows", got="none")
    return Labels(KAGGLE_SOLUTION, labels, numbered=True)


def read_tiny_annotations(data: bytes, origin: str) -> Labels:
    """Read Tiny-ImageNet's val_annotations.txt: ``name<TAB>wnid<TAB>box``.

    Raises:
        SourceError: It has no such line.
    """
    rows = (line.split("\t") for line in data.decode("utf-8", "replace").splitlines())
    named = ((row[0].strip(), row[1].strip()) for row in rows if len(row) >= 2)
    labels = _consistent(((name, wnid) for name, wnid in named if name and wnid), origin)
    if not labels:
        raise SourceError(f"{origin} holds no labels", expected="name<TAB>wnid lines")
    return Labels("val_annotations.txt", labels, numbered=False)


def _consistent(rows: Iterable[tuple[str, str]], origin: str) -> dict[str, str]:
    """Return the class of each image.

    Raises:
        SourceError: An image has two classes, or a class is called as no folder can be.
    """
    labels = dict[str, str]()
    for name, class_name in rows:
        if "/" in class_name or class_name in (".", ".."):
            raise SourceError(
                f"{origin} has a class that is no name", got=printable(class_name), remedy="download it again"
            )
        if (other := labels.setdefault(name, class_name)) != class_name:
            raise SourceError(
                f"{origin} gives one image two classes",
                expected="one for each",
                got=printable(f"{other} and {class_name} for {name}"),
                remedy="download it again",
            )
    return labels
