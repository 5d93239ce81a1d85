"""The making of a batch: chunks of rows are read, checked, decoded and augmented; the last one finishes the batch."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import PipelineError
from imnet_prep.images.decode import MAX_PIXELS, SOI, Geometry, PortableDecoder
from imnet_prep.loader.augment import (
    ERASE_FILL,
    EvalOptions,
    TrainOptions,
    crop_draws,
    erase_boxes,
    eval_geometry,
    mix,
    train_geometry,
)
from imnet_prep.records.table import RowReader
from imnet_prep.types import Batch

CHUNK_ROWS = 16  # rows a task takes: about 15 ms of decoding, so that threads share the end of a batch well
ON_ERROR = ("raise", "skip")
CHECKS = ("first", "always", "never")
SKIPPED_KEPT = 100  # skipped rows that are remembered by name; all are counted
Options = TrainOptions | EvalOptions
Images = dict[int, bytes]  # by row of the batch, in order
Faults = dict[int, str]  # by row of the batch


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that was left out with ``on_error="skip"``: where it lies, with its name, and why."""

    where: str
    why: str


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of worker time since the pipeline was opened, all threads together, and the images they made."""

    read_s: float = 0.0
    check_s: float = 0.0
    decode_s: float = 0.0
    augment_s: float = 0.0
    images: int = 0

    def __add__(self, other: StageTimes) -> StageTimes:
        return StageTimes(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: StageTimes) -> StageTimes:
        return StageTimes(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))


class Pending:
    """A batch in the making; ``sizes`` are the listed widths and heights, int32 (N, 2), ``pixels`` their products."""

    def __init__(
        self, positions: NDArray[np.int64], epoch: int, image: NDArray[np.uint8], sizes: NDArray[np.int32], chunks: int
    ) -> None:
        self.positions, self.epoch, self.image, self.chunks = positions, epoch, image, chunks
        self.sizes, self.pixels = sizes, sizes.prod(axis=1, dtype=np.int64).tolist()
        self.faults: Faults = {}
        self.draws: NDArray[np.float64] | None = None
        self.lock = threading.Lock()
        self.future: Future[Batch] = Future()


class BatchMaker:
    """Makes batches in any threads; what they share is counted under a lock.

    Args:
        on_error: One of :data:`ON_ERROR`. check: One of :data:`CHECKS`.

    Attributes:
        reader: Of the split's rows. decoder: Bytes to pixels. options: What is done to an image. seed: Of every draw.
        skipped: Rows left out so far. times: Worker time by stage so far.
    """

    def __init__(
        self, reader: RowReader, decoder: PortableDecoder, options: Options, seed: int, on_error: str, check: str
    ) -> None:
        self.reader, self._table, self.decoder = reader, reader.table, decoder
        self.options, self.seed = options, seed
        self._on_error, self._check = on_error, check
        self._checked = np.full(len(reader.table), check == "never")
        self._lock = threading.Lock()
        self._skipped: dict[int, SkippedRow] = {}
        self.skipped, self.times = 0, StageTimes()

    @property
    def skipped_rows(self) -> tuple[SkippedRow, ...]:
        """The first 100 different rows that were left out."""
        with self._lock:
            return tuple(self._skipped.values())

    def begin(self, epoch: int, positions: NDArray[np.int64]) -> tuple[Pending, range]:
        """Set up a batch; return it and the first rows of its chunks, each to be passed to :meth:`work` once."""
        size, starts = self.options.image_size, range(0, len(positions), CHUNK_ROWS)
        image = np.empty((len(positions), size, size, 3), dtype=np.uint8)
        sizes = np.stack([self._table.width[positions], self._table.height[positions]], axis=1)
        return Pending(positions, epoch, image, sizes, len(starts)), starts

    def work(self, pending: Pending, start: int) -> None:
        """Make one chunk; the thread that makes a batch's last one finishes the batch."""
        if pending.future.cancelled():
            return
        try:
            faults = self._make(pending, start)
            with pending.lock:
                pending.faults |= faults
                pending.chunks -= 1
                last = pending.chunks == 0
            if last:
                pending.future.set_result(self._finish(pending))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the batch
            with pending.lock:
                if not pending.future.done():
                    pending.future.set_exception(error)

    def _make(self, pending: Pending, start: int) -> Faults:
        """Read, check, decode and augment some rows into the batch; return why those that are bad are."""
        images = dict.fromkeys(range(start, min(start + CHUNK_ROWS, len(pending.positions))), b"")
        faults: Faults = {}
        times = [time.perf_counter()]
        for stage in (self._read, self._compare, self._parse, self._decode):
            found = stage(pending, images)
            for row in found:
                del images[row]
            faults |= found
            times.append(time.perf_counter())
        self._augment(pending, list(images))
        times.append(time.perf_counter())
        read_s, check_s, parse_s, decode_s, augment_s = np.diff(times).tolist()
        with self._lock:
            self.times += StageTimes(read_s, check_s, parse_s + decode_s, augment_s, len(images))
        return faults

    def _read(self, pending: Pending, images: Images) -> Faults:
        """Read the rows' images into the dictionary."""
        faults: Faults = {}
        for row in images:
            try:
                images[row] = self.reader.image(int(pending.positions[row]))
            except PipelineError as error:
                faults[row] = str(error)
        return faults

    def _compare(self, pending: Pending, images: Images) -> Faults:
        """Compare the images' digests with those in the record list."""
        faults: Faults = {}
        for row, image in images.items():
            position = int(pending.positions[row])
            if self._check == "always" or not self._checked[position]:
                self._checked[position] = self.reader.matches(position, image)
                if not self._checked[position]:
                    faults[row] = "the image's bytes changed since conversion: its SHA-256 is another"
        return faults

    def _parse(self, pending: Pending, images: Images) -> Faults:
        """Read the sizes that the list does not say from the headers.

        Those of other formats than JPEG, too: `adopt` lists them upright, and they may carry an orientation.
        """
        faults = {
            row: f"{pending.pixels[row]} pixels by the record list, more than the {MAX_PIXELS} allowed"
            for row in images
            if pending.pixels[row] > MAX_PIXELS
        }
        known = {row for row, image in images.items() if pending.pixels[row] and image.startswith(SOI)}
        if parse := [row for row in images if row not in known and row not in faults]:
            pending.sizes[parse], found = self.decoder.sizes([images[row] for row in parse])
            faults |= {parse[place]: why for place, why in found}
        return faults

    def _decode(self, pending: Pending, images: Images) -> Faults:
        """Decode the images into the batch."""
        rows = list(images)
        if not rows:
            return {}
        whole = rows[-1] - rows[0] + 1 == len(rows)  # then the decoder writes straight into the batch
        out = pending.image[rows[0] : rows[-1] + 1] if whole else np.empty_like(pending.image[: len(rows)])
        geometry = self._geometry(pending, rows)
        found = self.decoder.decode(list(images.values()), geometry, self.options.interpolation, out)
        if not whole:
            pending.image[rows] = out
        return {rows[place]: why for place, why in found}

    def _geometry(self, pending: Pending, rows: list[int]) -> Geometry:
        sizes = pending.sizes[rows]
        if not isinstance(self.options, TrainOptions):
            return eval_geometry(self.options, sizes)
        with pending.lock:  # one call for the batch costs what one for a chunk does
            if pending.draws is None:
                pending.draws = crop_draws(self.seed, pending.epoch, self._table.ids[pending.positions])
        return train_geometry(self.options, sizes, pending.draws[rows])

    def _augment(self, pending: Pending, rows: list[int]) -> None:
        options = self.options
        if not rows or not isinstance(options, TrainOptions):
            return
        ids = self._table.ids[pending.positions[rows]]
        if options.randaugment_ops or any(options.color_jitter):
            from imnet_prep.loader.colour import augment_colours

            augment_colours(options, pending.image, rows, self.seed, pending.epoch, ids)
        if options.erasing_prob:
            boxes = erase_boxes(options, self.seed, pending.epoch, ids).tolist()
            for row, (left, top, right, bottom) in zip(rows, boxes, strict=True):
                pending.image[row, top:bottom, left:right] = ERASE_FILL

    def _finish(self, pending: Pending) -> Batch:
        """Deal with bad rows, then mix."""
        image, positions = self._skip(pending) if pending.faults else (pending.image, pending.positions)
        ids, label, options = self._table.ids[positions], self._table.label[positions], self.options
        if isinstance(options, TrainOptions) and (options.mixup_alpha or options.cutmix_alpha):
            mixed, share = mix(options, image, self.seed, pending.epoch, ids)
            return Batch(mixed, label, ids, label[::-1].copy(), share)
        return Batch(image, label, ids)

    def _skip(self, pending: Pending) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Raise, or leave bad rows out: evaluation's batch gets shorter, training's repeats good rows in their place.

        A repeated row carries its own label and id, so the step's shape is kept and nothing is mislabelled.
        """
        bad = sorted(pending.faults)
        if self._on_error == "raise":
            raise self._error(pending)
        with self._lock:
            self.skipped += len(bad)
            for row in bad:
                position = int(pending.positions[row])
                if position not in self._skipped and len(self._skipped) < SKIPPED_KEPT:
                    self._skipped[position] = SkippedRow(self.reader.where(position), pending.faults[row])
        good = [row for row in range(len(pending.positions)) if row not in pending.faults]
        if isinstance(self.options, EvalOptions):
            return np.ascontiguousarray(pending.image[good]), pending.positions[good]
        if not good:
            raise self._error(pending)
        source = np.arange(len(pending.positions))
        source[bad] = np.resize(good, len(bad))
        return pending.image[source], pending.positions[source]

    def _error(self, pending: Pending) -> PipelineError:
        row = min(pending.faults)
        return PipelineError(
            f"{self.reader.where(int(pending.positions[row]))}: the record is bad",
            got=pending.faults[row],
            remedy='restore the shard, or go on without such rows with on_error="skip"',
        )
