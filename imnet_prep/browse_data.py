"""What the browser page shows, read from the records: classes, images, a record's line, and its augmented views."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from imnet_prep.augment import (
    ERASE_FILL,
    EvalOptions,
    TrainOptions,
    crop_draws,
    erase_boxes,
    eval_geometry,
    train_geometry,
)
from imnet_prep.colour import augment_colours
from imnet_prep.decode import PortableDecoder
from imnet_prep.errors import PipelineError, RecordsError
from imnet_prep.records.manifest import load_manifest
from imnet_prep.records.mindrecord import Shard
from imnet_prep.records.table import RowReader, RowTable, load_rows
from imnet_prep.report.gather import decode
from imnet_prep.report.html import thumbnail
from imnet_prep.verify_rows import IMAGE_FIELDS

THUMB_SIDE, VIEW_SIDE = 192, 160
_TYPES = ((b"\xff\xd8", "image/jpeg"), (b"\x89PNG", "image/png"), (b"GIF8", "image/gif"), (b"BM", "image/bmp"))


@dataclass(frozen=True, slots=True)
class Record:
    """A record as it is shown.

    Attributes:
        split: Its split. position: Its place in the split, as stored.
        file: The data file, relative to the folder. row: Its row there.
        label: As stored. name: As stored, or its place where it has none.
    """

    split: str
    position: int
    file: str
    row: int
    label: int
    name: str


class Library:
    """A records folder opened for reading; safe to share between threads."""

    def __init__(self, records: Path) -> None:
        """Open a folder; about 40 bytes a record are held in memory.

        Raises:
            RecordsError: It is missing, or a shard, index or record list is missing or damaged.
            IntegrityError: The manifest is damaged.
        """
        self.folder = records
        self.manifest = load_manifest(records)
        self.tables: dict[str, RowTable] = {
            name: load_rows(records, self.manifest, name)
            for name, split in self.manifest.splits.items()
            if split.images
        }
        self._readers = {name: RowReader(table) for name, table in self.tables.items()}
        # Rows of each label, one after the other, in stored order.
        self._order = {name: np.argsort(table.label, kind="stable") for name, table in self.tables.items()}
        self._sorted = {name: table.label[self._order[name]] for name, table in self.tables.items()}
        self._shard = lru_cache(maxsize=64)(Shard)

    def of_class(self, split: str, label: int) -> NDArray[np.int64]:
        """Positions of a class's records in a split, in stored order."""
        low, high = np.searchsorted(self._sorted[split], [label, label + 1])
        return self._order[split][low:high]

    def record(self, split: str, position: int) -> Record:
        """Look up a record."""
        table = self.tables[split]
        path, row = table.files[int(table.shard[position])], int(table.row[position])
        fields = self._shard(path).fields(row)
        file = path.relative_to(self.folder).as_posix()
        return Record(
            split, position, file, row, int(table.label[position]), str(fields.get("file_name", f"row {row}"))
        )

    def image(self, split: str, position: int) -> tuple[bytes, str]:
        """Read an image as stored, and its media type.

        Raises:
            PipelineError: It cannot be read.
        """
        data = self._readers[split].image(position)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return data, "image/webp"
        return data, next((kind for magic, kind in _TYPES if data.startswith(magic)), "application/octet-stream")

    def thumb(self, split: str, position: int) -> bytes:
        """Make a small JPEG of an image.

        Raises:
            PipelineError: It cannot be read or does not decode.
        """
        data, _ = self.image(split, position)
        pixels = decode(data)
        if pixels is None:
            raise PipelineError(f"{self._readers[split].where(position)}: does not decode")
        return thumbnail(pixels, THUMB_SIDE)

    def fields(self, split: str, position: int) -> dict[str, Any]:
        """Read every stored field of a record but the image."""
        table = self.tables[split]
        shard, row = self._shard(table.files[int(table.shard[position])]), int(table.row[position])
        found = shard.fields(row)
        found |= {f"{name} (bytes)": len(data) for name, data in shard.blobs(row).items() if name not in IMAGE_FIELDS}
        return dict(sorted(found.items()))

    def line(self, split: str, position: int) -> dict[str, Any]:
        """Read a record's line of the record list; it is looked for from the beginning, so in a second of a million.

        Raises:
            RecordsError: The list cannot be read.
        """
        path = self.folder / str(self.manifest.splits[split].records["file"])
        try:
            with gzip.open(path, "rb") as lines:
                for number, line in enumerate(lines):
                    if number == position:
                        values: dict[str, Any] = json.loads(line)
                        return values
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise RecordsError(f"{path}: cannot be read", got=str(error)) from error
        raise RecordsError(f"{path}: has no line {position}")

    def view(self, split: str, position: int, options: TrainOptions | EvalOptions, seed: int, epoch: int) -> bytes:
        """Make what the training or evaluation pipeline makes of a record, as a JPEG.

        Args:
            split: The split. position: The record's place in it.
            options: Of the pipeline; mixing two images is left out.
            seed: Of the run. epoch: From 0.

        Raises:
            PipelineError: It cannot be read or does not decode.
        """
        table, decoder = self.tables[split], PortableDecoder()
        ids = table.ids[position : position + 1]
        data, _ = self.image(split, position)
        sizes, faults = decoder.sizes([data])
        out = np.zeros((1, options.image_size, options.image_size, 3), np.uint8)
        if not faults:
            if isinstance(options, TrainOptions):
                geometry = train_geometry(options, sizes, crop_draws(seed, epoch, ids))
            else:
                geometry = eval_geometry(options, sizes)
            faults = decoder.decode([data], geometry, options.interpolation, out)
        if faults:
            raise PipelineError(f"{self._readers[split].where(position)}: {faults[0][1]}")
        if isinstance(options, TrainOptions):
            augment_colours(options, out, [0], seed, epoch, ids)
            left, top, right, bottom = erase_boxes(options, seed, epoch, ids)[0].tolist()
            out[0, top:bottom, left:right] = ERASE_FILL
        encoded = cv2.imencode(".jpg", out[0, :, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        return bytes(encoded)
