"""The samples of a WebDataset: the image and the labels that share a name in a tar, up to its first dot.

Source: webdataset 1.0, ``tariterators.group_by_keys``: the files of a sample follow one another in the tar.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile, max_open_files
from imnet_prep.sources.base import Found, Source, is_hidden, is_image_name, make_ref, meta_text, printable, suffix_of
from imnet_prep.sources.classes import IMAGENET, find_classes, names_of, numbered_note, read_classes
from imnet_prep.sources.img2dataset import account
from imnet_prep.sources.labels import WNID
from imnet_prep.sources.layout import SPLIT_FOLDERS
from imnet_prep.sources.tar import Member
from imnet_prep.types import SPLITS, ImageRef, Reason, Rejected, name_fault

_IMAGES = ("jpg", "jpeg", "png", "webp")  # preferred, in this order, where a sample has several images
_LABELS = {"cls": 4 << 10, "json": 1 << 20, "txt": 4 << 10}  # files of a label, and the bytes one may have
_NAME_KEYS, _KEYS = ("wnid", "class_name"), ("label", "class", "cls")  # of the JSON; the first name a class for sure
_FILE_KEYS = ("file_name", "filename")
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
        self._open: list[tuple[_File, bool]] = []  # the files of the sample at hand, and whether each is an image
        self._rows = defaultdict[tuple[str, Label], bytearray](bytearray)
        self._rejected = defaultdict[tuple[str, Reason, str], bytearray](bytearray)
        self._ignored = Counter[str]()
        self._sure = self._flat = self._deep = 0
        self._as_imagenet, self._against_imagenet = 0, 0

    def begin(self, path: Path, file: PlainFile, split: str) -> None:
        """Begin a tar whose samples are of one split."""
        self._paths.append(str(path))
        self._file, self._split = file, split

    def add(self, member: Member) -> None:
        """Take a file of a tar, in the order of the tar."""
        *folders, base = member.parts
        stem, _, suffix = base.partition(".")
        suffix, is_image = suffix.lower() if suffix.lower() in _LABELS else suffix, is_image_name(base)
        if (not is_image and suffix not in _LABELS) or any(map(is_hidden, (*folders, base))):
            self._ignored[suffix_of(base)] += 1
            return
        if (key := "/".join((*folders, stem))) != self._key:
            self._close()
            self._key = key
        self._open.append((_File(suffix, member.offset, member.size_bytes), is_image))

    def end(self) -> None:
        """End a tar."""
        self._close()
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
        listed, names = find_classes(source.path if source.path.is_dir() else source.path.parent)
        if names:
            notes.append(f"{source.name}: its classes are named by {listed}")
        elif self._as_imagenet and not self._against_imagenet:
            notes.append(f"{source.name}: its classes are numbered as ImageNet's, and named by their WordNet ids")
            return read_classes(IMAGENET)
        else:
            notes.append(numbered_note(source.name))
        return names

    def _close(self) -> None:
        """Take the sample at hand."""
        sample, self._open = self._open, []
        images = sorted((file for file, is_image in sample if is_image), key=_preference)
        labels = {file.suffix: file for file, is_image in sample if not is_image}
        if not images:
            is_label = "cls" in labels
            if "json" in labels:
                values, fault = self._values(labels["json"])
                is_label = is_label or (not fault and self._label(labels, values)[0] is not None)
            if is_label:
                self._reject(Reason.UNREADABLE, "a label, and no image beside it in the tar", self._key)
            return
        self.images[self._paths[-1]] += 1
        self._flat += bool(labels) and "/" not in self._key
        self._deep += "/" in self._key
        first, *others = images
        for other in others:
            self._reject(Reason.DUPLICATE_NAME, "a second image of its sample", f"{self._key}.{other.suffix}")
        name = f"{self._key}.{first.suffix}"
        if not labels:
            if self._split == "test":
                self._put(None, name, "", first, None)
            else:
                detail = "no .cls, .json or .txt of its name beside it in the tar"
                self._reject(Reason.UNLABELLED, detail, name)
            return
        values, fault = self._values(labels.get("json"))
        label, label_fault, is_sure = (None, "", False) if fault else self._label(labels, values)
        self._sure += is_sure
        if fault := fault or label_fault:
            self._reject(Reason.UNREADABLE, fault, name)
        elif label is None and self._split != "test":
            given = ", ".join(sorted(map(printable, values))[:8]) or "nothing"
            self._reject(Reason.UNLABELLED, f"no class in its sample, whose JSON has {given}", name)
        else:
            hint = next((value for key in _FILE_KEYS if isinstance(value := values.get(key), str)), "")
            self._compare_imagenet(label, f"{self._key}/{hint}")
            self._put(label, name, "" if name_fault(hint) else hint, first, labels.get("json"))

    def _put(self, label: Label, name: str, hint: str, image: _File, info: _File | None) -> None:
        tar, (offset, size) = len(self._paths) - 1, image[1:]
        place = (info.offset, info.size_bytes) if info else (0, 0)
        self._rows[self._split, label] += b"%b\x00%b\x00%d\x00%d\x00%d\x00%d\x00%d\x00" % (
            name.encode("utf-8", "surrogateescape"), hint.encode(), tar, offset, size, *place,
        )  # fmt: skip

    def _reject(self, reason: Reason, detail: str, name: str) -> None:
        self._rejected[self._split, reason, detail] += name.encode("utf-8", "surrogateescape") + b"\x00"

    def _read(self, file: _File) -> bytes:
        assert self._file is not None
        return self._file.read(file.size_bytes, file.offset) if file.size_bytes <= _LABELS[file.suffix] else b""

    def _values(self, info: _File | None) -> tuple[dict[str, Any], str]:
        """Return the JSON of a sample, and why it cannot be read, or an empty string."""
        if info is None:
            return {}, ""
        return parse_values(self._read(info))

    def _label(self, labels: Mapping[str, _File], values: Mapping[str, Any]) -> tuple[Label, str, bool]:
        """Return the label of a sample, a contradiction in it (or an empty string), and whether it is one for sure."""
        named = [text for key in _NAME_KEYS if (text := _class(values.get(key)))]
        given = [_class(values.get(key)) for key in _KEYS]
        if "cls" in labels:
            given.insert(0, _class(self._read(labels["cls"]).decode("utf-8", "replace").split("\x00")[0]))
        numbers = [number for number in given if isinstance(number, int)]
        if len(set(numbers)) > 1:
            return None, f"its labels contradict each other: {' and '.join(map(str, sorted(set(numbers))))}", True
        found = [*named, *(text for text in given if isinstance(text, str)), *numbers]
        if not found and not labels.keys() & {"cls", "json"}:
            return _class(self._read(labels["txt"]).decode("utf-8", "replace")), "", False
        label = found[0] if found else None
        return (None if isinstance(label, int) and label < 0 else label), "", bool(found)

    def _compare_imagenet(self, label: Label, name: str) -> None:
        """Count whether a numbered class is ImageNet's, by the WordNet id in the name of the image."""
        if isinstance(label, int) and (wnid := WNID.search(name)):
            same = catalog.labels().get(wnid[0]) == label
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
        opened = lru_cache(maxsize=max_open_files() // 2)(PlainFile)
        for place, class_name in sorted(classes):
            for row in _named(_rows_of(classes[place, class_name]), class_name, self._paths):
                path = self._paths[row.tar]
                found = make_ref(SPLITS[place], class_name, row.name, path, row.offset, row.size_bytes)
                if row.json_bytes and isinstance(found, ImageRef):
                    values, _ = parse_values(opened(path).read(row.json_bytes, row.json_offset))
                    yield _with_values(found, values)
                else:
                    yield found


class _Row(NamedTuple):
    """A sample: its name, the name that its JSON gives, its tar, and the places of its image and its JSON."""

    name: str
    hint: str
    tar: int
    offset: int
    size_bytes: int
    json_offset: int
    json_bytes: int


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
    prefix, base = f"{class_name}/" if class_name else "", row.hint.rpartition("/")[2]
    if row.hint.startswith(prefix) and len(row.hint) > len(prefix) and (prefix or base == row.hint):
        return row.hint.removeprefix(prefix)
    if base and base.partition(".")[0] == row.name.rpartition("/")[2].partition(".")[0]:
        return base
    return row.name.removeprefix(prefix)


def _with_values(found: ImageRef, values: dict[str, Any]) -> ImageRef:
    """Return a reference with what the JSON of its sample says beyond class and name."""
    for key in (*_NAME_KEYS, *_KEYS):
        if key in values and (_number(values[key]) is not None or _class(values[key]) == found.class_name):
            del values[key]
    for key in _FILE_KEYS:
        if values.get(key) in (found.file_name, found.file_name.rpartition("/")[2]):
            del values[key]
    url, status = values.get("url"), values.get("status")
    if isinstance(url, str) and not name_fault(url):
        found = replace(found, url=values.pop("url"))
    if type(status) is int:
        found = replace(found, status=values.pop("status"))
    return replace(found, meta=meta_text(values))


def parse_values(data: bytes) -> tuple[dict[str, Any], str]:
    """Parse the JSON object of a sample; return it, and why it is none, or an empty string."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        return {}, f"its JSON cannot be read: {error}"
    return (values, "") if isinstance(values, dict) else ({}, "its JSON is no object")


def _class(value: object) -> Label:
    """Return the class that a value names or numbers, or None."""
    if (number := _number(value)) is not None:
        return number
    text = value.strip() if isinstance(value, str) else ""
    return text if text and len(text) <= _MAX_CLASS and "\n" not in text else None


def _number(value: object) -> int | None:
    """Return the number that a value is, also as text or as a whole fraction, or None."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = value.strip() if isinstance(value, str) else ""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def _preference(file: _File) -> tuple[int, str]:
    suffix = file.suffix.lower()
    return (_IMAGES.index(suffix) if suffix in _IMAGES else len(_IMAGES), suffix)
