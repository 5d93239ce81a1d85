"""Report on a records folder, in one HTML file that needs nothing else."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imnet_prep.records.manifest import Manifest
from imnet_prep.show.charts import BarChart, class_balance, histogram
from imnet_prep.show.gather import CHANGES, CONVERTED, MAX_COLOURS, MAX_PRINTS, Gathered, Shown, gather
from imnet_prep.show.info import describe_split
from imnet_prep.show.pages import check_target, render, write_page
from imnet_prep.show.pictures import Picture, picture_of
from imnet_prep.types import ProgressCallback, Rejected

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in torchvision's reference scripts
PICTURE_BYTES = 3_300_000  # of all pictures in base64, so that the file stays under 5 MB
MAX_REJECTED, MAX_PAIRS = 100, 24


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """How a report is made.

    Attributes:
        images: Include pictures.
        workers: Number of processes; None for one per core.
        force: Replace a file that is not a report.
    """

    images: bool = True
    workers: int | None = None
    force: bool = False


class _Pictures:
    """Make the pictures of a report until their size is used up."""

    def __init__(self, gathered: Gathered, *, images: bool) -> None:
        self._folder, self._images = gathered.folder, images
        self._left = PICTURE_BYTES if images else 0
        classes = max(1, len(gathered.samples))
        # A picture of 96 pixels takes about 2 kB in base64. With many classes each gets one or two smaller ones.
        self.per_class = max(1, min(6, PICTURE_BYTES // (classes * 4000)))
        self._side = 96 if classes * self.per_class <= 1200 else 72
        self.left_out = False

    def at(self, position: int, alt: str, caption: str = "") -> Picture:
        """Return the record at a position as a picture, or without one if the size is used up."""
        if self._left <= 0:
            self.left_out = self._images
            return Picture(alt, caption)
        made = picture_of(self._folder.row(position), alt, caption, self._side)
        self._left -= len(made.jpeg) + 200
        return made

    def of(self, shown: Shown, caption: str = "") -> Picture:
        """Return a listed record as a picture."""
        line = shown.line
        return self.at(shown.position, f"{shown.split}/{line.file_name}, {line.width} by {line.height} pixels", caption)

    def of_rejected(self, item: Rejected, duplicate_of: Shown | None) -> Picture | None:
        """Return the picture that was kept of a rejected image, or the stored copy of a duplicate."""
        if not item.thumbnail or self._left <= 0:
            return self.of(duplicate_of) if duplicate_of else None
        self._left -= len(item.thumbnail)
        return Picture(f"{item.split}/{item.file_name}", jpeg=item.thumbnail)


def write_report(records: Path, out: Path, options: ReportOptions, progress: ProgressCallback) -> dict[str, Any]:
    """Write the report of a records folder.

    Args:
        records: The folder.
        out: The HTML file.
        options: How it is made.
        progress: Called with the number of images read.

    Returns:
        What the command prints: ``report`` (the file), ``bytes``, ``images`` and ``duplicates``.

    Raises:
        RecordsError: The folder cannot be read, or the file must not or cannot be written.
        IntegrityError: The manifest, a record list, or the list of rejected images is damaged.
    """
    check_target(out, force=options.force)
    gathered = gather(records, options.workers, progress)
    manifest = gathered.folder.manifest
    names = [
        f"{name} {words.partition(',')[0]}".rstrip()
        for name, words in zip(manifest.classes, manifest.class_words, strict=True)
    ]
    html = render(
        "report.html",
        name=records.resolve().name,
        folder=gathered.folder,
        manifest=manifest,
        gathered=gathered,
        splits={name: describe_split(split) for name, split in manifest.splits.items()},
        balance=[class_balance(name, split.class_counts, names) for name, split in manifest.splits.items()],
        sizes=_size_charts(gathered),
        colours=_colour_rows(gathered),
        max_colours=MAX_COLOURS,
        max_prints=MAX_PRINTS,
        **_changes(manifest),
        **_shown(gathered, _Pictures(gathered, images=options.images)),
    )
    near = None if gathered.near is None else len(gathered.near)
    return {
        "report": str(out),
        "bytes": write_page(out, html),
        "images": gathered.folder.records,
        "duplicates": {"exact": len(gathered.exact), "near": near},
    }


def _size_charts(gathered: Gathered) -> list[BarChart]:
    sides = np.stack([gathered.widths, gathered.heights])
    widths, heights = sides[:, (sides > 0).all(axis=0)]
    return [
        histogram("Width", widths, "pixels"),
        histogram("Height", heights, "pixels"),
        histogram("Short side", np.minimum(widths, heights), "pixels"),
        histogram("Aspect ratio", widths / heights, "width / height", log=True),
        histogram("Stored size of an image", gathered.sizes / 1000, "kB", log=True),
    ]


def _colour_rows(gathered: Gathered) -> list[tuple[object, ...]]:
    """Return by channel its name, and the means and deviations here and of ImageNet."""
    mean, deviation, own = (values.round(4).tolist() for values in gathered.channels())
    return list(zip(("red", "green", "blue"), mean, IMAGENET_MEAN, own, IMAGENET_STD, deviation, strict=True))


def _changes(manifest: Manifest) -> dict[str, Any]:
    """Count stored images by what was done to them, and rejected ones by reason and split."""
    splits = manifest.splits.values()
    counts = sum((Counter(split.changes) for split in splits), Counter[str]())
    reasons = sorted({reason for split in splits for reason in split.rejected})
    return {
        "changes": [
            (text, counts[change], CONVERTED.get(change, "unchanged"))
            for change, text in CHANGES.items()
            if counts[change]
        ],
        "reasons": [(reason, *(split.rejected.get(reason, 0) for split in splits)) for reason in reasons],
    }


def _shown(gathered: Gathered, pictures: _Pictures) -> dict[str, Any]:
    """Make the pictures of each section, in the order of the page."""
    manifest = gathered.folder.manifest
    converted = {
        f"{CHANGES[change]}, {CONVERTED[change]}": [pictures.of(item, item.line.file_name) for item in shown]
        for change, shown in gathered.converted.items()
    }
    stored = {f"{item.split}/{item.line.file_name}": item for shown in gathered.samples.values() for item in shown}
    rejected = list(gathered.folder.rejected())
    return {
        "converted": converted,
        "rejected": [
            (item, pictures.of_rejected(item, stored.get(item.detail.partition(" as ")[2])))
            for item in rejected[:MAX_REJECTED]
        ],
        "rejected_images": len(rejected),
        "pairs": list(_pairs(gathered, pictures)),
        "classes": [
            (name, words, [pictures.of(item) for item in gathered.samples.get(label, [])[: pictures.per_class]])
            for label, (name, words) in enumerate(zip(manifest.classes, manifest.class_words, strict=True))
        ],
        "pictures_left_out": pictures.left_out,
    }


def _pairs(gathered: Gathered, pictures: _Pictures) -> Iterator[tuple[str, list[Picture]]]:
    """Yield what two records have in common, and both as pictures."""
    pairs = [(first, second, "same bytes") for first, second in gathered.exact[: MAX_PAIRS // 2]]
    pairs += [
        (pair.first, pair.second, "same picture, mirrored" if pair.mirrored else "same picture")
        for pair in (gathered.near or [])[:MAX_PAIRS]
    ]
    for first, second, why in pairs:
        rows = [gathered.folder.row(position) for position in (first, second)]
        names = [f"{row.split}/{row.name}" for row in rows]
        yield why, [pictures.at(row.position, name, name) for row, name in zip(rows, names, strict=True)]
