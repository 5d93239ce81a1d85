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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.cpu import cpu_count
from imnet_prep.errors import PipelineError
from imnet_prep.images.decode import PortableDecoder
from imnet_prep.images.native import NativeDecoder, load
from imnet_prep.loader.augment import EvalOptions, TrainOptions
from imnet_prep.loader.order import ORDERS, Share, epoch_order
from imnet_prep.loader.random_numbers import MAX_EPOCH, MAX_SEED
from imnet_prep.loader.render import CHECKS, CHUNK_ROWS, ON_ERROR, BatchMaker, Options, Pending, SkippedRow, StageTimes
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.table import RowReader
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
        self, folder: RecordsFolder, share: Share, maker: BatchMaker, order: str, workers: int, prefetch: int
    ) -> None:
        self._share, self._maker, self._order = share, maker, order
        self.workers, self.prefetch = workers, prefetch
        self._reader, self._decoder, self._table = maker.reader, maker.decoder, maker.reader.table
        self.split, self.options, self.seed = self._table.split, maker.options, maker.seed
        self.images, self.class_names, self.decoder = len(self._table), folder.manifest.classes, self._decoder.name
        self.batch_size, self.steps_per_epoch = share.batch_size, share.steps
        self._next_epoch = 0
        self._process: int | None = os.getpid()  # None once it is closed
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="imnet-decode")

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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the files; closing twice is fine."""
        if self._process == os.getpid():
            self._process = None
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
        if self._process != os.getpid():
            raise PipelineError("the pipeline is closed, or was opened in another process")
        _in_range("epoch", number, 0, MAX_EPOCH)
        _in_range("start_step", start_step, 0, self.steps_per_epoch)
        return EpochIterator(self, number, start_step)

    def order(self, number: int) -> NDArray[np.int64]:
        """Return the order of an epoch over all ranks: int64 (images,), positions in stored order."""
        return epoch_order(self._order, self.seed, number, self._table.ids)

    def _submit(self, epoch: int, positions: NDArray[np.int64]) -> Pending:
        self._reader.will_need(positions)
        pending, starts = self._maker.begin(epoch, positions)
        for start in starts:
            self._pool.submit(self._maker.work, pending, start)
        return pending


class EpochIterator(Iterator[Batch]):
    """The batches of one epoch, made ahead; see :meth:`Batches.epoch`."""

    def __init__(self, batches: Batches, number: int, start_step: int) -> None:
        self._ahead: deque[Pending] = deque()
        self._batches, self._number, self._next = batches, number, start_step
        self._order = batches.order(number)
        self._fill()

    def __len__(self) -> int:
        """Batches still to come."""
        return self._batches.steps_per_epoch - self._next + len(self._ahead)

    def __next__(self) -> Batch:
        if self._batches._process != os.getpid():
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
        self.close()

    def _fill(self) -> None:
        batches = self._batches
        while len(self._ahead) < batches.prefetch and self._next < batches.steps_per_epoch:
            positions = self._order[slice(*batches._share.span(self._next))]
            self._next += 1
            self._ahead.append(batches._submit(self._number, positions))


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise PipelineError(f"{name} is out of range", expected=f"{low} to {high}", got=str(value))


def _choose_decoder(native: str) -> PortableDecoder:
    if native == "auto":
        library, text = load()
        if library is None:
            _logger.info("%s; decoding with OpenCV", text)
            return PortableDecoder()
    return PortableDecoder() if native == "off" else NativeDecoder()


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
    for name, chosen, known in (
        ("on_error", on_error, ON_ERROR),
        ("order", order, ORDERS),
        ("native", native, NATIVE),
        ("check", check, CHECKS),
    ):
        if chosen not in known:
            raise PipelineError(f"unknown {name}", expected=f"one of {', '.join(known)}", got=repr(chosen))
    workers = cpu_count() if workers is None else workers
    ahead = max(2, -(-2 * workers * CHUNK_ROWS // options.batch_size) + 1) if prefetch is None else prefetch
    _in_range("seed", seed, 0, MAX_SEED)
    _in_range("ranks", ranks, 1, 1 << 20)
    _in_range("rank", rank, 0, ranks - 1)
    _in_range("workers", workers, 1, 1024)
    _in_range("prefetch", ahead, 1, 1 << 16)
    folder = RecordsFolder.open(Path(records))
    table = folder.table(split)
    drop_last = isinstance(options, TrainOptions) and options.drop_last
    share = Share(len(table), options.batch_size, rank, ranks, drop_last)
    if isinstance(options, TrainOptions) and not share.steps:
        raise PipelineError(
            f"{records}: split {split!r} does not fill one batch",
            expected=f"at least {options.batch_size * ranks} images",
            got=f"{len(table)}",
            remedy="lower the batch size or the number of ranks",
        )
    maker = BatchMaker(RowReader(table), _choose_decoder(native), options, seed, on_error, check)
    return Batches(folder, share, maker, order if isinstance(options, TrainOptions) else "sequential", workers, ahead)


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
        number, self._epoch = self._epoch, self._epoch + 1
        for batch in self._batches.epoch(number):
            yield tuple(getattr(batch, name) for name in self.columns)
