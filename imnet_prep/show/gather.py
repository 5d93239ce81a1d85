"""What the report says, read from the records: counts, sizes, colours, duplicates, and which pictures to show."""

from __future__ import annotations

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

from imnet_prep.check.duplicates import Pair
from imnet_prep.check.near_duplicates import exact_pairs, picture_pairs
from imnet_prep.images.imaging import captured_stderr
from imnet_prep.images.perceptual_hash import signature
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.record_list import RecordLine
from imnet_prep.records.scan import Row, map_rows
from imnet_prep.types import ProgressCallback

MAX_COLOURS = 10_000  # images whose colours are measured; more change the third digit at most
MAX_PRINTS = 50_000  # records among which the same picture is looked for; `verify` does it for any number
PER_CLASS, PER_CHANGE, MAX_PAIRS = 6, 6, 24
CONVERTED = ("format", "cmyk", "sixteen_bit", "alpha", "oriented", "resized")  # of Change; the others are only noticed


class Shown(NamedTuple):
    """A record that is shown: its position among all records, its split, and its line of the record list."""

    position: int
    split: str
    line: RecordLine


class Look(NamedTuple):
    """What was seen of one record.

    Attributes:
        size_bytes: Stored bytes. undecodable: It was decoded in vain.
        colours: Mean and deviation of its channels, float64 (2, 3), RGB, 0 to 1; None where not asked for.
        bits: uint64 (2,), its :func:`~imnet_prep.images.perceptual_hash.signature`; None where not asked for.
    """

    size_bytes: int
    undecodable: bool = False
    colours: NDArray[np.float64] | None = None
    bits: NDArray[np.uint64] | None = None


@dataclass(slots=True)
class Gathered:
    """All that the report needs.

    Attributes:
        folder: The records.
        widths: int64 (records,), pixels. heights: Likewise. sizes: int64 (records,), stored bytes.
        samples: Records to show by label. converted: Records to show by change.
        hosts: Records by the host that they were downloaded from.
        colours: float64 (images, 2, 3), see :class:`Look`. undecodable: Images that did not decode.
        exact: Positions of records with equal bytes. near: Of the same picture; None where there are too many records.
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
        """Return by channel the mean, the deviation of all pixels, and the mean of the images' own deviations.

        Each image counts alike, whatever its size. ImageNet's published deviations are of the last kind.
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
    """Read the record lists: what is to be shown, and the first 8 bytes of each record's digest."""
    widths, heights, digests = array("q"), array("q"), array("Q")  # they grow with what is there, not what is claimed
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
    """Measure the colours of every ``every``-th record and make, for ``prints``, what its picture is compared by.

    Raises:
        RecordsError: The record cannot be read.
    """
    coloured, size = row.position % every == 0, row.size_bytes
    if size and not coloured and not prints:  # of size 0 is also what cannot be read: reading it tells
        return Look(size)
    pixels = decode(row.image)
    if pixels is None:
        return Look(size, undecodable=True)
    colours = np.array([part.ravel()[::-1] / 255 for part in cv2.meanStdDev(pixels)]) if coloured else None
    if not prints:
        return Look(size, colours=colours)
    grey = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY), dtype=np.uint8)
    return Look(size, False, colours, signature(grey, grey.shape[1], grey.shape[0]))


def decode(data: bytes) -> NDArray[np.uint8] | None:
    """Decode an image to BGR, uint8 (H, W, 3), upright as stored; None where it does not decode."""
    with captured_stderr(), suppress(cv2.error):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        return None if pixels is None else np.asarray(pixels, dtype=np.uint8)
    return None
