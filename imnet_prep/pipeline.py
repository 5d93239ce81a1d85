"""Records to batches: the same bytes at any worker count, from any step on, on any number of ranks.

A batch is cut into chunks of rows; threads of this process take the chunks in order, read, decode (outside the GIL)
and write into the batch. No process is forked, so none can die or stay behind. At most ``prefetch`` batches are in the
making or waiting, so memory is bounded by ``(prefetch + 2) * batch_size * image_size**2 * 3`` bytes and the compressed
bytes of ``workers`` chunks.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.augment import EvalOptions, TrainOptions
from imnet_prep.decode import PortableDecoder
from imnet_prep.errors import PipelineError
from imnet_prep.maker import CHECKS, CHUNK_ROWS, ON_ERROR, BatchMaker, Options, Pending, SkippedRow, StageTimes
from imnet_prep.native import NativeDecoder, load
from imnet_prep.order import ORDERS, Share, epoch_order
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.table import RowReader
from imnet_prep.rng import MAX_EPOCH, MAX_SEED
from imnet_prep.runtime import cpu_count
from imnet_prep.types import Batch

if TYPE_CHECKING:
    from mindspore.dataset import Dataset

__all__ = ["Batches", "EvalOptions", "SkippedRow", "StageTimes", "TrainOptions", "open_batches", "to_dataset"]

NATIVE = ("auto", "on", "off")
_logger = logging.getLogger(__name__)


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
        folder = RecordsFolder.open(records)
        table = folder.table(split)
        self._table, self._reader = table, RowReader(table)
        self._decoder = _choose_decoder(native)
        self.decoder = self._decoder.name
        self.split, self.options, self.seed = split, options, seed
        self.images, self.class_names = len(table), folder.manifest.classes
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
        self._maker = BatchMaker(self._reader, self._decoder, options, seed, on_error, check)
        self._next_epoch = 0
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="imnet-decode")
        self._closed = False

    @property
    def skipped(self) -> int:
        """Rows left out so far."""
        return self._maker.skipped

    @property
    def skipped_rows(self) -> tuple[SkippedRow, ...]:
        """The first 100 different rows that were left out."""
        return self._maker.skipped_rows

    @property
    def times(self) -> StageTimes:
        """Worker time by stage since the pipeline was opened."""
        return self._maker.times

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

    def _submit(self, epoch: int, positions: NDArray[np.int64]) -> Pending:
        self._reader.will_need(positions)
        pending, starts = self._maker.begin(epoch, positions)
        for start in starts:
            self._pool.submit(self._maker.work, pending, start)
        return pending


class EpochIterator:
    """The batches of one epoch, made ahead; see :meth:`Batches.epoch`."""

    def __init__(self, batches: Batches, number: int, start_step: int) -> None:
        self._batches, self._number = batches, number
        self._order = batches.order(number)
        self._next = start_step
        self._ahead: deque[Pending] = deque()
        self._fill()

    def __iter__(self) -> EpochIterator:
        return self

    def __len__(self) -> int:
        """Batches still to come."""
        return self._batches.steps_per_epoch - self._next + len(self._ahead)

    def __next__(self) -> Batch:
        if self._batches._closed or os.getpid() != self._batches._process:
            raise PipelineError("the pipeline was closed during an epoch, or belongs to another process")
        while self._ahead:
            try:
                batch = self._ahead[0].future.result()
            except PipelineError:
                self.close()
                raise
            self._ahead.popleft()
            self._fill()
            if len(batch):  # evaluation may have skipped every row of it
                return batch
        raise StopIteration

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
            self._ahead.append(batches._submit(self._number, positions))


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PipelineError(f"unknown {name}", expected=f"one of {', '.join(choices)}", got=repr(value))


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise PipelineError(f"{name} is out of range", expected=f"{low} to {high}", got=str(value))


def _choose_decoder(native: str) -> PortableDecoder:
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
