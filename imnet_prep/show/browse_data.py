"""Read what the browser's pages show: classes, images, the stored fields of a record, and its augmented views."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import PipelineError
from imnet_prep.images.formats import sniff
from imnet_prep.loader.options import Options
from imnet_prep.loader.render import choose_decoder, render
from imnet_prep.records.folder import RecordsFolder, Row
from imnet_prep.show.pictures import thumbnail
from imnet_prep.types import ImageFault

THUMB_SIDE, VIEW_SIDE = 192, 160


class Library:
    """A records folder opened for reading; safe to share between threads. Positions are within a split, as stored."""

    def __init__(self, records: Path) -> None:
        """Open a folder; about 100 bytes per record are held in memory.

        Raises:
            RecordsError: It is missing, or a shard, index or record list is missing or damaged.
            IntegrityError: The manifest is damaged.
        """
        self.folder = RecordsFolder.open(records)
        self.manifest = self.folder.manifest
        self._decoder = choose_decoder("auto")
        self.tables = {name: self.folder.table(name) for name, split in self.manifest.splits.items() if split.images}
        # Rows of each label, one after the other, in stored order.
        self._order = {name: np.argsort(table.label, kind="stable") for name, table in self.tables.items()}
        self._sorted = {name: table.label[self._order[name]] for name, table in self.tables.items()}

    def of_class(self, split: str, label: int) -> NDArray[np.int64]:
        """Return the positions of a class's records in a split."""
        low, high = np.searchsorted(self._sorted[split], [label, label + 1])
        return self._order[split][low:high]

    def find_classes(self, search: str) -> list[int]:
        """Return the labels of the classes that match every word; without words, of those that have images."""
        manifest, searched = self.manifest, search.lower().split()
        return [
            label
            for label, (name, words) in enumerate(zip(manifest.classes, manifest.class_words, strict=True))
            if all(word in f"{label} {name} {words}".lower() for word in searched)
            and (searched or any(split.class_counts[label] for split in manifest.splits.values()))
        ]

    def row(self, split: str, position: int) -> Row:
        """Return a record."""
        return self.folder.row(self.folder.span(split).start + position)

    def image(self, split: str, position: int) -> tuple[bytes, str]:
        """Read an image as stored, and its media type.

        Raises:
            RecordsError: It cannot be read.
        """
        data = self.row(split, position).image
        try:
            return data, f"image/{sniff(data).lower()}"
        except ImageFault:
            return data, "application/octet-stream"

    def thumb(self, split: str, position: int) -> bytes:
        """Make a small JPEG of an image.

        Raises:
            RecordsError: It cannot be read.
            PipelineError: It does not decode.
        """
        row = self.row(split, position)
        jpeg = thumbnail(row.image, THUMB_SIDE)
        if not jpeg:
            raise PipelineError(f"{row.file}: row {row.row} ({row.name}): does not decode")
        return jpeg

    def fields(self, split: str, position: int) -> dict[str, Any]:
        """Read the stored fields of a record; of columns of bytes other than the image, return the sizes.

        Raises:
            RecordsError: They cannot be read.
        """
        row = self.row(split, position)
        shard = row.opened
        others = {name: data for name, data in shard.blobs(row.row).items() if name != shard.header.image_field}
        return dict(sorted((row.fields | {f"{name} (bytes)": len(data) for name, data in others.items()}).items()))

    def line(self, split: str, position: int) -> dict[str, Any]:
        """Read the record list's line of a record.

        Raises:
            RecordsError: The list cannot be read.
        """
        return dict(json.loads(self.folder.line(self.row(split, position).position).to_json()))

    def view(self, split: str, position: int, options: Options, seed: int, epoch: int) -> bytes:
        """Return the pixels that the loader makes of a record in an epoch, as a PNG.

        Args:
            split: The split.
            position: The record's place in it.
            options: Of training or evaluation; images are not mixed.
            seed: Of the run.
            epoch: From 0.

        Raises:
            RecordsError: It cannot be read.
            PipelineError: It does not decode.
        """
        row, table = self.row(split, position), self.tables[split]
        sizes = np.array([[table.width[position], table.height[position]]])
        pixels = np.empty((1, options.image_size, options.image_size, 3), dtype=np.uint8)
        ids = table.ids[position : position + 1]
        faults = render([row.image], sizes, ids, options, seed, epoch, pixels, self._decoder)
        if faults:
            raise PipelineError(f"{row.file}: row {row.row} ({row.name}): does not decode", got=faults[0])
        return bytes(cv2.imencode(".png", pixels[0, :, :, ::-1])[1])
