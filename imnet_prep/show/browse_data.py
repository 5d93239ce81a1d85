"""Read what the browser's pages show: classes, images, the stored fields of a record, and its augmented views."""

import base64
import binascii
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from imnet_prep.errors import PipelineError, RecordsError
from imnet_prep.images.formats import sniff
from imnet_prep.loader.options import Options
from imnet_prep.loader.render import choose_decoder, render
from imnet_prep.records.folder import RecordsFolder, Row
from imnet_prep.records.line_index import RejectedIndex
from imnet_prep.records.record_list import RecordLine
from imnet_prep.show.browse_lists import Columns, Positions, Query
from imnet_prep.show.pictures import thumbnail
from imnet_prep.types import ImageFault, Rejected

THUMB_SIDE, VIEW_SIDE = 192, 160


class Library:
    """A records folder opened for reading; safe to share between threads.

    Positions number the records through all splits, as stored; the URLs count within a split.

    Attributes:
        folder: The records. manifest: Its manifest.
        splits: The splits that have images, and the positions of their records.
        columns: What lists need of every record.
    """

    def __init__(self, records: Path) -> None:
        """Open a folder and read its record lists; about 250 bytes per record are held in memory.

        Raises:
            RecordsError: It is missing, or a shard, index or record list is missing or damaged.
            IntegrityError: The manifest is damaged.
        """
        self.folder = RecordsFolder.open(records)
        self.manifest = self.folder.manifest
        self._decoder = choose_decoder("auto")
        self.splits = {name: self.folder.span(name) for name, split in self.manifest.splits.items() if split.images}
        if not self.splits:
            raise RecordsError(f"{records}: holds no images")
        tables = [self.folder.table(name) for name in self.splits]
        self.lists = {name: self.folder.index(name) for name in self.splits}
        self.columns = Columns(tables, list(self.lists.values()))

    def find(self, query: Query) -> Positions:
        """Return the positions of the records that a query asks for, in its order."""
        return self.columns.find(query, list(self.splits).index(query.split) if query.split else None)

    def place(self, position: int) -> tuple[str, int]:
        """Return the split of a record, and its number there."""
        split, number = self.columns.place(position)
        return list(self.splits)[split], number

    def find_classes(self, search: str) -> list[int]:
        """Return the labels of the classes that match every word; without words, of those that have images."""
        manifest, searched = self.manifest, search.lower().split()
        return [
            label
            for label, (name, words) in enumerate(zip(manifest.classes, manifest.class_words, strict=True))
            if all(word in f"{label} {name} {words}".lower() for word in searched)
            and (searched or any(split.class_counts[label] for split in manifest.splits.values()))
        ]

    @lru_cache(1)  # noqa: B019 - one library lives as long as its server
    def rejected(self) -> RejectedIndex:
        """Return the index of the rejected images.

        Raises:
            IntegrityError: The list cannot be read, or is not the manifest's.
            RecordsError: A line is damaged.
        """
        return self.folder.index_rejected()

    def row(self, position: int) -> Row:
        """Return a record."""
        return self.folder.row(position)

    def image(self, position: int) -> tuple[bytes, str]:
        """Read an image as stored, and its media type.

        Raises:
            RecordsError: It cannot be read.
        """
        data = self.row(position).image
        try:
            return data, f"image/{sniff(data).lower()}"
        except ImageFault:
            return data, "application/octet-stream"

    def thumb(self, position: int) -> bytes:
        """Make a small JPEG of an image.

        Raises:
            RecordsError: It cannot be read.
            PipelineError: It does not decode.
        """
        row = self.row(position)
        jpeg = thumbnail(row.image, THUMB_SIDE)
        if not jpeg:
            raise PipelineError(f"{row.file}: row {row.row} ({row.name}): does not decode")
        return jpeg

    def fields(self, position: int) -> dict[str, Any]:
        """Read the stored fields of a record; of columns of bytes other than the image, return the sizes.

        Raises:
            RecordsError: They cannot be read.
        """
        row = self.row(position)
        shard = row.opened
        others = {name: data for name, data in shard.blobs(row.row).items() if name != shard.header.image_field}
        return dict(sorted((row.fields | {f"{name} (bytes)": len(data) for name, data in others.items()}).items()))

    def line(self, position: int) -> RecordLine:
        """Read the record list's line of a record.

        Raises:
            RecordsError: The list cannot be read.
        """
        return self.folder.line(position, self.lists[self.place(position)[0]])

    def view(self, position: int, options: Options, seed: int, epoch: int) -> bytes:
        """Return the pixels that the loader makes of a record in an epoch, as a PNG.

        Args:
            position: The record.
            options: Of training or evaluation; images are not mixed.
            seed: Of the run.
            epoch: From 0.

        Raises:
            RecordsError: It cannot be read.
            PipelineError: It does not decode.
        """
        row, columns = self.row(position), self.columns
        sizes = np.array([[columns.width[position], columns.height[position]]])
        pixels = np.empty((1, options.image_size, options.image_size, 3), dtype=np.uint8)
        ids = columns.ids[position : position + 1]
        faults = render([row.image], sizes, ids, options, seed, epoch, pixels, self._decoder)
        if faults:
            raise PipelineError(f"{row.file}: row {row.row} ({row.name}): does not decode", got=faults[0])
        return bytes(cv2.imencode(".png", pixels[0, :, :, ::-1])[1])


def kept_picture(item: Rejected) -> bytes:
    """Return the picture that was kept of a rejected image, a JPEG; empty without one."""
    try:
        return base64.b64decode(item.thumbnail, validate=True)
    except binascii.Error:
        return b""
