"""Options of the loader: what is done to an image, and how a split is read. Each is checked when it is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import PipelineError
from imnet_prep.images.batch_decoder import INTERPOLATIONS
from imnet_prep.loader.order import ORDERS
from imnet_prep.loader.random_numbers import MAX_EPOCH, MAX_SEED

MAX_IMAGE_SIZE = 4096
EVAL_CROP_FRACTION = 224 / 256  # the usual centre crop: 224 of a short side of 256
ON_ERROR = ("raise", "skip")
NATIVE = ("auto", "on", "off")
CHECKS = ("first", "always", "never")
AHEAD_BYTES = 1 << 30  # of decoded images that a machine makes ahead
SKIPPED_FRAC, SKIPPED_LEAST = 0.001, 3  # bad records that may be skipped if the caller does not say


def check(valid: bool, name: str, expected: str, got: object) -> None:
    """Raise a PipelineError that names an option, unless its value is valid."""
    if not valid:
        raise PipelineError(f"{name} is out of range", expected=expected, got=repr(got))


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise a PipelineError unless ``low <= value <= high``."""
    check(low <= value <= high, name, f"{low} to {high}", value)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise a PipelineError that lists the known choices, unless the value is one of them."""
    if value not in known:
        raise PipelineError(f"unknown {name}", expected=f"one of {', '.join(known)}", got=repr(value))


def _check_output(batch_size: int, image_size: int, interpolation: str) -> None:
    check(isinstance(batch_size, int) and batch_size >= 1, "batch_size", "a whole number from 1 on", batch_size)
    check(
        isinstance(image_size, int) and 1 <= image_size <= MAX_IMAGE_SIZE,
        "image_size",
        f"1 to {MAX_IMAGE_SIZE} pixels",
        image_size,
    )
    check_choice("interpolation", interpolation, INTERPOLATIONS)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How training images are made. The defaults are those of torchvision's reference scripts.

    Attributes:
        batch_size: Rows of a batch on one rank.
        image_size: Side of the square output, pixels.
        scale: Range of the crop's area as a fraction of the image's; uniform.
        ratio: Range of the crop's width / height; log-uniform.
        interpolation: One of :data:`~imnet_prep.images.batch_decoder.INTERPOLATIONS`.
        flip_prob: Probability of a horizontal flip.
        color_jitter: Strengths of brightness, contrast, saturation (factors in 1 +- strength) and hue (in turns).
        randaugment_ops: RandAugment operations per image; 0 is off.
        randaugment_magnitude: Their strength, 0 to 30.
        trivialaugment: One operation of TrivialAugment per image, in place of RandAugment.
        erasing_prob: Probability that a box is erased.
        erasing_scale: Range of the box's area as a fraction of the output's.
        erasing_ratio: Range of the box's width / height.
        mixup_alpha: Beta parameter of MixUp; 0 is off. With CutMix on too, each batch draws one of them.
        cutmix_alpha: Beta parameter of CutMix; 0 is off.
        mixup_prob: Probability that a batch is mixed, by either.
        mixup_last_epoch: Last epoch, counted from 1, whose batches are mixed, by either; 0 mixes all.
        drop_last: Leave out the records that do not fill a batch on every rank; each epoch leaves out others.
    """

    batch_size: int
    image_size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip_prob: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    randaugment_ops: int = 0
    randaugment_magnitude: float = 9.0
    trivialaugment: bool = False
    erasing_prob: float = 0.0
    erasing_scale: tuple[float, float] = (0.02, 1 / 3)
    erasing_ratio: tuple[float, float] = (0.3, 3.3)
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mixup_prob: float = 1.0
    mixup_last_epoch: int = 0
    drop_last: bool = True

    def __post_init__(self) -> None:
        _check_output(self.batch_size, self.image_size, self.interpolation)
        for name, most in (("scale", 1.0), ("erasing_scale", 1.0), ("ratio", 100.0), ("erasing_ratio", 100.0)):
            low, high = getattr(self, name)
            check(0 < low <= high <= most, name, f"0 < low <= high <= {most:g}", (low, high))
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            check(isfinite(value) and value >= 0, name, "0 or more", value)
        limits = {"flip_prob": 1, "erasing_prob": 1, "randaugment_ops": 16, "randaugment_magnitude": 30}
        for name, limit in (limits | {"mixup_prob": 1, "mixup_last_epoch": MAX_EPOCH}).items():
            check_range(name, getattr(self, name), 0, limit)
        both = self.trivialaugment and self.randaugment_ops
        check(not both, "randaugment_ops", "0 with trivialaugment", self.randaugment_ops)
        jitter = self.color_jitter
        check(
            len(jitter) == 4 and all(0 <= value <= 1 for value in jitter[:3]) and 0 <= jitter[3] <= 0.5,
            "color_jitter",
            "4 strengths: brightness, contrast, saturation from 0 to 1, hue from 0 to 0.5",
            jitter,
        )

    @property
    def mixes(self) -> bool:
        """Whether the rows of a batch are mixed, by MixUp or CutMix."""
        return bool(self.mixup_alpha or self.cutmix_alpha)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """How evaluation images are made: short side resized to ``resize``, centre crop of ``image_size``, antialiased.

    Attributes:
        batch_size: Rows of a batch on one rank; the last may be short.
        image_size: Side of the square output, pixels.
        resize: Short side before the crop, pixels; None keeps the crop at 224 / 256 of it.
        interpolation: One of :data:`~imnet_prep.images.batch_decoder.INTERPOLATIONS`.
    """

    batch_size: int
    image_size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _check_output(self.batch_size, self.image_size, self.interpolation)
        check(
            self.resize is None or self.image_size <= self.resize <= 2 * MAX_IMAGE_SIZE,
            "resize",
            f"image_size ({self.image_size}) to {2 * MAX_IMAGE_SIZE} pixels",
            self.resize,
        )

    @property
    def short_side(self) -> int:
        """The short side before the crop, pixels."""
        return self.resize if self.resize is not None else round(self.image_size / EVAL_CROP_FRACTION)


Options = TrainOptions | EvalOptions


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """How a split is read: keys, threads, ranks, order, and what to do with bad records.

    Attributes:
        seed: Key of every draw, together with the epoch and the record id.
        workers: Decode threads; None takes one per core that this process may use, divided by ``local_ranks``.
        rank: This rank, from 0.
        ranks: Number of ranks; each record goes to exactly one.
        local_ranks: Ranks on this machine, which share its cores and the memory for batches that are made ahead.
        on_error: ``raise`` at a bad record, or ``skip`` it: evaluation leaves it out, and training in whole batches
            puts the next good record of the epoch's order in its place.
        max_skipped: Different bad records that may be skipped; None takes 0.1 % of the split, at least 3.
        order: Order of training: ``global`` shuffles all records, ``blocks`` takes one shard after another, which suits
            storage where random reads are slow, ``sequential`` is as stored, ``balanced`` draws as many records, each
            class equally often. None is ``global`` for a folder and ``blocks`` for a URL. Evaluation is always as
            stored.
        native: Use the C++ decoder where it is built (``auto``), insist on it (``on``), or decline it (``off``).
        check: Compare each image with its SHA-256 at its ``first`` reading, ``always`` or ``never``.
        prefetch: Batches that are made ahead; None queues a chunk of 32 rows per worker, at least 2 batches, and beyond
            those at most :data:`AHEAD_BYTES` for all ranks of this machine together.
        allocate: Returns an undefined uint8 array of the shape that its arguments are (N, H, W, 3), for the images of a
            batch; None allocates memory that is used again once no array shares it.
        cache: For records behind a URL: the folder in which this machine's ranks keep shards.
        cache_bytes: Most bytes to keep there; None takes nine tenths of what is free on its disk.
    """

    seed: int = 0
    workers: int | None = None
    rank: int = 0
    ranks: int = 1
    local_ranks: int = 1
    on_error: str = "raise"
    max_skipped: int | None = None
    order: str | None = None
    native: str = "auto"
    check: str = "first"
    prefetch: int | None = None
    allocate: Callable[[int, int, int, int], NDArray[np.uint8]] | None = None
    cache: Path | str | None = None
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("on_error", ON_ERROR), ("native", NATIVE), ("check", CHECKS)):
            check_choice(name, getattr(self, name), known)
        check_choice("order", self.order or "global", ORDERS)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("ranks", self.ranks, 1, 1 << 20)
        check_range("rank", self.rank, 0, self.ranks - 1)
        check_range("local_ranks", self.local_ranks, 1, 1 << 20)
        check_range("max_skipped", self.max_skipped or 0, 0, 1 << 40)
        check_range("workers", 1 if self.workers is None else self.workers, 1, 1024)
        check_range("prefetch", 1 if self.prefetch is None else self.prefetch, 1, 1 << 16)
