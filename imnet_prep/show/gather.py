"""Collect the numbers of a report from a records folder: sizes, colours, duplicates, and which records to show."""

from array import array
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from imnet_prep.check.duplicates import Pair, exact_pairs, picture_pairs
from imnet_prep.images.decode import decode_quietly
from imnet_prep.images.perceptual_hash import signature
from imnet_prep.records.folder import RecordsFolder, Row, map_rows
from imnet_prep.records.record_list import RecordLine
from imnet_prep.types import ProgressCallback

MAX_COLOURS = 10_000  # images whose colours are measured; more would change the third digit at most
MAX_PRINTS = 50_000  # records among which near-duplicates are searched; `verify` does it for any number
PER_CLASS, PER_CHANGE = 6, 6  # records that are shown
CHANGES = {  # what was changed or noticed, in words
    "format": "Not a JPEG",
    "cmyk": "CMYK",
    "sixteen_bit": "More than 8 bits per channel",
    "alpha": "Transparent",
    "oriented": "With an EXIF orientation",
    "progressive": "Progressive JPEG",
    "greyscale": "Greyscale",
    "exif_damaged": "Damaged EXIF",
    "trailing_bytes": "Bytes after the end marker",
    "resized": "Larger than asked for",
}
CONVERTED = {  # the changes that alter an image, and what was done
    "format": "converted to JPEG",
    "cmyk": "converted to RGB",
    "sixteen_bit": "converted to 8 bits",
    "alpha": "composed over white",
    "oriented": "turned upright",
    "resized": "shrunk",
}


class Shown(NamedTuple):
    """A record to show: its position among all records, its split, and its line of the record list."""

    position: int
    split: str
    line: RecordLine


class Look(NamedTuple):
    """What one record looks like.

    Attributes:
        size_bytes: Its stored bytes.
        undecodable: Whether it does not decode.
        colours: Mean and standard deviation of its channels, float64 (2, 3), RGB, 0 to 1; None if not measured.
        bits: Its :func:`~imnet_prep.images.perceptual_hash.signature`, uint64 (2,); None if not computed.
    """

    size_bytes: int
    undecodable: bool = False
    colours: NDArray[np.float64] | None = None
    bits: NDArray[np.uint64] | None = None


@dataclass(slots=True)
class Gathered:
    """The numbers of a records folder.

    Attributes:
        folder: The records.
        widths: int64 (records,), pixels.
        heights: int64 (records,), pixels.
        sizes: int64 (records,), stored bytes.
        samples: Records to show, by label.
        converted: Records to show, by change.
        hosts: Number of records by the host that they were downloaded from.
        colours: float64 (images, 2, 3), as in :class:`Look`, of the measured images.
        undecodable: Number of images that do not decode.
        exact: Positions of records with equal bytes.
        near: Records that show the same picture; None if there are too many records to search.
    """

    folder: RecordsFolder
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    sizes: NDArray[np.int64]
    samples: dict[int, list[Shown]]
    converted: dict[str, list[Shown]]
    hosts: Counter[str]
    colours: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2, 3)))
    undecodable: int = 0
    exact: list[tuple[int, int]] = field(default_factory=list)
    near: list[Pair] | None = None

    def channels(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the mean of each channel, its deviation over all pixels, and the mean of the images' deviations.

        Every image has the same weight, whatever its size. The published deviations of ImageNet are of the last kind.
        """
        images = max(1, len(self.colours))
        mean, own = self.colours.sum(axis=0) / images
        square = (self.colours**2).sum(axis=(0, 1)) / images
        return mean, np.sqrt(np.maximum(0, square - mean * mean)), own


def gather(records: Path, workers: int | None, progress: ProgressCallback) -> Gathered:
    """Read a records folder for its report.

    Raises:
        RecordsError: There is no such folder, or a shard or record list is missing or damaged.
        IntegrityError: The manifest is damaged.
    """
    folder = RecordsFolder.open(records)
    gathered, digests = _read_lists(folder)
    total, colours = folder.records, []
    prints = np.zeros((total, 4), np.uint64)
    prints[:, 1] = digests
    look = partial(look_at, every=-(-total // MAX_COLOURS), prints=total <= MAX_PRINTS)
    for position, seen in enumerate(map_rows(folder, look, workers, progress)):
        gathered.sizes[position] = seen.size_bytes
        gathered.undecodable += seen.undecodable
        if seen.colours is not None:
            colours.append(seen.colours)
        if seen.bits is not None:
            prints[position, 2:] = seen.bits
    gathered.colours = np.array(colours).reshape(-1, 2, 3)
    gathered.exact = list(exact_pairs(prints[:, 1]))
    gathered.near = picture_pairs(folder, prints) if total <= MAX_PRINTS else None
    return gathered


def _read_lists(folder: RecordsFolder) -> tuple[Gathered, NDArray[np.uint64]]:
    """Read the record lists, and return what they tell and the first 8 bytes of each record's digest."""
    widths, heights, digests = array("q"), array("q"), array("Q")  # they grow with the lines that are really there
    samples: defaultdict[int, list[Shown]] = defaultdict(list)
    converted: defaultdict[str, list[Shown]] = defaultdict(list)
    hosts: Counter[str] = Counter()
    for split in folder.manifest.splits:
        folder.check_list(split)
        for line in folder.lines(split):
            shown = Shown(len(widths), split, line)
            widths.append(line.width)
            heights.append(line.height)
            digests.append(int(line.sha256[:16], 16))
            if line.label >= 0 and len(samples[line.label]) < PER_CLASS:
                samples[line.label].append(shown)
            for change in line.changes:
                if change in CONVERTED and len(converted[change]) < PER_CHANGE:
                    converted[change].append(shown)
            if line.url:
                hosts[_host(line.url)] += 1
    sizes = np.zeros(len(widths), np.int64)
    found = Gathered(folder, np.array(widths), np.array(heights), sizes, samples, converted, hosts)
    return found, np.array(digests)


def _host(url: str) -> str:
    with suppress(ValueError):
        return urlsplit(url).hostname or "?"
    return "?"


def look_at(row: Row, every: int, prints: bool) -> Look:
    """Measure the colours of every ``every``-th record, and with ``prints`` compute the signature of each.

    Raises:
        RecordsError: The record cannot be read.
    """
    coloured, size = row.position % every == 0, row.size_bytes
    if size and not coloured and not prints:  # a record of size 0 may be unreadable: it is read to find out
        return Look(size)
    pixels = decode_quietly(row.image)
    if pixels is None:
        return Look(size, undecodable=True)
    colours = np.array([part.ravel()[::-1] / 255 for part in cv2.meanStdDev(pixels)]) if coloured else None
    if not prints:
        return Look(size, colours=colours)
    grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY), dtype=np.uint8)
    return Look(size, False, colours, signature(grey, grey.shape[1], grey.shape[0]))
