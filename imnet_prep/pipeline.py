"""Records to batches: the same bytes at any worker count, from any step on, on any number of ranks.

A batch is cut into chunks of rows; threads of this process take the chunks in order, read, decode (outside the GIL)
and write into the batch. No process is forked, so none can die or stay behind. At most ``prefetch`` batches are in the
making or waiting, so memory is bounded by ``(prefetch + 2) * batch_size * image_size**2 * 3`` bytes and the compressed
bytes of ``workers`` chunks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.augment import (
    ERASE_FILL,
    EvalOptions,
    Geometry,
    TrainOptions,
    crop_draws,
    erase_boxes,
    eval_geometry,
    mix,
    train_geometry,
)
from imnet_prep.decode import Decoder, Fault, PortableDecoder
from imnet_prep.errors import PipelineError
from imnet_prep.manifest import load_manifest
from imnet_prep.native import NativeDecoder, load
from imnet_prep.order import ORDERS, Share, epoch_order
from imnet_prep.rng import MAX_EPOCH, MAX_SEED
from imnet_prep.rows import RowReader, load_rows
from imnet_prep.runtime import cpu_count
from imnet_prep.types import Batch

if TYPE_CHECKING:
    from mindspore.dataset import Dataset

__all__ = ["Batches", "EvalOptions", "SkippedRow", "StageTimes", "TrainOptions", "open_batches", "to_dataset"]

CHUNK_ROWS = 16  # rows a task takes: about 15 ms of decoding, so that threads share the end of a batch well
ON_ERROR = ("raise", "skip")
CHECKS = ("first", "always", "never")
NATIVE = ("auto", "on", "off")
SKIPPED_KEPT = 100  # skipped rows that are remembered by name; all are counted
_logger = logging.getLogger(__name__)
Options = TrainOptions | EvalOptions


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


class _Pending:
    """A batch in the making."""

    __slots__ = ("chunks", "draws", "epoch", "faults", "future", "image", "lock", "positions")

    def __init__(self, positions: NDArray[np.int64], epoch: int, image: NDArray[np.uint8], chunks: int) -> None:
        self.positions, self.epoch, self.image, self.chunks = positions, epoch, image, chunks
        self.faults: list[Fault] = []
        self.draws: NDArray[np.float64] | None = None
        self.lock = threading.Lock()
        self.future: Future[Batch] = Future()


class Batches:
    """An opened split; see :func:`open_batches`. Use it as a context manager, or call :meth:`close`.

    Attributes:
        split: Its name. options: As given. seed: As given.
        images: Records of the split, over all ranks.
        class_names: In label order.
        batch_size: Rows of a batch on this rank.
        steps_per_epoch: Batches of this rank in an epoch.
        workers: Decode threads. prefetch: Batches in the making or waiting.
        decoder: Which decoder runs, in words.
        skipped: Rows left out so far (``on_error="skip"``). skipped_rows: The first 100 of them.
    """

    def __init__(
        self,
        records: Path,
        split: str,
        options: Options,
        seed: int,
        *,
        workers: int | None,
        rank: int,
        ranks: int,
        on_error: str,
        order: str,
        native: str,
        check: str,
        prefetch: int | None,
    ) -> None:
        _one_of("on_error", on_error, ON_ERROR)
        _one_of("order", order, ORDERS)
        _one_of("native", native, NATIVE)
        _one_of("check", check, CHECKS)
        _in_range("seed", seed, 0, MAX_SEED)
        _in_range("ranks", ranks, 1, 1 << 20)
        _in_range("rank", rank, 0, ranks - 1)
        self.workers = cpu_count() if workers is None else workers
        _in_range("workers", self.workers, 1, 1024)
        manifest = load_manifest(records)
        table = load_rows(records, manifest, split)
        self._table, self._reader = table, RowReader(table)
        self._decoder = _choose_decoder(native)
        self.decoder = self._decoder.name
        self.split, self.options, self.seed = split, options, seed
        self.images, self.class_names = len(table), manifest.classes
        self.batch_size = options.batch_size
        training = isinstance(options, TrainOptions)
        self._order = order if training else "sequential"
        drop_last = isinstance(options, TrainOptions) and options.drop_last
        self._share = Share(len(table), options.batch_size, rank, ranks, drop_last)
        self.steps_per_epoch = self._share.steps
        if training and not self.steps_per_epoch:
            raise PipelineError(
                f"{records}: split {split!r} does not fill one batch",
                expected=f"at least {options.batch_size * ranks} images",
                got=f"{len(table)}",
                remedy="lower the batch size or the number of ranks",
            )
        ahead = -(-2 * self.workers * CHUNK_ROWS // options.batch_size) + 1
        self.prefetch = max(2, ahead) if prefetch is None else prefetch
        _in_range("prefetch", self.prefetch, 1, 1 << 16)
        self._on_error, self._check = on_error, check
        self._checked = np.zeros(len(table), dtype=np.bool_)
        self._lock = threading.Lock()
        self._times = StageTimes()
        self._skipped: dict[int, SkippedRow] = {}
        self.skipped = 0
        self._next_epoch = 0
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="imnet-decode")
        self._closed = False

    @property
    def skipped_rows(self) -> tuple[SkippedRow, ...]:
        """The first 100 different rows that were left out."""
        with self._lock:
            return tuple(self._skipped.values())

    @property
    def times(self) -> StageTimes:
        """Worker time by stage since the pipeline was opened."""
        with self._lock:
            return self._times

    @property
    def batch_bytes(self) -> int:
        """Bytes of one batch of images."""
        return self.batch_size * self.options.image_size**2 * 3

    @property
    def memory_bytes(self) -> int:
        """The bound on decoded images held here: those ahead, one with the caller, one being mixed."""
        return (self.prefetch + 2) * self.batch_bytes

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Start the next epoch: the first time epoch 0. Use :meth:`epoch` to say which."""
        number, self._next_epoch = self._next_epoch, self._next_epoch + 1
        return self.epoch(number)

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the files; closing twice is fine."""
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def epoch(self, number: int, start_step: int = 0) -> EpochIterator:
        """Start an epoch at any step, in the same time; decoding begins at once.

        Args:
            number: From 0. Order, crops and all other draws follow from (seed, number, record id).
            start_step: Batches of this rank to leave out at the beginning; they are not decoded.

        Returns:
            An iterator of :class:`~imnet_prep.types.Batch`; its ``close`` drops what is in the making.

        Raises:
            PipelineError: The pipeline is closed, or a number is out of range.
        """
        if self._closed or os.getpid() != self._process:
            raise PipelineError("the pipeline is closed, or was opened in another process")
        _in_range("epoch", number, 0, MAX_EPOCH)
        _in_range("start_step", start_step, 0, self.steps_per_epoch)
        return EpochIterator(self, number, start_step)

    def order(self, number: int) -> NDArray[np.int64]:
        """Give the order of an epoch over all ranks: int64 (images,), positions in stored order."""
        return epoch_order(self._order, self.seed, number, self._table.ids)

    def _submit(self, epoch: int, positions: NDArray[np.int64]) -> _Pending:
        size = self.options.image_size
        image = np.empty((len(positions), size, size, 3), dtype=np.uint8)
        starts = range(0, len(positions), CHUNK_ROWS)
        pending = _Pending(positions, epoch, image, len(starts))
        for start in starts:
            self._pool.submit(self._work, pending, start)
        return pending

    def _work(self, pending: _Pending, start: int) -> None:
        """Make one chunk; the thread that makes a batch's last one finishes the batch."""
        if pending.future.cancelled():
            return
        try:
            faults = self._make(pending, start)
            with pending.lock:
                pending.faults += faults
                pending.chunks -= 1
                last = pending.chunks == 0
            if last:
                pending.future.set_result(self._finish(pending))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the batch
            with pending.lock:
                if not pending.future.done():
                    pending.future.set_exception(error)

    def _make(self, pending: _Pending, start: int) -> list[Fault]:
        """Read, check, decode and augment some rows into the batch; faults count from the batch's first row."""
        began = time.perf_counter()
        positions = pending.positions[start : start + CHUNK_ROWS]
        faults: list[Fault] = []
        rows: list[int] = []
        images: list[bytes] = []
        for row, position in enumerate(positions.tolist(), start):
            try:
                images.append(self._reader.image(position))
                rows.append(row)
            except PipelineError as error:
                faults.append((row, str(error)))
        read = time.perf_counter()
        rows, images = self._digests(pending, rows, images, faults)
        checked = time.perf_counter()
        rows = self._decode(pending, rows, images, faults)
        decoded = time.perf_counter()
        self._augment(pending, rows)
        done = time.perf_counter()
        spent = StageTimes(read - began, checked - read, decoded - checked, done - decoded, len(rows))
        with self._lock:
            self._times += spent
        return faults

    def _digests(
        self, pending: _Pending, rows: list[int], images: list[bytes], faults: list[Fault]
    ) -> tuple[list[int], list[bytes]]:
        """Keep the rows whose bytes are those that were stored."""
        if self._check == "never":
            return rows, images
        kept: tuple[list[int], list[bytes]] = [], []
        for row, image in zip(rows, images, strict=True):
            position = int(pending.positions[row])
            if self._check == "first" and self._checked[position]:
                good = True
            else:
                good = self._checked[position] = self._reader.matches(position, image)
            if good:
                kept[0].append(row)
                kept[1].append(image)
            else:
                faults.append((row, "the image's bytes changed since conversion: its SHA-256 is another"))
        return kept

    def _decode(self, pending: _Pending, rows: list[int], images: list[bytes], faults: list[Fault]) -> list[int]:
        """Decode into the batch; gives the rows that are good."""
        sizes, found = self._decoder.sizes(images)
        if found:
            rows, images, keep = _without(rows, images, found, faults)
            sizes = sizes[keep]
        if not rows:
            return rows
        geometry = self._geometry(pending, sizes, rows)
        whole = rows[-1] - rows[0] + 1 == len(rows)  # then the decoder writes straight into the batch
        out = pending.image[rows[0] : rows[-1] + 1] if whole else np.empty_like(pending.image[: len(rows)])
        found = self._decoder.decode(images, geometry, self.options.interpolation, out)
        if not whole:
            pending.image[rows] = out
        return _without(rows, images, found, faults)[0] if found else rows

    def _geometry(self, pending: _Pending, sizes: NDArray[np.int32], rows: list[int]) -> Geometry:
        if not isinstance(self.options, TrainOptions):
            return eval_geometry(self.options, sizes)
        with pending.lock:  # one call for the batch costs what one for a chunk does
            if pending.draws is None:
                pending.draws = crop_draws(self.seed, pending.epoch, self._table.ids[pending.positions])
        return train_geometry(self.options, sizes, pending.draws[rows])

    def _augment(self, pending: _Pending, rows: list[int]) -> None:
        options = self.options
        if not rows or not isinstance(options, TrainOptions):
            return
        ids = self._table.ids[pending.positions[rows]]
        if options.randaugment_ops or any(options.color_jitter):
            from imnet_prep.colour import augment_colours

            augment_colours(options, pending.image, rows, self.seed, pending.epoch, ids)
        if options.erasing_prob:
            boxes = erase_boxes(options, self.seed, pending.epoch, ids).tolist()
            for row, (left, top, right, bottom) in zip(rows, boxes, strict=True):
                pending.image[row, top:bottom, left:right] = ERASE_FILL

    def _finish(self, pending: _Pending) -> Batch:
        """Deal with bad rows, then mix."""
        image, positions = pending.image, pending.positions
        if pending.faults:
            image, positions = self._skip(pending)
        ids = self._table.ids[positions]
        label = self._table.label[positions]
        options = self.options
        if isinstance(options, TrainOptions) and (options.mixup_alpha or options.cutmix_alpha):
            mixed, share = mix(options, image, self.seed, pending.epoch, ids)
            return Batch(mixed, label, ids, label[::-1].copy(), share)
        return Batch(image, label, ids)

    def _skip(self, pending: _Pending) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Raise, or leave bad rows out: evaluation's batch gets shorter, training's repeats good rows in their place.

        A repeated row carries its own label and id, so the step's shape is kept and nothing is mislabelled.
        """
        faults = sorted(pending.faults)
        reader = self._reader
        if self._on_error == "raise":
            raise self._error(pending, faults[0])
        with self._lock:
            self.skipped += len(faults)
            for row, why in faults:
                position = int(pending.positions[row])
                if position not in self._skipped and len(self._skipped) < SKIPPED_KEPT:
                    self._skipped[position] = SkippedRow(reader.where(position), why)
        bad = {row for row, _ in faults}
        good = [row for row in range(len(pending.positions)) if row not in bad]
        if isinstance(self.options, EvalOptions):
            return np.ascontiguousarray(pending.image[good]), pending.positions[good]
        if not good:
            raise self._error(pending, faults[0])
        source = np.arange(len(pending.positions))
        source[sorted(bad)] = np.resize(good, len(bad))
        return pending.image[source], pending.positions[source]

    def _error(self, pending: _Pending, fault: Fault) -> PipelineError:
        row, why = fault
        where = self._reader.where(int(pending.positions[row]))
        remedy = 'restore the shard, or go on without such rows with on_error="skip"'
        return PipelineError(f"{where}: the record is bad", got=why, remedy=remedy)


class EpochIterator:
    """The batches of one epoch, made ahead; see :meth:`Batches.epoch`."""

    def __init__(self, batches: Batches, number: int, start_step: int) -> None:
        self._batches, self._number = batches, number
        self._order = batches.order(number)
        self._next = start_step
        self._ahead: deque[_Pending] = deque()
        self._fill()

    def __iter__(self) -> EpochIterator:
        return self

    def __len__(self) -> int:
        """Batches still to come."""
        return self._batches.steps_per_epoch - self._next + len(self._ahead)

    def __next__(self) -> Batch:
        if self._batches._closed or os.getpid() != self._batches._process:
            raise PipelineError("the pipeline was closed during an epoch, or belongs to another process")
        if not self._ahead:
            raise StopIteration
        try:
            batch = self._ahead[0].future.result()
        except PipelineError:
            self.close()
            raise
        self._ahead.popleft()
        self._fill()
        return batch

    def close(self) -> None:
        """Drop the batches in the making."""
        self._next = self._batches.steps_per_epoch
        while self._ahead:
            self._ahead.pop().future.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_ahead"):
            self.close()

    def _fill(self) -> None:
        batches = self._batches
        while len(self._ahead) < batches.prefetch and self._next < batches.steps_per_epoch:
            start, end = batches._share.span(self._next)
            self._next += 1
            positions = self._order[start:end]
            batches._reader.will_need(positions)
            self._ahead.append(batches._submit(self._number, positions))


def _without(
    rows: list[int], images: list[bytes], found: list[Fault], faults: list[Fault]
) -> tuple[list[int], list[bytes], list[int]]:
    """Drop the rows with a fault, and note the faults by row of the batch."""
    faults += [(rows[place], why) for place, why in found]
    bad = {place for place, _ in found}
    keep = [place for place in range(len(rows)) if place not in bad]
    return [rows[place] for place in keep], [images[place] for place in keep], keep


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PipelineError(f"unknown {name}", expected=f"one of {', '.join(choices)}", got=repr(value))


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise PipelineError(f"{name} is out of range", expected=f"{low} to {high}", got=str(value))


def _choose_decoder(native: str) -> Decoder:
    if native == "off":
        return PortableDecoder()
    library, text = load()
    if library is None and native == "auto":
        _logger.info("%s; decoding with OpenCV", text)
        return PortableDecoder()
    return NativeDecoder()


def open_batches(
    records: Path,
    split: str,
    options: Options,
    seed: int = 0,
    *,
    workers: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    on_error: str = "raise",
    order: str = "global",
    native: str = "auto",
    check: str = "first",
    prefetch: int | None = None,
) -> Batches:
    """Open a split of a records folder for training or evaluation.

    Args:
        records: A folder with ``manifest.json``.
        split: ``train``, ``val`` or ``test``.
        options: :class:`TrainOptions` (shuffled, random crops) or :class:`EvalOptions` (in stored order, centre crops).
        seed: With epoch and record id, the key of every draw.
        workers: Decode threads; the cores this process may use where None.
        rank: This rank, from 0. ranks: Number of ranks; each record goes to exactly one.
        on_error: ``raise`` at a bad record, or ``skip`` it and count it.
        order: Of training: ``global`` shuffle, or ``blocks`` where random reads are dear, or ``sequential``.
        native: The C++ decoder: ``auto`` where it is built, ``on`` (an error where it is not), ``off``.
        check: Compare each image with its SHA-256 at its ``first`` reading, ``always`` or ``never``.
        prefetch: Batches in the making or waiting; None gives every worker two chunks.

    Raises:
        RecordsError: The folder, the split, a shard or an index is missing or damaged.
        PipelineError: An argument is out of range, or the split does not fill one batch.
    """
    return Batches(
        Path(records),
        split,
        options,
        seed,
        workers=workers,
        rank=rank,
        ranks=ranks,
        on_error=on_error,
        order=order,
        native=native,
        check=check,
        prefetch=prefetch,
    )


def to_dataset(batches: Batches, *, first_epoch: int = 0) -> Dataset:
    """Wrap an opened split as a MindSpore dataset of batches, for a stock ``Model.train``.

    Columns: ``image`` uint8 (N, H, W, 3), ``label`` int32 (N,), and with MixUp or CutMix ``mix_label`` int32 (N,) and
    ``mix_weight`` float32 (N,). Each iteration over the dataset is the next epoch.
    """
    import mindspore.dataset as ds

    source = _Source(batches, first_epoch)
    return ds.GeneratorDataset(
        source, column_names=source.columns, shuffle=False, num_parallel_workers=1, python_multiprocessing=False
    )


class _Source:
    """What MindSpore iterates: each ``iter`` is the next epoch."""

    def __init__(self, batches: Batches, first_epoch: int) -> None:
        self._batches, self._epoch = batches, first_epoch
        options = batches.options
        mixed = isinstance(options, TrainOptions) and bool(options.mixup_alpha or options.cutmix_alpha)
        self.columns = ["image", "label", *(["mix_label", "mix_weight"] if mixed else [])]

    def __len__(self) -> int:
        return self._batches.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[NDArray[Any], ...]]:
        number = self._epoch
        self._epoch += 1
        for batch in self._batches.epoch(number):
            yield tuple(getattr(batch, name) for name in self.columns)
