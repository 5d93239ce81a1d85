"""Measure how fast the loader is on this machine, where its time goes, and what limits it."""

import statistics
import time
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from imnet_prep.cpu import cpu_count
from imnet_prep.errors import PipelineError
from imnet_prep.types import Progress, ProgressCallback, StageTimes

if TYPE_CHECKING:
    from imnet_prep.loader.batches import Batches

MODES = ("train", "eval")
WINDOWS = 5  # parts of the measured time; their median counts
WARM_UP_S = 1.0
BUSY = 0.85  # a resource that is used more than this fraction of the time is the limit


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure.

    Attributes:
        mode: ``train`` (random crops, shuffled) or ``eval`` (centre crops, in order).
        batch_size: Rows of a batch.
        image_size: Side of the output, pixels.
        workers: Decode threads; None takes one per core that this process may use.
        seconds: How long to measure, after a warm-up of a second and the first batches.
        native: The C++ decoder: ``auto``, ``on`` or ``off``.
        cache: For records behind a URL: the folder in which shards are kept.
        cache_bytes: Most bytes to keep there.
    """

    mode: str = "train"
    batch_size: int = 64
    image_size: int = 224
    workers: int | None = None
    seconds: float = 10.0
    native: str = "auto"
    cache: Path | None = None
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PipelineError("unknown bench mode", expected=f"one of {', '.join(MODES)}", got=repr(self.mode))
        if not 0 < self.seconds <= 86_400:
            raise PipelineError("seconds is out of range", expected="more than 0, at most 86400", got=str(self.seconds))


@dataclass(frozen=True, slots=True)
class BenchResult:
    """What was measured. Times are worker time per image, all threads together.

    Attributes:
        images_per_s: Median over five windows.
        slowest: Images per second in the slowest window.
        fastest: Images per second in the fastest window.
        mode: ``train`` or ``eval``.
        split: The split that was read.
        batch_size: Rows of a batch.
        image_size: Side of the output, pixels.
        workers: Decode threads.
        decoder: Which decoder ran.
        read_ms: Milliseconds per image to read it.
        check_ms: Milliseconds per image to compare its digest.
        decode_ms: Milliseconds per image to decode and resize it.
        augment_ms: Milliseconds per image to augment it.
        cores: Cores that this process may use.
        cores_used_frac: Fraction of them that it used.
        memory_bytes: Bound on the decoded images held.
        limit: A sentence that says what limits the rate.
    """

    images_per_s: float
    slowest: float
    fastest: float
    mode: str
    split: str
    batch_size: int
    image_size: int
    workers: int
    decoder: str
    read_ms: float
    check_ms: float
    decode_ms: float
    augment_ms: float
    cores: int
    cores_used_frac: float
    memory_bytes: int
    limit: str


def bench(records: Path | str, options: BenchOptions, progress: ProgressCallback = lambda done: None) -> BenchResult:
    """Iterate :func:`~imnet_prep.loader.batches.open_batches` as training or evaluation does, and measure it.

    Raises:
        RecordsError: The folder is not usable.
        RemoteError: The URL cannot be read.
        PipelineError: An option is out of range, or a record is bad.
    """
    # Imported here, as the command line needs the options alone, and every worker process imports that again.
    from imnet_prep.loader.batches import open_batches
    from imnet_prep.loader.options import EvalOptions, TrainOptions
    from imnet_prep.records.elsewhere import open_records

    splits = open_records(records).manifest.splits
    wanted = ("train", "val", "test") if options.mode == "train" else ("val", "test", "train")
    split = next((name for name in wanted if name in splits and splits[name].images), wanted[0])
    output = (TrainOptions if options.mode == "train" else EvalOptions)(options.batch_size, options.image_size)
    how = {name: getattr(options, name) for name in ("workers", "native", "cache", "cache_bytes")}
    with open_batches(records, split, output, **how) as batches:
        return _measure(batches, options, progress)


def _measure(batches: "Batches", options: BenchOptions, progress: ProgressCallback) -> BenchResult:
    stream = chain.from_iterable(repeat(batches))  # each pass is the next epoch
    warm = time.perf_counter() + WARM_UP_S
    for number, _ in enumerate(stream):
        if number >= batches.prefetch and time.perf_counter() >= warm:
            break
    before, cpu, began = batches.times, time.process_time(), time.perf_counter()
    rates: list[float] = []
    total = 0
    for _ in range(WINDOWS):
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < options.seconds / WINDOWS:
            images += len(next(stream))
        rates.append(images / (time.perf_counter() - start))
        total += images
        progress(Progress(total, None))
    wall, used = time.perf_counter() - began, time.process_time() - cpu
    times, cores = batches.times - before, cpu_count()
    cores_used_frac = used / (wall * cores)
    made = max(1, times.images)
    return BenchResult(
        images_per_s=round(statistics.median(rates), 1),
        slowest=round(min(rates), 1),
        fastest=round(max(rates), 1),
        mode=options.mode,
        split=batches.split,
        batch_size=options.batch_size,
        image_size=options.image_size,
        workers=batches.workers,
        decoder=batches.decoder,
        read_ms=round(1e3 * times.read_s / made, 4),
        check_ms=round(1e3 * times.check_s / made, 4),
        decode_ms=round(1e3 * times.decode_s / made, 4),
        augment_ms=round(1e3 * times.augment_s / made, 4),
        cores=cores,
        cores_used_frac=round(cores_used_frac, 3),
        memory_bytes=batches.memory_bytes,
        limit=limit_sentence(times, wall, cores_used_frac, batches.workers, cores),
    )


def limit_sentence(times: StageTimes, wall_s: float, cores_used_frac: float, workers: int, cores: int) -> str:
    """Say what limits the rate.

    Args:
        times: Worker time by stage.
        wall_s: How long it was measured, seconds.
        cores_used_frac: Processor time over cores and wall time, 0 to 1.
        workers: Decode threads.
        cores: Cores that this process may use.
    """
    stages = {
        "reading": times.read_s,
        "checking digests": times.check_s,
        "decoding": times.decode_s,
        "augmenting": times.augment_s,
    }
    spent = sum(stages.values())
    largest = max(stages, key=lambda name: stages[name])
    busy = spent / (wall_s * workers)
    part = f"{largest} takes {stages[largest] / max(spent, 1e-9):.0%} of the workers' time"
    if cores_used_frac >= BUSY:
        return f"The cores limit it: {cores_used_frac:.0%} of {cores} are in use, and {part}."
    if busy < BUSY:
        return f"The caller limits it: the workers wait {1 - busy:.0%} of the time for batches to be taken."
    if largest == "reading":
        return f"The storage limits it: {part}, and {cores_used_frac:.0%} of {cores} cores are in use."
    if workers < cores:
        return f"The number of workers limits it: {workers} for {cores} cores, and {part}."
    return (
        f"Other work on this machine limits it: the workers are busy but get only {cores_used_frac:.0%} of the cores."
    )
