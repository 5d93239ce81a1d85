"""Turn records into batches: the same bytes at any worker count, from any step on, on any number of ranks.

A batch is cut into chunks of rows. Threads take the chunks in order, read and check the rows, and render them into the
batch; decoding releases the GIL. At most ``prefetch`` batches are being made or waiting, so memory is bounded by
``(prefetch + 2) * batch_size * image_size**2 * 3`` bytes and the compressed bytes of ``workers`` chunks.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from imnet_prep.cpu import cpu_count
from imnet_prep.errors import PipelineError
from imnet_prep.images.batch_decoder import Faults
from imnet_prep.loader.augment import mix
from imnet_prep.loader.options import LoaderOptions, Options, TrainOptions, check_range
from imnet_prep.loader.order import RankSampler, epoch_order
from imnet_prep.loader.random_numbers import MAX_EPOCH
from imnet_prep.loader.render import choose_decoder, render
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.table import RowReader
from imnet_prep.types import Batch

CHUNK_ROWS = 32  # 10 to 30 ms of decoding, beside which the work per chunk in Python is small
SKIPPED_KEPT = 100  # skipped rows that are kept by name; all are counted


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that was left out with ``on_error="skip"``: its shard, row and name, and why."""

    where: str
    why: str


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of worker time since the split was opened, all threads together, and the images they made."""

    read_s: float = 0.0
    check_s: float = 0.0
    decode_s: float = 0.0
    augment_s: float = 0.0
    images: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(self)))


@dataclass(slots=True, eq=False)
class _Pending:
    """A batch whose chunks are queued or being made; the chunk that ends last returns the batch."""

    epoch: int
    positions: NDArray[np.int64]
    image: NDArray[np.uint8]
    chunks_left: int
    faults: Faults = field(default_factory=dict)
    chunks: list[Future[Batch | None]] = field(default_factory=list)

    def result(self) -> Batch:
        """Wait for every chunk; raise the first error in row order."""
        results = [chunk.result() for chunk in self.chunks]
        return next(batch for batch in results if batch is not None)


class Batches:
    """An opened split; see :func:`open_batches`. Use it as a context manager, or call :meth:`close`.

    Attributes:
        split: Its name.
        options: How images are made.
        loading: How the split is read.
        images: Records of the split, over all ranks.
        class_names: In label order.
        steps_per_epoch: Batches of this rank in an epoch.
        workers: Decode threads.
        prefetch: Batches that are made ahead.
        decoder: A line that says which decoder runs.
        skipped: Rows left out so far (``on_error="skip"``).
        times: Worker time by stage so far.
    """

    def __init__(self, records: Path, split: str, options: Options, loading: LoaderOptions) -> None:
        folder = RecordsFolder.open(records)
        self._table = folder.table(split)
        self._reader = RowReader(self._table)
        self._decoder = choose_decoder(loading.native)
        self.split = split
        self.options = options
        self.loading = loading
        self.images = len(self._table)
        self.class_names = folder.manifest.classes
        self.decoder = self._decoder.name
        self._training = isinstance(options, TrainOptions)
        drop_last = isinstance(options, TrainOptions) and options.drop_last
        self._sampler = RankSampler(self.images, options.batch_size, loading.rank, loading.ranks, drop_last)
        self.steps_per_epoch = self._sampler.steps
        if self._training and not self.steps_per_epoch:
            raise PipelineError(
                f"{records}: split {split!r} does not fill one batch",
                expected=f"at least {options.batch_size * loading.ranks} images",
                got=f"{self.images}",
                remedy="lower the batch size or the number of ranks",
            )
        self.workers = loading.workers or cpu_count()
        self.prefetch = loading.prefetch or max(2, -(-self.workers * CHUNK_ROWS // options.batch_size) + 1)
        self.skipped = 0
        self.times = StageTimes()
        self._skipped_rows: dict[int, SkippedRow] = {}
        self._checked = np.full(self.images, loading.check == "never")
        self._lock = threading.Lock()  # of what the threads share: counts, times, faults
        self._epochs = count()
        self._process: int | None = os.getpid()  # None once closed
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="imnet-decode")

    @property
    def skipped_rows(self) -> tuple[SkippedRow, ...]:
        """The first 100 different rows that were left out."""
        with self._lock:
            return tuple(self._skipped_rows.values())

    @property
    def memory_bytes(self) -> int:
        """The bound on decoded images held here: those made ahead, one with the caller, one being mixed."""
        return (self.prefetch + 2) * self.options.batch_size * self.options.image_size**2 * 3

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Start the next epoch, beginning with epoch 0. Use :meth:`epoch` to choose one."""
        return self.epoch(next(self._epochs))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the files; closing twice is allowed."""
        if self._process == os.getpid():
            self._process = None
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._reader.close()

    def epoch(self, number: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Start an epoch at any step, in the same time; decoding begins at once.

        Args:
            number: From 0. Order, crops and all other draws follow from (seed, number, record id).
            start_step: Batches of this rank to leave out at the beginning; they are not decoded.

        Returns:
            An iterator of batches. Its ``close`` drops the batches that are made ahead.

        Raises:
            PipelineError: The split is closed, or a number is out of range.
        """
        self._check_open()
        check_range("epoch", number, 0, MAX_EPOCH)
        check_range("start_step", start_step, 0, self.steps_per_epoch)
        order = self.order(number)
        queue = (
            self._submit(number, order[self._sampler.span(step)]) for step in range(start_step, self.steps_per_epoch)
        )
        return self._results(queue, deque(islice(queue, self.prefetch)))

    def order(self, number: int) -> NDArray[np.int64]:
        """Return the order of an epoch over all ranks: int64 (images,), positions in stored order."""
        kind = self.loading.order if self._training else "sequential"
        return epoch_order(kind, self.loading.seed, number, self._table.ids)

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise PipelineError("the pipeline is closed, or was opened in another process")

    def _results(self, queue: Iterator[_Pending], ahead: deque[_Pending]) -> Generator[Batch, None, None]:
        """Yield the batches made ahead, and take one more from the queue for each."""
        try:
            while ahead:
                self._check_open()
                batch = ahead[0].result()
                ahead.popleft()
                ahead.extend(islice(queue, 1))
                if len(batch):  # evaluation may have skipped every row
                    yield batch
        finally:
            if self._process == os.getpid():
                for chunk in [chunk for pending in ahead for chunk in pending.chunks]:
                    chunk.cancel()

    def _submit(self, epoch: int, positions: NDArray[np.int64]) -> _Pending:
        """Hand the chunks of a batch to the threads."""
        self._reader.will_need(positions)
        starts, side = range(0, len(positions), CHUNK_ROWS), self.options.image_size
        image = np.empty((len(positions), side, side, 3), dtype=np.uint8)
        batch = _Pending(epoch, positions, image, len(starts))
        batch.chunks = [self._pool.submit(self._make_chunk, batch, start) for start in starts]
        return batch

    def _make_chunk(self, batch: _Pending, start: int) -> Batch | None:
        """Read, check and render one chunk; return the whole batch if this was its last chunk."""
        positions, out = batch.positions[start : start + CHUNK_ROWS], batch.image[start : start + CHUNK_ROWS]
        laps = [time.perf_counter()]
        images, faults = self._read(positions)
        laps.append(time.perf_counter())
        self._check_digests(positions, images, faults)
        laps.append(time.perf_counter())
        rendered = render(
            images,
            np.stack([self._table.width[positions], self._table.height[positions]], axis=1),
            self._table.ids[positions],
            self.options,
            self.loading.seed,
            batch.epoch,
            out,
            self._decoder,
            decoded=lambda: laps.append(time.perf_counter()),
        )
        laps.append(time.perf_counter())
        faults = rendered | faults
        read_s, check_s, decode_s, augment_s = (end - start for start, end in pairwise(laps))
        with self._lock:
            self.times += StageTimes(read_s, check_s, decode_s, augment_s, len(images) - len(faults))
            batch.faults |= {start + row: why for row, why in faults.items()}
            batch.chunks_left -= 1
            last = batch.chunks_left == 0
        return self._finish(batch) if last else None

    def _read(self, positions: NDArray[np.int64]) -> tuple[list[bytes], Faults]:
        """Read images; those that cannot be read are empty, and named as faults."""
        images, faults = [], {}
        for row, position in enumerate(positions.tolist()):
            try:
                images.append(self._reader.image(position))
            except PipelineError as error:
                images.append(b"")
                faults[row] = str(error)
        return images, faults

    def _check_digests(self, positions: NDArray[np.int64], images: list[bytes], faults: Faults) -> None:
        """Compare the images with the digests in the record list; add those that differ to the faults."""
        for row, position in enumerate(positions.tolist()):
            if row not in faults and (self.loading.check == "always" or not self._checked[position]):
                self._checked[position] = self._reader.matches(position, images[row])
                if not self._checked[position]:
                    faults[row] = "the image's bytes changed since conversion: its SHA-256 is another"

    def _finish(self, batch: _Pending) -> Batch:
        """Replace or leave out bad rows, then mix."""
        image, positions, options = batch.image, batch.positions, self.options
        if batch.faults:
            rows = self._skip_bad_rows(batch)
            image, positions = image[rows], positions[rows]
        ids, label = self._table.ids[positions], self._table.label[positions]
        if isinstance(options, TrainOptions) and options.mixes:
            mixed, share = mix(options, image, self.loading.seed, batch.epoch, ids)
            return Batch(mixed, label, ids, label[::-1].copy(), share)
        return Batch(image, label, ids)

    def _skip_bad_rows(self, batch: _Pending) -> NDArray[np.int64]:
        """Return the rows to use: evaluation leaves the bad ones out, training repeats good ones in their place.

        A repeated row keeps its own label and id, so the batch keeps its shape and nothing is mislabelled.

        Raises:
            PipelineError: With ``on_error="raise"``, or if training has no good row.
        """
        bad = sorted(batch.faults)
        rows = np.arange(len(batch.positions))
        good = np.delete(rows, bad)
        if self.loading.on_error == "raise" or (self._training and not len(good)):
            raise PipelineError(
                f"{self._reader.where(int(batch.positions[bad[0]]))}: the record is bad",
                got=batch.faults[bad[0]],
                remedy='restore the shard, or leave such rows out with on_error="skip"',
            )
        with self._lock:
            self.skipped += len(bad)
            for row in bad:
                position = int(batch.positions[row])
                if position not in self._skipped_rows and len(self._skipped_rows) < SKIPPED_KEPT:
                    self._skipped_rows[position] = SkippedRow(self._reader.where(position), batch.faults[row])
        if not self._training:
            return good
        rows[bad] = np.resize(good, len(bad))
        return rows


def open_batches(records: str | Path, split: str, options: Options, seed: int = 0, **loading: Any) -> Batches:
    """Open a split of a records folder for training or evaluation.

    Args:
        records: A folder with ``manifest.json``.
        split: ``train``, ``val`` or ``test``.
        options: :class:`~imnet_prep.loader.options.TrainOptions` (shuffled, random crops) or
            :class:`~imnet_prep.loader.options.EvalOptions` (in stored order, centre crops).
        seed: Key of every draw, together with the epoch and the record id.
        loading: Any field of :class:`~imnet_prep.loader.options.LoaderOptions`: ``workers``, ``rank``, ``ranks``,
            ``on_error``, ``order``, ``native``, ``check``, ``prefetch``.

    Raises:
        RecordsError: The folder, the split, a shard or an index is missing or damaged.
        PipelineError: An argument is out of range, or the split does not fill one batch.
    """
    return Batches(Path(records), split, options, LoaderOptions(seed, **loading))
