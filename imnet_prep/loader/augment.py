"""What happens to an image between its bytes and the batch: options, and the draws behind each crop, flip, box and mix.

All draws are keyed by (seed, epoch, record id) and made here, in NumPy, for both decoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import PipelineError
from imnet_prep.images.decode import INTERPOLATIONS, Geometry
from imnet_prep.loader.random_numbers import Stream, uniforms

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
ERASE_ATTEMPTS = 10  # torchvision's and timm's RandomErasing
MAX_IMAGE_SIZE = 4096
# Erased pixels take ImageNet's mean colour, which the network's normalisation turns into about 0, as the references do.
ERASE_FILL = (124, 116, 104)
EVAL_CROP_FRACTION = 224 / 256  # the field's centre crop: 224 of a short side of 256


def _check(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise PipelineError(f"pipeline option {name} is out of range", expected=expected, got=repr(got))


def _check_common(batch_size: int, image_size: int, interpolation: str) -> None:
    _check(isinstance(batch_size, int) and batch_size >= 1, "batch_size", "a whole number from 1 on", batch_size)
    _check(
        isinstance(image_size, int) and 1 <= image_size <= MAX_IMAGE_SIZE,
        "image_size",
        f"1 to {MAX_IMAGE_SIZE} pixels",
        image_size,
    )
    _check(interpolation in INTERPOLATIONS, "interpolation", f"one of {', '.join(INTERPOLATIONS)}", interpolation)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How training images are made. The defaults are torchvision's references'.

    Attributes:
        batch_size: Rows of a batch on one rank.
        image_size: Side of the square output, pixels.
        scale: Range of the crop's area as a fraction of the image's; uniform.
        ratio: Range of the crop's width / height; log-uniform.
        interpolation: One of :data:`INTERPOLATIONS`.
        flip_prob: Probability of a horizontal flip.
        color_jitter: Strengths of brightness, contrast, saturation (factors in 1 +- strength) and hue (in turns).
        randaugment_ops: Operations of RandAugment an image; 0 is off.
        randaugment_magnitude: Their strength, 0 to 30.
        erasing_prob: Probability that a box is erased. erasing_scale, erasing_ratio: its area and aspect ranges.
        mixup_alpha: Beta parameter of MixUp; 0 is off. cutmix_alpha: of CutMix. With both, each batch draws one.
        drop_last: Leave out what does not fill a batch on every rank; other records each epoch.
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
    erasing_prob: float = 0.0
    erasing_scale: tuple[float, float] = (0.02, 1 / 3)
    erasing_ratio: tuple[float, float] = (0.3, 3.3)
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    drop_last: bool = True

    def __post_init__(self) -> None:
        _check_common(self.batch_size, self.image_size, self.interpolation)
        for name, most in (("scale", 1.0), ("erasing_scale", 1.0), ("ratio", 100.0), ("erasing_ratio", 100.0)):
            low, high = getattr(self, name)
            _check(0 < low <= high <= most, name, f"0 < low <= high <= {most:g}", (low, high))
        for name in ("flip_prob", "erasing_prob"):
            _check(0 <= getattr(self, name) <= 1, name, "0 to 1", getattr(self, name))
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            _check(isfinite(value) and value >= 0, name, "0 or more", value)
        jitter = self.color_jitter
        _check(
            len(jitter) == 4 and all(0 <= value <= 1 for value in jitter[:3]) and 0 <= jitter[3] <= 0.5,
            "color_jitter",
            "4 strengths: brightness, contrast, saturation from 0 to 1, hue from 0 to 0.5",
            jitter,
        )
        _check(0 <= self.randaugment_ops <= 16, "randaugment_ops", "0 to 16", self.randaugment_ops)
        _check(0 <= self.randaugment_magnitude <= 30, "randaugment_magnitude", "0 to 30", self.randaugment_magnitude)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """How evaluation images are made: short side to ``resize``, centre crop of ``image_size``, antialiased.

    Attributes:
        batch_size: Rows of a batch on one rank; the last may be short.
        image_size: Side of the square output, pixels.
        resize: Short side before the crop, pixels; None keeps the crop at 224 / 256 of it.
        interpolation: One of :data:`INTERPOLATIONS`.
    """

    batch_size: int
    image_size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _check_common(self.batch_size, self.image_size, self.interpolation)
        _check(
            self.resize is None or self.image_size <= self.resize <= 2 * MAX_IMAGE_SIZE,
            "resize",
            f"image_size ({self.image_size}) to {2 * MAX_IMAGE_SIZE} pixels",
            self.resize,
        )

    @property
    def short_side(self) -> int:
        """The short side before the crop, pixels."""
        return self.resize if self.resize is not None else round(self.image_size / EVAL_CROP_FRACTION)


def crop_draws(seed: int, epoch: int, ids: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Make the draws behind a crop and a flip, whatever the image's size: float64 (N, 1 + attempts, 4)."""
    return uniforms(seed, epoch, ids, (Stream.FLIP, *range(Stream.CROP, Stream.CROP + CROP_ATTEMPTS)))


def _boxes(
    draws: NDArray[np.float64],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    width: NDArray[np.float64],
    height: NDArray[np.float64],
    margin: int,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Draw a box in each image: the area uniform, the aspect log-uniform; the first that fits is placed uniformly.

    Args:
        draws: float64 (N, attempts, 4).
        scale: Range of the area as a fraction of the image's. ratio: Range of the width / height.
        width: float64 (N,), pixels. height: Likewise.
        margin: Pixels by which a box must be smaller than the image.

    Returns:
        Left, top, width and height in whole pixels, float64 (4, N), and bool (N,), whether any attempt fitted.
    """
    area = (width * height)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[..., 1])
    wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (wide > 0) & (wide <= width[:, None] - margin) & (tall > 0) & (tall <= height[:, None] - margin)
    pick = np.arange(len(draws)), fits.argmax(axis=1)
    wide, tall = wide[pick], tall[pick]
    left = np.floor(draws[..., 2][pick] * (width - wide + 1))
    top = np.floor(draws[..., 3][pick] * (height - tall + 1))
    return np.stack([left, top, wide, tall]), fits[pick]


def train_geometry(options: TrainOptions, sizes: NDArray[np.int32], draws: NDArray[np.float64]) -> Geometry:
    """Place RandomResizedCrop and the flip.

    Ten attempts; if none fits, the largest central crop with an allowed aspect.

    Args:
        options: The ranges.
        sizes: int32 (N, 2), width and height of each image, pixels.
        draws: float64 (N, 1 + attempts, 4), from :func:`crop_draws`.

    Returns:
        Whole-pixel crops; nothing outside a crop is looked at.

    Source: Szegedy et al., "Going deeper with convolutions", 2014, section 6; torchvision's RandomResizedCrop.
    """
    width, height = sizes.T.astype(np.float64)
    (left, top, wide, tall), fits = _boxes(draws[:, 1:], options.scale, options.ratio, width, height, margin=0)
    if not fits.all():
        wide = np.where(fits, wide, np.minimum(width, np.maximum(1, np.rint(height * options.ratio[1]))))
        tall = np.where(fits, tall, np.minimum(height, np.maximum(1, np.rint(width / options.ratio[0]))))
        left, top = np.where(fits, left, (width - wide) // 2), np.where(fits, top, (height - tall) // 2)
    limits = np.stack([left, top, left + wide, top + tall], axis=1)
    return Geometry(sizes, limits.astype(np.int32), limits, draws[:, 0, 0] < options.flip_prob)


def eval_geometry(options: EvalOptions, sizes: NDArray[np.int32]) -> Geometry:
    """Return the centre crop of the image resized to a short side, as a rectangle of the original.

    Args:
        options: Sizes.
        sizes: int32 (N, 2), width and height of each image, pixels.

    Returns:
        Boxes in parts of a pixel; the resize filter may look at pixels beside them, as in a resize of the whole image.

    Source: torchvision's Resize (the long side is rounded down) and CenterCrop (the margin is rounded to even).
    """
    sides = sizes.astype(np.int64)
    resized = options.short_side * sides // sides.min(axis=1, keepdims=True)
    start = np.rint((resized - options.image_size) / 2.0)
    scale = sides / resized
    box = np.concatenate([start * scale, (start + options.image_size) * scale], axis=1)
    limits = np.concatenate([np.zeros_like(sides), sides], axis=1).astype(np.int32)
    inside = np.minimum(box, np.tile(sides, 2))  # rounding may lead beyond the last pixel
    return Geometry(sizes, limits, inside, np.zeros(len(sizes), dtype=np.bool_))


def erase_boxes(options: TrainOptions, seed: int, epoch: int, ids: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Draw the boxes of random erasing.

    Returns:
        int32 (N, 4), left, top, right, bottom in the output; empty (zeros) where nothing is erased.

    Source: Zhong et al., "Random erasing data augmentation", 2017.
    """
    side = np.full(len(ids), float(options.image_size))
    draws = uniforms(seed, epoch, ids, np.arange(Stream.ERASE_BOX, Stream.ERASE_BOX + ERASE_ATTEMPTS))
    (left, top, wide, tall), fits = _boxes(draws, options.erasing_scale, options.erasing_ratio, side, side, margin=1)
    erased = fits & (uniforms(seed, epoch, ids, Stream.ERASE)[:, 0] < options.erasing_prob)
    return np.where(erased[:, None], np.stack([left, top, left + wide, top + tall], axis=1), 0).astype(np.int32)


def mix(
    options: TrainOptions, image: NDArray[np.uint8], seed: int, epoch: int, ids: NDArray[np.uint64]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Apply MixUp or CutMix to a batch: row i is mixed with row N-1-i, each with its own share.

    Args:
        options: ``mixup_alpha``, ``cutmix_alpha``; with both on, the batch's first record draws which (one in two).
        image: uint8 (N, H, W, 3).
        seed: Of the run. epoch: From 0. ids: uint64 (N,).

    Returns:
        The mixed images, a new array, and float32 (N,), the share of each row's own label.

    Source: Zhang et al., "mixup", 2017; Yun et al., "CutMix", 2019 (the share is that of the pixels kept).
    """
    from scipy.special import betaincinv  # the inverse of Beta's distribution; 0.1 s to import, so not with the module

    drawn = uniforms(seed, epoch, ids, Stream.MIX)
    cut = options.cutmix_alpha > 0 and (options.mixup_alpha == 0 or drawn[0, 3] < 0.5)
    alpha = options.cutmix_alpha if cut else options.mixup_alpha
    share = np.clip(betaincinv(alpha, alpha, drawn[:, 0]), 0.0, 1.0)
    return _cut(image, share, drawn) if cut else _blend(image, share), share.astype(np.float32)


def _blend(image: NDArray[np.uint8], share: NDArray[np.float64]) -> NDArray[np.uint8]:
    import cv2

    mixed = np.empty_like(image)
    for row, own in enumerate(share.tolist()):
        cv2.addWeighted(image[row], own, image[len(image) - 1 - row], 1.0 - own, 0.0, dst=mixed[row])
    return mixed


def _cut(image: NDArray[np.uint8], share: NDArray[np.float64], drawn: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Paste the partner's box; ``share`` is set to the pixels kept."""
    height, width = image.shape[1:3]
    mixed = image.copy()
    for row in range(len(image)):
        side = np.sqrt(1.0 - share[row])
        tall, wide = int(height * side), int(width * side)
        y, x = int(drawn[row, 1] * height), int(drawn[row, 2] * width)
        top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
        left, right = max(0, x - wide // 2), min(width, x + wide // 2)
        mixed[row, top:bottom, left:right] = image[len(image) - 1 - row, top:bottom, left:right]
        share[row] = 1.0 - (bottom - top) * (right - left) / (height * width)
    return mixed
