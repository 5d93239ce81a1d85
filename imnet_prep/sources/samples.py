"""The samples of a WebDataset: the image and the labels that share a name in a tar, up to its first dot.

Source: webdataset 1.0, ``tariterators.group_by_keys``: the files of a sample follow one another in the tar.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources.base import Found, Source, is_hidden, is_image_name, make_ref, meta_text, printable, suffix_of
from imnet_prep.sources.classes import IMAGENET, find_classes, names_of, numbered_note, read_classes
from imnet_prep.sources.img2dataset import account
from imnet_prep.sources.labels import WNID
from imnet_prep.sources.layout import SPLIT_FOLDERS
from imnet_prep.sources.tar import Member
from imnet_prep.types import SPLITS, Reason, Rejected, name_fault

_IMAGES = ("jpg", "jpeg", "png", "webp")  # preferred, in this order, where a sample has several images
_LABELS = {"cls": 4 << 10, "json": 1 << 20, "txt": 4 << 10}  # files of a label, and the bytes one may have
_NAME_KEYS, _KEYS = ("wnid", "class_name"), ("label", "class", "cls")  # of the JSON; the first name a class for sure
CLASS_KEYS = {*_NAME_KEYS, *_KEYS}
_FILE_KEYS = ("file_name", "filename")
_ALONE = "no .cls, .json or .txt of its name beside it in the tar"
_SEPARATOR = "\x1f"  # no URL holds it, and JSON escapes it
_MAX_NUMBER = 10**9  # of a class
_MAX_CLASS = 200  # characters; a longer text is a caption
_SPLIT = re.compile(r"(?<![a-z])(" + "|".join(SPLIT_FOLDERS) + r")(?![a-z])")
_FIELDS = 7
Label = int | str | None  # the number or name of a class; None in a test split without labels


def split_of(stem: str) -> str:
    """Return the split that the name of a tar tells, or an empty string."""
    found = {SPLIT_FOLDERS[name] for name in _SPLIT.findall(stem.lower())}
    return found.pop() if len(found) == 1 else ""


def is_sample(image: str, beside: str) -> bool:
    """Return whether a file beside an image in a tar is its label, by their names."""
    stem, _, suffix = beside.rpartition("/")[2].partition(".")
    return suffix.lower() in _LABELS and image.rpartition("/")[2].partition(".")[0] == stem


class _File(NamedTuple):
    """A file of a sample: what follows the first dot of its name, and its place."""

    suffix: str
    offset: int
    size_bytes: int


class Samples:
    """The samples of some tars, packed, for there may be millions.

    Attributes:
        images: Samples with an image, by the path of their tar.
    """

    def __init__(self) -> None:
        self.images = Counter[str]()
        self._paths: list[str] = []
        self._file: PlainFile | None = None
        self._split, self._key = "train", ""
        self._at_hand, self._labels = list[_File](), dict[str, _File]()  # the images and labels of one sample
        self._rows = defaultdict[tuple[str, Label], bytearray](bytearray)
        self._rejected = defaultdict[tuple[str, Reason, str], bytearray](bytearray)
        self._ignored = Counter[str]()
        self._sure = self._flat = self._deep = 0
        self._as_imagenet, self._against_imagenet, self._imagenet = 0, 0, catalog.labels()
        self._count = self._spooled = 0
        self._spool: IO[bytes] | None = None  # what the JSON says beyond class and name: too much for the memory

    def begin(self, path: Path, file: PlainFile, split: str) -> None:
        """Begin a tar whose samples are of one split."""
        self._paths.append(str(path))
        self._file, self._split = file, split

    def add(self, member: Member, folders: Sequence[str], base: str) -> bool:
        """Take a file of a tar, in the order of the tar.

        Args:
            member: The file. folders: The parts of its name but the last. base: The last.

        Returns:
            Whether it is a visible image by its name.
        """
        stem, _, suffix = base.partition(".")
        is_image = is_image_name(base)
        if not is_image and (suffix := suffix.lower()) not in _LABELS:
            self._ignored[suffix_of(base)] += 1
            return False
        if is_hidden(base) or any(map(is_hidden, folders)):
            self._ignored[suffix_of(base)] += 1
            return False
        if (key := f"{'/'.join(folders)}/{stem}" if folders else stem) != self._key or self._is_next(suffix):
            self._close()
            self._key = key
        file = _File(suffix, member.offset, member.size_bytes)
        if is_image:
            self._at_hand.append(file)
        else:
            self._labels[suffix] = file
        return is_image

    def _is_next(self, suffix: str) -> bool:
        """Return whether a file is of another sample with the key of the one at hand, which has such a file."""
        return suffix in self._labels or (bool(self._labels) and any(suffix == file.suffix for file in self._at_hand))

    def end(self) -> None:
        """End a tar."""
        self._close()
        self.images[self._paths[-1]], self._count = self._count, 0
        self._key = ""

    @property
    def are_there(self) -> bool:
        """Whether the tars hold samples: a label in a ``.cls`` or JSON, or any partner of images in no folder."""
        return self._sure > 0 or (self._flat > 0 and not self._deep)

    def _class_names(self, source: Source, notes: list[str]) -> Sequence[str]:
        """Return the names of numbered classes: those given, of a list beside the tars, or ImageNet's."""
        source.has_numbers = bool(self.numbers)
        if source.classes or not self.numbers:
            return source.classes
        place = Path(source.staged.given) if source.staged else source.path
        listed, names = find_classes(place if place.is_dir() else place.parent)
        if names:
            notes.append(f"{source.name}: its classes are named by {listed}")
        elif self._as_imagenet and not self._against_imagenet:
            notes.append(f"{source.name}: its classes are numbered as ImageNet's, and named by their WordNet ids")
            return read_classes(IMAGENET)
        else:
            notes.append(numbered_note(source.name))
            source.digits = len(str(max(self.numbers)))
        return names

    def _close(self) -> None:
        """Take the sample at hand."""
        images, labels = self._at_hand, self._labels
        self._at_hand, self._labels = [], {}
        if not images:
            self._without_image(labels)
            return
        self._count += 1
        if "/" in self._key:
            self._deep += 1
        elif labels:
            self._flat += 1
        if len(images) > 1:
            images.sort(key=_preference)
            for other in images[1:]:
                self._reject(Reason.DUPLICATE_NAME, "a second image of its sample", f"{self._key}.{other.suffix}")
        name = f"{self._key}.{images[0].suffix}"
        if labels:
            self._labelled(name, images[0], labels)
        elif self._split == "test":
            self._put(None, name, "", images[0], b"")
        else:
            self._reject(Reason.UNLABELLED, _ALONE, name)

    def _without_image(self, labels: Mapping[str, _File]) -> None:
        """Reject a label that has no image beside it; other texts are no part of the data."""
        is_label = "cls" in labels
        if not is_label and "json" in labels:
            values, fault = parse_values(self._read(labels["json"]))
            is_label = not fault and self._label(labels, values)[0] is not None
        if is_label:
            self._reject(Reason.UNREADABLE, "a label, and no image beside it in the tar", self._key)

    def _labelled(self, name: str, image: _File, labels: Mapping[str, _File]) -> None:
        """Take an image with files that may tell its label."""
        info, values, fault = labels.get("json"), dict[str, Any](), ""
        if info is not None:
            values, fault = parse_values(self._read(info))
        label: Label = None
        if not fault:
            label, fault, is_sure = self._label(labels, values)
            self._sure += is_sure
        if fault:
            self._reject(Reason.UNREADABLE, fault, name)
        elif label is None and self._split != "test":
            given = ", ".join(sorted(map(printable, values))[:8]) or "nothing"
            self._reject(Reason.UNLABELLED, f"no class in its sample, whose JSON has {given}", name)
        else:
            hint = next((value for key in _FILE_KEYS if isinstance(value := values.get(key), str)), "")
            if not self._against_imagenet and isinstance(label, int):
                self._compare_imagenet(label, f"{self._key}/{hint}")
            if hint and (name_fault(hint) or ".." in hint.split("/")):
                hint = ""
            rest = _rest(values, label, hint, name) if values else b""
            self._put(label, name, hint, image, rest)

    def _put(self, label: Label, name: str, hint: str, image: _File, rest: bytes) -> None:
        numbers = (len(self._paths) - 1, image.offset, image.size_bytes, self._spooled, len(rest))
        self._rows[self._split, label] += b"%b\x00%b\x00%d\x00%d\x00%d\x00%d\x00%d\x00" % (
            name.encode("utf-8", "surrogateescape"), hint.encode(), *numbers,
        )  # fmt: skip
        if rest:
            self._spool = self._spool or TemporaryFile()  # noqa: SIM115 - it lives as long as the samples
            self._spool.write(rest)
            self._spooled += len(rest)

    def _reject(self, reason: Reason, detail: str, name: str) -> None:
        self._rejected[self._split, reason, detail] += name.encode("utf-8", "surrogateescape") + b"\x00"

    def _read(self, file: _File) -> bytes:
        assert self._file is not None
        return self._file.read(file.size_bytes, file.offset) if file.size_bytes <= _LABELS[file.suffix] else b""

    def _label(self, labels: Mapping[str, _File], values: Mapping[str, Any]) -> tuple[Label, str, bool]:
        """Return the label of a sample, a contradiction in it (or an empty string), and whether it is one for sure."""
        given = [class_of(values[key]) for key in _KEYS if key in values]
        if "cls" in labels:
            given.insert(0, class_of(_text(self._read(labels["cls"])).split("\x00")[0]))
        numbers = [number for number in given if isinstance(number, int)]
        if len(numbers) > 1 and len(set(numbers)) > 1:
            return None, f"its labels contradict each other: {' and '.join(map(str, sorted(set(numbers))))}", True
        named = [text for key in _NAME_KEYS if key in values and (text := class_of(values[key]))]
        found = [*named, *(text for text in given if isinstance(text, str)), *numbers]
        if not found and not labels.keys() & {"cls", "json"}:
            return class_of(_text(self._read(labels["txt"]))), "", False
        label = found[0] if found else None
        return (None if isinstance(label, int) and label < 0 else label), "", bool(found)

    def _compare_imagenet(self, number: int, name: str) -> None:
        """Count whether a numbered class is ImageNet's, by the WordNet id in the name of the image."""
        if wnid := WNID.search(name):
            same = self._imagenet.get(wnid[0]) == number
            self._as_imagenet += same
            self._against_imagenet += not same

    @property
    def numbers(self) -> set[int]:
        """The classes that are numbers."""
        return {label for _, label in self._rows if isinstance(label, int)}

    def found_in(self, source: Source, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        """Yield the images by split, class and name; before them, the rejections.

        Args:
            source: The source that they are in.
            notes: Receives notes on what lies beside the tars.
            ignored: Counts the files of other samples.

        Raises:
            SourceError: A number has no name; the tars are not of the split that was asked for, or lack samples.
            OSError: A tar cannot be read.
        """
        ignored.update(self._ignored)
        if source.split and (other := {split for split, _ in self._rows} - {source.split}):
            raise SourceError(
                f"{source.path} holds the {other.pop()} split by its name",
                expected=f"the {source.split} split (--split)",
                remedy="rename it, or leave out --split",
            )
        notes += [note for path in self._paths if (note := account(Path(path), self.images[path]))]
        names = self._class_names(source, notes)
        for (part, reason, detail), packed in self._rejected.items():
            for name in packed.decode("utf-8", "surrogateescape").split("\x00")[:-1]:
                yield Rejected(part, printable(name), reason, detail)
        mapping = names_of(self.numbers, names, str(source.path))
        classes = defaultdict[tuple[int, str], bytearray](bytearray)
        for (part, label), rows in self._rows.items():
            name = mapping[label] if isinstance(label, int) else label or ""
            classes[SPLITS.index(part), name.replace("/", "_")] += rows
        for place, class_name in sorted(classes):
            for row in _named(_rows_of(classes[place, class_name]), class_name, self._paths):
                url, status, meta = "", None, ""
                if row.rest_bytes and self._spool is not None:
                    self._spool.seek(row.rest_offset)
                    url, number, meta = self._spool.read(row.rest_bytes).decode().split(_SEPARATOR)
                    status = int(number) if number else None
                path = self._paths[row.tar]
                yield make_ref(
                    SPLITS[place],
                    class_name,
                    row.name,
                    path,
                    row.offset,
                    row.size_bytes,
                    url=url,
                    status=status,
                    meta=meta,
                )


class _Row(NamedTuple):
    """A sample: its name, the name that its JSON gives, its tar, and the places of its image and the rest."""

    name: str
    hint: str
    tar: int
    offset: int
    size_bytes: int
    rest_offset: int
    rest_bytes: int


def _rows_of(packed: bytearray) -> Iterator[_Row]:
    fields = packed.decode("utf-8", "surrogateescape").split("\x00")  # the last is empty
    numbers = (map(int, fields[start:-1:_FIELDS]) for start in range(2, _FIELDS))
    for row in zip(fields[0:-1:_FIELDS], fields[1:-1:_FIELDS], *numbers, strict=True):
        yield _Row(*row)


def _named(rows: Iterable[_Row], class_name: str, paths: Sequence[str]) -> list[_Row]:
    """Return the rows by their final names: those that several tars use begin with the name of the tar."""
    named = [row._replace(name=_name(row, class_name)) for row in rows]
    tars = defaultdict[str, set[int]](set)
    for row in named:
        tars[row.name].add(row.tar)
    return sorted(
        row if len(tars[row.name]) == 1 else row._replace(name=f"{Path(paths[row.tar]).stem}/{row.name}")
        for row in named
    )


def _name(row: _Row, class_name: str) -> str:
    """Return the name of an image below its class: that in its JSON if it is the same file, else its key."""
    prefix = f"{class_name}/" if class_name else ""
    if row.hint:
        if row.hint.startswith(prefix) and len(row.hint) > len(prefix) and (prefix or "/" not in row.hint):
            return row.hint.removeprefix(prefix)
        if _is_same_file(row.hint, row.name):
            return row.hint.rpartition("/")[2]
    return row.name.removeprefix(prefix)


def _is_same_file(hint: str, name: str) -> bool:
    """Return whether the base names of two paths are the same up to their first dots."""
    return hint.rpartition("/")[2].partition(".")[0] == name.rpartition("/")[2].partition(".")[0] != ""


def _rest(values: dict[str, Any], label: Label, hint: str, name: str) -> bytes:
    """Return URL, status and all else that the JSON of a sample says beyond class and name, or nothing."""
    for key in values.keys() & CLASS_KEYS:
        if _number(values[key]) is not None or class_of(values[key]) == label:
            del values[key]
    if hint and (_is_same_file(hint, name) or hint.startswith(f"{label}/")):
        for key in _FILE_KEYS:
            if values.get(key) == hint:
                del values[key]
    url, status = values.get("url"), values.get("status")
    is_url, is_status = isinstance(url, str) and not name_fault(url), type(status) is int
    if is_url:
        del values["url"]
    if is_status:
        del values["status"]
    meta = meta_text(values) if values else ""
    parts = (str(url) if is_url else "", str(status) if is_status else "", meta)
    return _SEPARATOR.join(parts).encode() if any(parts) else b""


def parse_values(data: bytes) -> tuple[dict[str, Any], str]:
    """Parse the JSON object of a sample; return it, and why it is none, or an empty string."""
    try:
        values = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        return {}, f"its JSON cannot be read: {error}"
    return (values, "") if isinstance(values, dict) else ({}, "its JSON is no object")


def _text(data: bytes) -> str:
    """Return a text, or an empty one for bytes that are none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def class_of(value: object) -> Label:
    """Return the class that a value in a sample names or numbers, or None."""
    if (number := _number(value)) is not None:
        return number
    text = value.strip() if isinstance(value, str) else ""
    return text if text not in (".", "..") and len(text) <= _MAX_CLASS and not name_fault(text) else None


def _number(value: object) -> int | None:
    """Return the number that a value is, also as text or as a whole fraction, or None."""
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return int(value) if abs(value) < _MAX_NUMBER else None
    text = value.strip() if isinstance(value, str) else ""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def _preference(file: _File) -> tuple[int, str]:
    suffix = file.suffix.lower()
    return (_IMAGES.index(suffix) if suffix in _IMAGES else len(_IMAGES), suffix)
