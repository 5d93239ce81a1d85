"""Turn records into batches: the same bytes at any worker count, from any step on, on any number of ranks.

A batch is cut into chunks of rows. Threads take the chunks in order, read and check the rows, and render them into the
batch; decoding releases the GIL. At most ``prefetch`` batches are being made or waiting, so memory is bounded by
``(prefetch + 2) * batch_size * image_size**2 * 3`` bytes and the compressed bytes of ``workers`` chunks.
"""

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from imnet_prep.cpu import cpu_count
from imnet_prep.errors import PipelineError
from imnet_prep.images.batch_decoder import Faults
from imnet_prep.loader.augment import mix
from imnet_prep.loader.bad_rows import BadRows, SkippedRow
from imnet_prep.loader.options import (
    AHEAD_BYTES,
    SKIPPED_FRAC,
    SKIPPED_LEAST,
    LoaderOptions,
    Options,
    TrainOptions,
    check_range,
)
from imnet_prep.loader.order import EpochOrder, RankSampler, epoch_order
from imnet_prep.loader.random_numbers import MAX_EPOCH
from imnet_prep.loader.render import choose_decoder, render
from imnet_prep.records.elsewhere import open_records
from imnet_prep.remote import is_url
from imnet_prep.types import Batch, StageTimes

CHUNK_ROWS = 32  # 10 to 30 ms of decoding, beside which the work per chunk in Python is small


@dataclass(slots=True, eq=False)
class _Pending:
    """A batch whose chunks are queued or being made; the chunk that ends last returns the batch.

    Attributes:
        epoch: From 0.
        order: Of the epoch.
        places: int64 (rows,), where the rows lie in the order.
        image: uint8 (rows, H, W, 3), being written.
        chunks_left: Chunks that have not ended.
        faults: Bad rows, and why.
        bad: Bad records, by position, and why; those met in the search for others in their place as well.
        chunks: The threads' work.
    """

    epoch: int
    order: EpochOrder
    places: NDArray[np.int64]
    image: NDArray[np.uint8]
    chunks_left: int
    faults: Faults = field(default_factory=dict)
    bad: Faults = field(default_factory=dict)
    chunks: list[Future[Batch | None]] = field(default_factory=list)

    def result(self) -> Batch:
        """Wait for every chunk; raise the first error in row order."""
        results = [chunk.result() for chunk in self.chunks]
        return next(batch for batch in results if batch is not None)


class _Buffers:
    """Memory of batches, used again once neither an array nor a view of it is held: new pages cost 4 % of the time."""

    def __init__(self, size_bytes: int, most: int) -> None:
        self._size_bytes = size_bytes
        self._free: deque[bytearray] = deque(maxlen=most)

    def array(self, *shape: int) -> NDArray[np.uint8]:
        """Return an undefined uint8 array."""
        try:
            block = self._free.pop()
        except IndexError:
            block = bytearray(self._size_bytes)
        # As a bytearray is no array, this one is the base of all views, and lives as long as they do.
        flat = np.frombuffer(block, np.uint8, math.prod(shape))
        weakref.finalize(flat, self._free.append, block).atexit = False
        return flat.reshape(shape)


class Batches:
    """An opened split; see :func:`open_batches`. Use it as a context manager, or call :meth:`close`.

    Attributes:
        split: Its name.
        options: How images are made.
        loading: How the split is read.
        order_kind: Which of :data:`~imnet_prep.loader.order.ORDERS` that comes to.
        images: Records of the split, over all ranks.
        class_names: In label order.
        records_digest: SHA-256 (hex) of ``manifest.json``.
        steps_per_epoch: Batches of this rank in an epoch.
        workers: Decode threads.
        prefetch: Batches that are made ahead.
        decoder: A line that says which decoder runs.
        times: Worker time by stage so far.
    """

    def __init__(self, records: Path | str, split: str, options: Options, loading: LoaderOptions) -> None:
        self._training, usual = isinstance(options, TrainOptions), "blocks" if is_url(records) else "global"
        self.order_kind = (loading.order or usual) if self._training else "sequential"
        folder = open_records(records, loading.cache, loading.cache_bytes)
        self._reader = folder.reader(split, at_random=self.order_kind in ("global", "balanced"))
        self._table = self._reader.table
        self._decoder = choose_decoder(loading.native)
        self.split = split
        self.options = options
        self.loading = loading
        self.images = len(self._table)
        self.class_names = folder.manifest.classes
        self.records_digest = folder.manifest.digest
        self.decoder = self._decoder.name
        self._whole = isinstance(options, TrainOptions) and options.drop_last  # every batch has all its rows
        self._sampler = RankSampler(self.images, options.batch_size, loading.rank, loading.ranks, self._whole)
        self.steps_per_epoch = self._sampler.steps
        if self._training and not self.steps_per_epoch:
            raise PipelineError(
                f"{records}: split {split!r} does not fill one batch",
                expected=f"at least {options.batch_size * loading.ranks} images",
                got=f"{self.images}",
                remedy="lower the batch size or the number of ranks",
            )
        self.workers = loading.workers or max(1, cpu_count() // loading.local_ranks)
        self.prefetch = loading.prefetch or self._choose_prefetch()
        self._allocate = loading.allocate or _Buffers(self.batch_bytes, self.prefetch + 2).array
        self.times = StageTimes()
        usual_most = max(SKIPPED_LEAST, int(SKIPPED_FRAC * self.images))
        most = min(usual_most if loading.max_skipped is None else loading.max_skipped, self.images - 1)
        self._bad = BadRows(
            split, self.images, most, lambda row: (self._reader.file_name(row), self._reader.where(row))
        )
        self._checked = np.full(self.images, loading.check == "never")
        self._lock = threading.Lock()  # of what the threads share: counts, times, faults
        self._epochs = count()
        self._process: int | None = os.getpid()  # None once closed
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="imnet-decode")

    def _choose_prefetch(self) -> int:
        """Return as many batches as keep the threads busy, within the memory of this machine's ranks."""
        busy = -(-self.workers * CHUNK_ROWS // self.options.batch_size) + 1
        return max(2, min(busy, AHEAD_BYTES // (self.loading.local_ranks * self.batch_bytes)))

    @property
    def skipped(self) -> tuple[SkippedRow, ...]:
        """The different records that were skipped so far (``on_error="skip"``), in the order of the batches."""
        return self._bad.rows

    def add_skipped(self, found: Mapping[int, str]) -> None:
        """Count records that another rank, or this run before it was interrupted, found bad.

        Args:
            found: Position in stored order to the reason.

        Raises:
            PipelineError: With those known already, there are more than may be skipped.
        """
        self._bad.add(found)

    @property
    def batch_bytes(self) -> int:
        """The size of the images of a batch."""
        return self.options.batch_size * self.options.image_size**2 * 3

    @property
    def memory_bytes(self) -> int:
        """The bound on decoded images held here: those made ahead, one with the caller, one being mixed."""
        return (self.prefetch + 2) * self.batch_bytes

    def why_bad(self, position: int) -> str:
        """Read a record that another rank found bad, and return why it is."""
        side, order = self.options.image_size, EpochOrder(np.arange(self.images))
        alone = _Pending(0, order, np.array([position]), np.empty((1, side, side, 3), dtype=np.uint8), 1)
        return self._make_rows(alone, slice(0, 1)).get(0, "bad on another rank")

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
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._reader.close()  # a chunk may wait for a shard that is being brought
            self._pool.shutdown(wait=True)
            self._reader.close()

    def epoch(self, number: int, start_step: int = 0, *, empty: bool = False) -> Generator[Batch, None, None]:
        """Start an epoch at any step, in the same time; decoding begins at once.

        Args:
            number: From 0. Order, crops and all other draws follow from (seed, number, record id).
            start_step: Batches of this rank to leave out at the beginning; they are not decoded.
            empty: Yield batches whose every row was skipped as well, so that steps can be counted.

        Returns:
            An iterator of batches. Its ``close`` drops the batches that are made ahead.

        Raises:
            PipelineError: The split is closed, or a number is out of range.
        """
        self._check_open()
        check_range("epoch", number, 0, MAX_EPOCH)
        check_range("start_step", start_step, 0, self.steps_per_epoch)
        order = self.order(number)
        self._reader.follow(
            lambda: order.positions[self._sampler.places(start_step)],
            (lambda: self.order(number + 1).positions) if self._training and number < MAX_EPOCH else None,
        )
        queue = (self._submit(number, order, self._sampler.span(step)) for step in range(start_step, len(self)))
        return self._results(queue, deque(islice(queue, self.prefetch)), empty)

    def order(self, number: int) -> EpochOrder:
        """Return the order of an epoch over all ranks."""
        table = self._table
        return epoch_order(self.order_kind, self.loading.seed, number, table.ids, table.shard, table.label)

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise PipelineError("the pipeline is closed, or was opened in another process")

    def _results(self, queue: Iterator[_Pending], ahead: deque[_Pending], empty: bool) -> Generator[Batch, None, None]:
        """Yield the batches made ahead, and take one more from the queue for each."""
        try:
            while ahead:
                self._check_open()
                batch = ahead[0].result()
                if bad := ahead.popleft().bad:
                    self._bad.add(bad)  # here, so that it does not depend on how far the threads are
                ahead.extend(islice(queue, 1))
                if empty or len(batch):  # evaluation may have skipped every row
                    yield batch
        finally:
            if self._process == os.getpid():
                for chunk in [chunk for pending in ahead for chunk in pending.chunks]:
                    chunk.cancel()

    def _submit(self, epoch: int, order: EpochOrder, span: slice) -> _Pending:
        """Hand the chunks of a batch to the threads."""
        places = np.arange(span.start, span.stop)
        self._reader.will_need(order.positions[span])
        starts, side = range(0, len(places), CHUNK_ROWS), self.options.image_size
        image = self._allocate(len(places), side, side, 3)
        batch = _Pending(epoch, order, places, image, len(starts))
        batch.chunks = [self._pool.submit(self._make_chunk, batch, start) for start in starts]
        return batch

    def _make_chunk(self, batch: _Pending, start: int) -> Batch | None:
        """Make one chunk; return the whole batch if this was its last chunk."""
        faults = self._make_rows(batch, slice(start, start + CHUNK_ROWS))
        with self._lock:
            batch.faults |= {start + row: why for row, why in faults.items()}
            batch.chunks_left -= 1
            last = batch.chunks_left == 0
        return self._finish(batch) if last else None

    def _make_rows(self, batch: _Pending, rows: slice) -> Faults:
        """Read, check and render rows of a batch; return the bad ones, counted from the first of these rows."""
        places = batch.places[rows]
        positions = batch.order.positions[places]
        laps = [time.perf_counter()]
        images, faults = self._read(positions)
        laps.append(time.perf_counter())
        self._check_digests(positions, images, faults)
        laps.append(time.perf_counter())
        rendered = render(
            images,
            np.stack([self._table.width[positions], self._table.height[positions]], axis=1),
            batch.order.keys(self._table.ids, places),
            self.options,
            self.loading.seed,
            batch.epoch,
            batch.image[rows],
            self._decoder,
            decoded=lambda: laps.append(time.perf_counter()),
        )
        laps.append(time.perf_counter())
        faults = rendered | faults
        read_s, check_s, decode_s, augment_s = (end - start for start, end in pairwise(laps))
        with self._lock:
            self.times += StageTimes(read_s, check_s, decode_s, augment_s, len(images) - len(faults))
        return faults

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
        """Replace or leave out bad rows, then mix.

        Raises:
            PipelineError: A row is bad, with ``on_error="raise"``.
        """
        image, places, options = batch.image, batch.places, self.options
        if batch.faults:
            positions = batch.order.positions[places]
            batch.bad |= {int(positions[row]): batch.faults[row] for row in sorted(batch.faults)}
            if self.loading.on_error == "raise":
                raise self._bad_record(batch)
            if self._whole:
                self._replace_bad_rows(batch)
            else:
                good = np.delete(np.arange(len(places)), list(batch.faults))
                image, places = image[good], places[good]
        positions = batch.order.positions[places]
        ids, label = self._table.ids[positions], self._table.label[positions]
        if isinstance(options, TrainOptions) and options.mixes:
            keys = batch.order.keys(self._table.ids, places)
            mixed, share = mix(options, image, self.loading.seed, batch.epoch, keys)
            return Batch(mixed, label, ids, label[::-1].copy(), share)
        return Batch(image, label, ids)

    def _bad_record(self, batch: _Pending) -> PipelineError:
        position, why = next(iter(batch.bad.items()))
        return PipelineError(
            f"{self._reader.where(position)}: the record is bad",
            got=why,
            remedy='restore the shard, or skip such records with on_error="skip" (mbv2 train: --on-bad-record skip)',
        )

    def _replace_bad_rows(self, batch: _Pending) -> None:
        """Put the next good record of the epoch's order in the place of each bad row.

        It does not depend on how the order is divided into batches and ranks. The record keeps its own label, id and
        draws, so a row is equal to the one at the record's own place, in this batch or another. If there are more bad
        records than may be skipped, the rows are undefined, and the caller gets the error in place of the batch.
        """
        positions = batch.order.positions
        for row in sorted(batch.faults):
            place = int(batch.places[row])
            for later in chain(range(place + 1, len(positions)), range(place)):
                if len(batch.bad) > self._bad.most:
                    return
                batch.places[row] = later
                fault = self._make_rows(batch, slice(row, row + 1))
                if not fault:
                    break
                batch.bad[int(positions[later])] = fault[0]
            else:
                raise self._bad.too_many(batch.bad)  # no record of this order is good


def open_batches(records: str | Path, split: str, options: Options, seed: int = 0, **loading: Any) -> Batches:
    """Open a split of a records folder for training or evaluation.

    Args:
        records: A folder with ``manifest.json``, or its URL (``s3://``, ``gs://``, ``https://``); then give ``cache``.
        split: ``train``, ``val`` or ``test``.
        options: :class:`~imnet_prep.loader.options.TrainOptions` (shuffled, random crops) or
            :class:`~imnet_prep.loader.options.EvalOptions` (in stored order, centre crops).
        seed: Key of every draw, together with the epoch and the record id.
        loading: Any field of :class:`~imnet_prep.loader.options.LoaderOptions`: ``workers``, ``rank``, ``ranks``,
            ``on_error``, ``order``, ``cache`` and others.

    Raises:
        RecordsError: The folder, the split, a shard or an index is missing or damaged.
        PipelineError: An argument is out of range, or the split does not fill one batch.
    """
    return Batches(records, split, options, LoaderOptions(seed, **loading))
