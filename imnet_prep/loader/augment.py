"""Random crops, flips, erased boxes and mixes, and the centre crop of evaluation.

All draws are keyed by (seed, epoch, record id) and made in NumPy, so both decoders get the same ones.
"""

import numpy as np
from numpy.typing import NDArray

from imnet_prep.images.batch_decoder import Geometry
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.loader.random_numbers import Stream, uniforms

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
ERASE_ATTEMPTS = 10  # torchvision's and timm's RandomErasing
MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean RGB, which the network's normalisation turns into about 0


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
        scale: Range of the area as a fraction of the image's.
        ratio: Range of the width / height.
        width: float64 (N,), pixels.
        height: float64 (N,), pixels.
        margin: Pixels by which a box must be smaller than the image.

    Returns:
        Left, top, width and height in whole pixels, float64 (4, N); and bool (N,), whether any attempt fitted.
    """
    area = (width * height)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[..., 1])
    wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (wide > 0) & (wide <= width[:, None] - margin) & (tall > 0) & (tall <= height[:, None] - margin)
    first = np.arange(len(draws)), fits.argmax(axis=1)
    wide, tall, place = wide[first], tall[first], draws[first]
    left, top = np.floor(place[:, 2] * (width - wide + 1)), np.floor(place[:, 3] * (height - tall + 1))
    return np.stack([left, top, wide, tall]), fits[first]


def train_geometry(
    options: TrainOptions, sizes: NDArray[np.int32], seed: int, epoch: int, ids: NDArray[np.uint64]
) -> Geometry:
    """Draw RandomResizedCrop and the flip.

    If none of ten attempts fits, the crop is the largest central one with an allowed aspect.

    Args:
        options: The ranges.
        sizes: int32 (N, 2), width and height of each image, pixels.
        seed: Of the run.
        epoch: From 0.
        ids: uint64 (N,), record ids.

    Returns:
        Whole-pixel crops; pixels outside a crop are not used.

    Source: Szegedy et al., "Going deeper with convolutions", 2014, section 6; torchvision's RandomResizedCrop.
    """
    draws = uniforms(seed, epoch, ids, (Stream.FLIP, *range(Stream.CROP, Stream.CROP + CROP_ATTEMPTS)))
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
        Boxes with fractions of a pixel; the filter may use pixels beside them, as in a resize of the whole image.

    Source: torchvision's Resize (the long side is rounded down) and CenterCrop (the margin is rounded to even).
    """
    sides = sizes.astype(np.int64)
    resized = options.short_side * sides // sides.min(axis=1, keepdims=True)
    start = np.rint((resized - options.image_size) / 2.0)
    scale = sides / resized
    box = np.concatenate([start * scale, (start + options.image_size) * scale], axis=1)
    limits = np.concatenate([np.zeros_like(sides), sides], axis=1).astype(np.int32)
    inside = np.minimum(box, np.tile(sides, 2))  # rounding may exceed the last pixel
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
        options: ``mixup_alpha``, ``cutmix_alpha``; with both on, the batch's first record draws which. It also draws
            whether the batch is mixed (``mixup_prob``); those after epoch ``mixup_last_epoch`` are not.
        image: uint8 (N, H, W, 3).
        seed: Of the run.
        epoch: From 0.
        ids: uint64 (N,), record ids.

    Returns:
        The mixed images, and float32 (N,), the share of each row's own label: 1 in a batch that is not mixed.

    Source: Zhang et al., "mixup", 2017; Yun et al., "CutMix", 2019 (the share is that of the pixels kept).
    """
    if not _is_mixed(options, seed, epoch, ids):
        return image, np.ones(len(image), np.float32)
    from scipy.special import betaincinv  # the inverse of Beta's distribution; 0.1 s to import, so not with the module

    drawn = uniforms(seed, epoch, ids, Stream.MIX)
    cut = options.cutmix_alpha > 0 and (options.mixup_alpha == 0 or drawn[0, 3] < 0.5)
    alpha = options.cutmix_alpha if cut else options.mixup_alpha
    share = np.clip(betaincinv(alpha, alpha, drawn[:, 0]), 0.0, 1.0)
    return _cut(image, share, drawn) if cut else _blend(image, share), share.astype(np.float32)


def _is_mixed(options: TrainOptions, seed: int, epoch: int, ids: NDArray[np.uint64]) -> bool:
    if 0 < options.mixup_last_epoch <= epoch:
        return False
    return bool(uniforms(seed, epoch, ids[:1], Stream.MIX_CHANCE)[0, 0] < options.mixup_prob)


def _blend(image: NDArray[np.uint8], share: NDArray[np.float64]) -> NDArray[np.uint8]:
    import cv2

    mixed = np.empty_like(image)
    for row, own in enumerate(share.tolist()):
        cv2.addWeighted(image[row], own, image[len(image) - 1 - row], 1.0 - own, 0.0, dst=mixed[row])
    return mixed


def _cut(image: NDArray[np.uint8], share: NDArray[np.float64], drawn: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Paste the partner's box, and set ``share`` to the fraction of pixels kept."""
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
