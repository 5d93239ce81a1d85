"""What the report says, read from the records: counts, sizes, colours, duplicates, and which pictures to show."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from imnet_prep.duplicates import Pair, signature
from imnet_prep.errors import RecordsError
from imnet_prep.imaging import captured_stderr
from imnet_prep.records.manifest import Manifest, load_manifest, read_records
from imnet_prep.records.mindrecord import LENGTH, Shard, read_header, read_index
from imnet_prep.types import Progress, ProgressCallback
from imnet_prep.verify_duplicates import Located, exact_pairs, picture_pairs
from imnet_prep.verify_rows import IMAGE_FIELDS
from imnet_prep.workers import Advance, process_count, run_processes

MAX_COLOURS = 10_000  # images whose colours are measured; more change the third digit at most
MAX_PRINTS = 50_000  # records among which the same picture is looked for; `verify` does it for any number
PER_CLASS, PER_CHANGE, MAX_PAIRS = 6, 6, 24
CHUNK_ROWS = 256
CONVERTED = ("format", "cmyk", "sixteen_bit", "alpha", "oriented", "resized")  # of Change; the others are only noticed


@dataclass(frozen=True, slots=True)
class Shown:
    """A record that is shown: its place among all records, and what its line says."""

    position: int
    split: str
    name: str
    label: int
    width: int
    height: int
    changes: tuple[str, ...]


@dataclass(slots=True)
class Colours:
    """Sums over images of their channels' mean, mean square and deviation, float64 (3,), RGB, 0 to 1."""

    images: int = 0
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    square: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    deviation: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    undecodable: int = 0

    def add(self, other: Colours) -> None:
        """Add the images of another."""
        self.images, self.undecodable = self.images + other.images, self.undecodable + other.undecodable
        self.mean, self.square = self.mean + other.mean, self.square + other.square
        self.deviation = self.deviation + other.deviation

    def summary(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Give by channel the mean, the deviation of all pixels, and the mean of the images' own deviations.

        Each image counts alike, whatever its size. ImageNet's published deviations are of the last kind.
        """
        images = max(1, self.images)
        mean = self.mean / images
        return mean, np.sqrt(np.maximum(0, self.square / images - mean * mean)), self.deviation / images


@dataclass(slots=True)
class Gathered:
    """All that the report needs.

    Attributes:
        manifest: The folder's.
        widths: int32 (records,), pixels. heights: Likewise. sizes: int64 (records,), stored bytes.
        splits: Slice of each split in these.
        samples: Records to show by label.
        converted: Records to show by change.
        hosts: Records by the host that they were downloaded from.
        colours: Of the images looked at.
        exact: Positions of records with equal bytes. near: Of the same picture; None where there are too many records.
    """

    manifest: Manifest
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    sizes: NDArray[np.int64]
    splits: dict[str, slice] = field(default_factory=dict)
    samples: dict[int, list[Shown]] = field(default_factory=dict)
    converted: dict[str, list[Shown]] = field(default_factory=dict)
    hosts: Counter[str] = field(default_factory=Counter)
    colours: Colours = field(default_factory=Colours)
    exact: list[tuple[int, int]] = field(default_factory=list)
    near: list[Pair] | None = None


def gather(records: Path, workers: int | None, progress: ProgressCallback) -> Gathered:
    """Read a records folder for its report.

    Raises:
        RecordsError: There is no such folder, or a shard, index or record list is missing or damaged.
        IntegrityError: The manifest is damaged.
    """
    manifest = load_manifest(records)
    total = sum(split.images for split in manifest.splits.values())
    gathered = Gathered(manifest, np.zeros(total, np.int32), np.zeros(total, np.int32), np.zeros(total, np.int64))
    prints = np.zeros((total, 4), np.uint64)
    _read_lists(records, gathered, prints)
    _look(records, gathered, prints, workers, progress)
    gathered.exact = list(exact_pairs(prints[:, 1]))
    if total <= MAX_PRINTS:
        located = Located(records, manifest)
        gathered.near = picture_pairs(located, prints)
        located.close()
    return gathered


def _read_lists(records: Path, gathered: Gathered, prints: NDArray[np.uint64]) -> None:
    position = 0
    for name, split in gathered.manifest.splits.items():
        first = position
        for line in read_records(records, split):
            if position >= len(prints):
                raise RecordsError(f"{records}: the record lists are longer than the manifest says")
            gathered.widths[position], gathered.heights[position] = line.width, line.height
            prints[position, 1] = int(line.sha256[:16], 16)
            shown = Shown(position, name, line.file_name, line.label, line.width, line.height, line.changes)
            if line.label >= 0 and len(of_class := gathered.samples.setdefault(line.label, [])) < PER_CLASS:
                of_class.append(shown)
            for change in line.changes:
                if change in CONVERTED and len(of_change := gathered.converted.setdefault(change, [])) < PER_CHANGE:
                    of_change.append(shown)
            if line.url:
                gathered.hosts[urlsplit(line.url).hostname or "?"] += 1
            position += 1
        gathered.splits[name] = slice(first, position)
        if position - first != split.images:
            raise RecordsError(f"{records / split.records['file']}: lists {position - first} of {split.images} records")


# --- the images ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _LookTask:
    path: Path
    position: int
    first: int
    count: int
    every: int  # colours of every n-th row
    prints: bool


@dataclass(frozen=True, slots=True)
class _Look:
    position: int
    colours: Colours
    sizes: NDArray[np.int64]
    bits: NDArray[np.uint64]


def _look(
    records: Path, gathered: Gathered, prints: NDArray[np.uint64], workers: int | None, progress: ProgressCallback
) -> None:
    total = len(prints)
    tasks = []
    position = 0
    for split in gathered.manifest.splits.values():
        for shard in split.shards:
            for first in range(0, shard.rows, CHUNK_ROWS):
                count = min(CHUNK_ROWS, shard.rows - first)
                every = -(-total // MAX_COLOURS)
                tasks.append(_LookTask(records / shard.file, position, first, count, every, total <= MAX_PRINTS))
                position += count

    def report(images: int, size: int, bad: int) -> None:
        progress(Progress(min(images, total), total, "images", size, (("undecodable", bad),)))

    width = min(process_count(workers), len(tasks))
    for look in run_processes(look_at, tasks, width, report):
        gathered.colours.add(look.colours)
        end = look.position + len(look.sizes)
        gathered.sizes[look.position : end] = look.sizes
        prints[look.position : end, 2:] = look.bits


@lru_cache(maxsize=1)
def _open(path: Path) -> Shard:
    return Shard(path, index=read_index(path, read_header(path)))


def look_at(task: _LookTask, advance: Advance) -> _Look:
    """Measure the colours of some rows, and make what their pictures are compared by; for a worker process.

    Raises:
        RecordsError: The shard cannot be read.
    """
    shard = _open(task.path)
    rows = range(task.first, min(task.first + task.count, len(shard)))
    sizes = np.zeros(task.count, np.int64)
    bits = np.zeros((task.count, 2), np.uint64)
    colours = Colours()
    for place, row in enumerate(rows):
        sizes[place] = int(shard.index.blob_end[row] - shard.index.blob_start[row]) - LENGTH.size
        coloured = (task.position + place) % task.every == 0
        if coloured or task.prints:
            blobs = shard.blobs(row)
            image = blobs[next((name for name in IMAGE_FIELDS if name in blobs), next(iter(blobs)))]
            pixels = decode(image)
            if pixels is None:
                colours.undecodable += 1
            else:
                if coloured:
                    _add_colours(colours, pixels)
                if task.prints:
                    grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY), dtype=np.uint8)
                    bits[place] = signature(grey, grey.shape[1], grey.shape[0])
        advance(1, int(sizes[place]), 0)
    return _Look(task.position, colours, sizes, bits)


def decode(data: bytes, reduce: int = 1) -> NDArray[np.uint8] | None:
    """Decode an image to BGR, uint8 (H, W, 3), upright as stored; None where it does not decode."""
    flag = cv2.IMREAD_COLOR if reduce == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduce}")
    with captured_stderr():
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:
            pixels = None
    return None if pixels is None else np.asarray(pixels, dtype=np.uint8)


def _add_colours(colours: Colours, pixels: NDArray[np.uint8]) -> None:
    mean, deviation = cv2.meanStdDev(pixels)
    mean, deviation = mean.ravel()[::-1] / 255, deviation.ravel()[::-1] / 255
    colours.images += 1
    colours.mean += mean
    colours.square += deviation**2 + mean**2
    colours.deviation += deviation
