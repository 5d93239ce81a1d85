"""Images in Parquet files, as Hugging Face lays them out: one file, or a folder of shards.

Each file is read once, in order, row group by row group: the bytes of its images go to one flat file in the staging
folder, the rest of each row to a list beside it.

Source: https://huggingface.co/docs/datasets/about_dataset_features (the struct of an image, ClassLabel, and the key
``huggingface`` of the schema).
"""

import json
import os
import re
import sqlite3
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from imnet_prep import catalog, remote
from imnet_prep.errors import SourceError
from imnet_prep.remote import RemoteFile
from imnet_prep.sources.base import Found, Source, is_image_name, make_ref, printable
from imnet_prep.sources.classes import numbered_note
from imnet_prep.sources.folders import archives_note
from imnet_prep.sources.layout import SPLIT_FOLDERS
from imnet_prep.sources.parquet_rows import BLOB, LISTED, START, extract, holds_images
from imnet_prep.sources.staging import Place, Reading, Staged, Staging, fingerprint, shown, write
from imnet_prep.sources.tree import has_image, is_folder, listed, listing
from imnet_prep.types import SPLITS, ImageRef, Reason, Rejected

_FORMAT = 1  # of what is staged
_NUMBERED = re.compile(r"(.*?)-?(\d{5})-of-(\d{5})(-[0-9a-f]+)?\.parquet")
_MANY_FOLDERS = 64  # more of them are classes
_WNID_AT_END = re.compile(r"(.+)_(n\d{8})(\.\w+)")  # n01440764_10026_n01440764.JPEG, as in ILSVRC/imagenet-1k
_WIDEST = 20  # digits of a uint64
_SAME_WORDS_FRAC = 0.98  # copies of ImageNet's list differ in a few words: "crane2" for the second crane
_NOT_IN_A_NAME = re.compile(r"[/\\\x00-\x1f\x7f]")


class Shard(NamedTuple):
    """A file of the source.

    Attributes:
        split: Its split.
        place: Where it is.
    """

    split: str
    place: Place


class ParquetSource(Source):
    """Images in the rows of Parquet files, which are brought at once.

    Args:
        path: The file or folder; for a URL, the staging folder.
        given: The same as given, for messages.
        shards: The files, in order.
        split: The split requested, or empty.
        staging: Where their images are brought.

    Raises:
        SourceError: One is damaged or has no images, or changes meanwhile.
        RemoteError: One cannot be read.
    """

    def __init__(self, path: Path, given: str, shards: Sequence[Shard], split: str, staging: Staging) -> None:
        super().__init__(path, "parquet", split)
        self.name = printable(remote.base_name(given) if remote.is_url(given) else self.name)
        self._given, self._staging = given, staging
        self.beside: Sequence[str] = ()  # archives in the same folder behind a URL, for a note
        self._is_file = shown(shards[0].place) == given
        self._brought = [(shard, *self._bring(shard)) for shard in shards]

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        brought = self._brought
        columns = self._same_columns([(shard, info) for shard, _, info in brought])
        names, wnids = self._class_names(columns["names"])
        with closing(sqlite3.connect("", isolation_level=None)) as rows:  # a temporary file, once it is large
            rows.execute(
                "CREATE TABLE row(split INTEGER, class TEXT, name TEXT, number INTEGER, path INTEGER, "
                "offset INTEGER, size INTEGER, meta TEXT)"
            )
            rows.execute("BEGIN")
            number = Counter[str]()
            for place, (shard, folder, info) in enumerate(brought):
                row_of = partial(_row, shard.split, names, wnids, columns["label"])
                lines = _listed(folder / LISTED, number[shard.split])
                yield from _insert(rows, (row_of(place, *row) for row in lines))
                number[shard.split] += info["rows"]
            width = len((rows.execute("SELECT MAX(class) FROM row").fetchone()[0] or "").lstrip("0")) or 1
            self.has_numbers = columns["kind"] == "number"
            unnamed = self.has_numbers and not names
            self.digits = width if unnamed else 0
            notes += self._notes(columns, wnids, unnamed, _make_unique(rows))
            notes += archives_note(Path(self._given), ".parquet") if Path(self._given).is_dir() else []
            notes += [f"{self.name}: archives beside are not read ({listed(self.beside)})"] if self.beside else []
            paths = [str(folder / BLOB) for _, folder, _ in brought]
            order = "SELECT split, class, name, path, offset, size, meta FROM row ORDER BY split, class, name, number"
            for split, class_name, name, path, offset, size, meta in rows.execute(order):
                label = class_name[-width:] if unnamed else class_name
                found = make_ref(SPLITS[split], label, name, paths[path], offset, size)
                yield replace(found, meta=meta) if meta and isinstance(found, ImageRef) else found

    def _bring(self, shard: Shard) -> tuple[Path, dict[str, Any]]:
        """Bring the images of a file, and return the folder with them and what was noted."""
        given, place = shown(shard.place), shard.place
        key = ["parquet", _FORMAT, self._is_file, *fingerprint(place)]
        keep = isinstance(place, Path) or bool(place.version)
        folder, info = self._staging.entry(key, lambda folder: self._fill(folder, place, given), keep=keep)
        if self._is_file:
            self.staged = Staged(given, place.name, folder / BLOB, info["size_bytes"], info["md5"], info["sha256"])
        return folder, info

    def _fill(self, folder: Path, place: Place, given: str) -> dict[str, Any]:
        report = self._staging.progress
        reading = Reading(place, report if isinstance(place, RemoteFile) else lambda state: None, with_md5=False)
        if isinstance(place, RemoteFile):
            copy = folder / place.name
            write(copy, iter(reading), given, place.size_bytes or 0)
            info = extract(copy, given, folder, report)
            copy.unlink()
        else:
            with reading.aside() if self._is_file else nullcontext():
                info = extract(place, given, folder, report)
        return {**info, **reading.close()}

    def _same_columns(self, infos: Sequence[tuple[Shard, dict[str, Any]]]) -> dict[str, Any]:
        """Check that all files have the same columns and class names, and return them.

        Raises:
            SourceError: They do not, or have no classes.
        """
        known: dict[str, Any] | None = None
        for shard, info in infos:
            columns = info["columns"]
            if columns["label"] is None and shard.split != "test":
                raise SourceError(
                    f"{shown(shard.place)} has no column of classes that can be told by type and name",
                    expected="an integer or string column called label, labels, fine_label, class or cls",
                    got=", ".join(columns["others"]) or "images alone",
                    remedy="rename the column",
                )
            if columns["label"] is None or not info["rows"]:
                continue
            known = known or columns
            if any(columns[name] != known[name] for name in ("label", "kind", "names")):
                raise SourceError(
                    f"{self._given}: its files have different columns or class names",
                    expected=f"classes in {known['label']!r} in all files",
                    got=f"{columns['label']!r} in {shard.place.name}",
                    remedy="give them one by one",
                )
        return known or infos[0][1]["columns"]

    def _class_names(self, named: list[str] | None) -> tuple[list[str], bool]:
        """Return the class names in label order (none: numbers or texts are names), and if they are ImageNet's ids.

        Raises:
            SourceError: Two of them are the same.
        """
        if not self.classes and named and is_imagenet(named):
            return [wnid for wnid, _ in catalog.synsets()], True
        names = list(self.classes) or [class_name(name) for name in named or ()]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise SourceError(
                f"{self._given}: two classes have the same name",
                expected="each name once, also where / is replaced by _",
                got=", ".join(twice[:5]),
                remedy="give other names in label order (--classes FILE)",
            )
        return names, False

    def _notes(self, columns: dict[str, Any], wnids: bool, unnamed: bool, renamed: int) -> Iterator[str]:
        classes = f"classes from {columns['label']!r}" if columns["label"] else "no classes"
        ids = ", ImageNet's, under their WordNet ids" if wnids else ""
        yield f"{self.name}: images from the column {columns['image']!r}, {classes}{ids}"
        if unnamed:
            yield numbered_note(self.name)
        if renamed:
            yield f"{self.name}: {renamed} images have the name of another one of their class; -row and a number added"


def is_imagenet(names: Sequence[str]) -> bool:
    """Return whether class names are the words of ImageNet's 1,000 classes, in their order."""

    def first(words: str) -> str:
        return re.sub(r"[\W\d_]+", " ", words.split(",", maxsplit=1)[0]).strip().lower()

    words = [synset.words for synset in catalog.synsets()]
    same = sum(first(name) == first(word) for name, word in zip(names, words, strict=False))
    return len(names) == len(words) and same >= _SAME_WORDS_FRAC * len(words)


def class_name(name: str) -> str:
    """Return a name that can be that of a folder."""
    text = _NOT_IN_A_NAME.sub("_", name.strip())
    return text.replace(".", "_") if text in (".", "..") else text or "_"


# --- rows ------------------------------------------------------------------------------------------------------------


def _listed(path: Path, first: int) -> Iterator[tuple[Any, ...]]:
    """Yield number, offset, size, label, name and meta of each row of a file."""
    offset = len(START)
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, first):
            size, label, name, meta = json.loads(line)
            yield number, offset, size, label, name, meta
            offset += size if size >= 0 else -1 - size


def _row(
    split: str, names: Sequence[str], wnids: bool, column: str | None, place: int, *row: Any
) -> tuple[Any, ...] | Rejected:
    """Return a row of the table, or the rejection of an image without bytes or class."""
    number, offset, size, label, name, meta = row
    name = f"{number:08d}{name}" if name.startswith(".") else name
    if size < 0:
        return Rejected(split, printable(name), Reason.UNREADABLE, f"row {number}: its image is null")
    if label is None or label == -1:
        if split != "test":
            return Rejected(split, printable(name), Reason.UNLABELLED, f"row {number}: its {column} is {label}")
        found = ""
    elif isinstance(label, str):
        found = class_name(label)
    elif not names and label >= 0:
        found = f"{label:0{_WIDEST}d}"
    elif 0 <= label < len(names):
        found = names[label]
    else:
        raise SourceError(
            f"row {number} of {split}: class {label} has no name",
            expected=f"numbers from 0 to {len(names) - 1}" if names else "numbers from 0",
            got=str(label),
            remedy="give the list of all class names in label order (--classes FILE)",
        )
    if match := _WNID_AT_END.fullmatch(name):
        if wnids and found and match[2] != found:
            raise SourceError(
                f"row {number} of {split}: the label is {found}, the name is {name}",
                expected="the same class",
                remedy="the labels or names of this copy are wrong: download it again",
            )
        name = match[1] + match[3] if match[2] == found else name
    return SPLITS.index(split), found, name, number, place, offset, size, meta


def _insert(table: sqlite3.Connection, rows: Iterator[tuple[Any, ...] | Rejected]) -> Iterator[Rejected]:
    rejected: list[Rejected] = []

    def kept() -> Iterator[tuple[Any, ...]]:
        for row in rows:
            if isinstance(row, Rejected):
                rejected.append(row)
            else:
                yield row

    table.executemany("INSERT INTO row VALUES(?, ?, ?, ?, ?, ?, ?, ?)", kept())
    yield from rejected


def _make_unique(table: sqlite3.Connection) -> int:
    """Add their row number to names that are taken, and return how many."""
    taken = table.execute(
        "SELECT id, name, number FROM (SELECT rowid AS id, name, number, ROW_NUMBER() OVER "
        "(PARTITION BY split, class, name ORDER BY number) AS copy FROM row) WHERE copy > 1"
    ).fetchall()
    for rowid, name, number in taken:
        stem, dot, suffix = name.rpartition(".")
        renamed = f"{stem}-row{number}.{suffix}" if dot and stem else f"{name}-row{number}"
        table.execute("UPDATE row SET name = ? WHERE rowid = ?", (renamed, rowid))
    return len(taken)


# --- files -----------------------------------------------------------------------------------------------------------


def shards_of(files: Sequence[tuple[str, Place]], given: str, split: str, *, one: bool = False) -> list[Shard]:
    """Return the files of a folder with their splits, by name.

    Args:
        files: Path within the folder, and place.
        given: The folder, for messages.
        split: The split requested, or empty.
        one: A single file was given, which may be one of a series.

    Raises:
        SourceError: A file of a numbered series is missing, two series could be meant, or the split is not there.
    """
    series = defaultdict[tuple[str, str], list[tuple[int, int, str]]](list)
    folders = defaultdict[str, set[str]](set)
    shards: list[Shard] = []
    for name, place in sorted(files, key=lambda file: file[0]):
        folder, _, base = name.rpartition("/")
        its = _split_of(name)
        if split in ("", its or split):
            shards.append(Shard(its or split or "train", place))
            folders[shards[-1].split].add(folder)
            if (match := _NUMBERED.fullmatch(base)) and not one:
                series[folder, match[1]].append((int(match[2]), int(match[3]), base))
    if not shards:
        have = sorted({_split_of(name) for name, _ in files})
        raise SourceError(f"{given} has no {split} split", expected=f"files {split}-*.parquet", got=" and ".join(have))
    for its, places in folders.items():
        if len(places) > 1:
            raise SourceError(
                f"{given} has {its} in several folders",
                expected="one configuration of the data set",
                got=", ".join(sorted(places)[:5]),
                remedy="give one of these folders",
            )
    for (_, prefix), numbers in series.items():
        totals = {total for _, total, _ in numbers}
        missing = sorted(set(range(max(totals))) - {number for number, _, _ in numbers})
        if missing or len(totals) > 1 or len(numbers) != max(totals):
            raise SourceError(
                f"{given}: the files of {prefix or 'the series'} are not one whole series",
                expected=f"{max(totals)} files, {numbers[0][2]} and so on",
                got=f"{len(numbers)}" + (f", without number {missing[0]:05d}" if missing else ", of two series"),
                remedy="download the missing ones, or delete those of another version",
            )
    return shards


def _split_of(name: str) -> str:
    """Return the split that a file, or a folder around it, is named after, or an empty string."""
    for part in reversed(name.lower().removesuffix(".parquet").split("/")):
        if named := [SPLIT_FOLDERS[word] for word in re.split(r"[^a-z]+", part) if word in SPLIT_FOLDERS]:
            return named[0]
    return ""


def find_files(folder: Path) -> list[tuple[str, Path]]:
    """Return the Parquet files of a folder, within it and up to two folders deep; none if it holds archives.

    Raises:
        SourceError: It holds images as well, or Parquet files further down.
    """
    files, images = list[tuple[str, Path]](), list[str]()
    waiting = deque([(folder, "", 0)])
    while waiting:
        here, within, depth = waiting.popleft()
        below: list[tuple[Path, str, int]] = []
        for item in listing(here):
            if item.name.startswith((".", "_")):
                continue
            if item.name.lower().endswith(".parquet") and not is_folder(item):
                files.append((within + item.name, Path(item.path)))
            elif item.name.endswith(".tar") and not within:
                return []  # an img2dataset folder
            elif is_image_name(item.name):
                images.append(within + item.name)
            elif is_folder(item):
                below.append((Path(item.path), f"{within}{item.name}/", depth + 1))
        if depth < 2 and len(below) <= _MANY_FOLDERS:
            waiting += below
    if files and not images and has_image(folder):
        images.append("an image further down")
    if files and images and any(holds_images(path) for _, path in files[:1]):
        raise SourceError(
            f"{folder} holds Parquet files and images",
            expected="one of them",
            got=f"{files[0][0]} and {images[0]}",
            remedy="give the folder of the Parquet files, or move them away",
        )
    if files and not images and (lost := _further_down(folder, {path for _, path in files})):
        raise SourceError(
            f"{folder} holds Parquet files, and others further down",
            expected="all of them at most two folders down",
            got=lost,
            remedy="give the folder of one configuration of the data set, or move the others away",
        )
    return [] if images else files


def _further_down(folder: Path, known: set[Path]) -> str:
    """Return a Parquet file below a folder that is not known, or an empty string."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in names:
            if name.lower().endswith(".parquet") and not name.startswith((".", "_")) and Path(here, name) not in known:
                return printable(str(Path(here, name).relative_to(folder)))
    return ""
