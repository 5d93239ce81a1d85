"""Colour jitter, RandAugment and TrivialAugment on uint8 images, with OpenCV, in place.

Operations, ranges and order are those of torchvision's ColorJitter, RandAugment and TrivialAugmentWide. Geometric
operations interpolate bilinearly and fill with ImageNet's mean colour, as timm's do.
"""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imnet_prep.loader.augment import MEAN_COLOUR
from imnet_prep.loader.options import TrainOptions
from imnet_prep.loader.random_numbers import Stream, uniforms

Pixels = NDArray[np.uint8]
Operation = Callable[[Pixels, float], Pixels]
MAX_MAGNITUDE = 30  # of 31 steps
_LEVELS = np.arange(256, dtype=np.float64)


def augment_colours(options: TrainOptions, image: Pixels, seed: int, epoch: int, ids: NDArray[np.uint64]) -> None:
    """Apply RandAugment or TrivialAugment, then colour jitter.

    Args:
        options: ``randaugment_ops``, ``randaugment_magnitude``, ``trivialaugment``, ``color_jitter``.
        image: uint8 (N, H, W, 3) RGB, changed in place.
        seed: Of the run.
        epoch: From 0.
        ids: uint64 (N,), record ids.
    """
    operations = uniforms(seed, epoch, ids, np.arange(Stream.RANDAUGMENT, Stream.RANDAUGMENT + options.randaugment_ops))
    trivial = uniforms(seed, epoch, ids, Stream.TRIVIALAUGMENT) if options.trivialaugment else None
    factors = uniforms(seed, epoch, ids, Stream.COLOUR)
    order = uniforms(seed, epoch, ids, Stream.COLOUR_ORDER).argsort(axis=1)
    for row in range(len(image)):
        pixels = image[row]
        for draw in operations[row]:
            pixels = randaugment_step(pixels, draw, options.randaugment_magnitude)
        if trivial is not None:
            name, magnitude = trivialaugment_choice(trivial[row])
            pixels = TRIVIALAUGMENT[name](pixels, magnitude)
        if any(options.color_jitter):
            pixels = _jitter(pixels, options.color_jitter, factors[row], order[row])
        image[row] = pixels


def _jitter(
    pixels: Pixels, strengths: tuple[float, ...], drawn: NDArray[np.float64], order: NDArray[np.int64]
) -> Pixels:
    """Change brightness, contrast and saturation by 1 +- strength and hue by 0 +- strength, in a drawn order."""
    for which in order.tolist():
        change = (2.0 * float(drawn[which]) - 1.0) * strengths[which]
        if which == 3 and change:
            pixels = hue(pixels, change)
        elif change:
            pixels = (brightness, contrast, saturation)[which](pixels, 1.0 + change)
    return pixels


def _look_up(pixels: Pixels, levels: NDArray[np.float64]) -> Pixels:
    """Map each value through 256 levels."""
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(pixels, table), dtype=np.uint8)


def _grey(pixels: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """Blend with black: 0 is black, 1 the image."""
    return _look_up(pixels, _LEVELS * factor)


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the mean grey: 0 is flat, 1 the image."""
    mean = float(cv2.mean(_grey(pixels))[0])
    return _look_up(pixels, factor * _LEVELS + (1.0 - factor) * mean)


def saturation(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the grey image: 0 is grey, 1 the image."""
    grey = cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(pixels, factor, grey, 1.0 - factor, 0.0), dtype=np.uint8)


def hue(pixels: Pixels, turn: float) -> Pixels:
    """Turn the hue by a fraction of the full circle."""
    found = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    found[..., 0] += np.uint8(round(turn * 256) % 256)
    return np.asarray(cv2.cvtColor(found, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Blend with a smoothed image, the border left alone: 0 is smooth, 1 the image."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13.0
    smooth = cv2.filter2D(pixels, -1, kernel)
    blended = np.asarray(cv2.addWeighted(pixels, factor, smooth, 1.0 - factor, 0.0), dtype=np.uint8)
    result = pixels.copy()
    result[1:-1, 1:-1] = blended[1:-1, 1:-1]
    return result


def posterize(pixels: Pixels, kept_bits: int) -> Pixels:
    """Keep the highest bits of each value."""
    return np.asarray(pixels & np.uint8((0xFF << (8 - kept_bits)) & 0xFF), dtype=np.uint8)


def solarize(pixels: Pixels, threshold: float) -> Pixels:
    """Invert the values from a threshold on."""
    return _look_up(pixels, np.where(threshold <= _LEVELS, 255.0 - _LEVELS, _LEVELS))


def autocontrast(pixels: Pixels) -> Pixels:
    """Stretch each channel to 0..255."""
    result = np.empty_like(pixels)
    for channel in range(3):
        values = pixels[..., channel]
        low, high = float(values.min()), float(values.max())
        stretched = (_LEVELS - low) * (255.0 / (high - low)) if high > low else _LEVELS
        result[..., channel] = _look_up(np.ascontiguousarray(values), stretched)
    return result


def equalize(pixels: Pixels) -> Pixels:
    """Even out each channel's histogram."""
    return np.stack([cv2.equalizeHist(np.ascontiguousarray(pixels[..., channel])) for channel in range(3)], axis=-1)


def _equalize_as_pillow(pixels: Pixels) -> Pixels:
    """Even out each channel's histogram with Pillow's steps, which are coarser than OpenCV's in small images."""
    return np.asarray(ImageOps.equalize(Image.fromarray(pixels)))


def warp(pixels: Pixels, matrix: list[list[float]]) -> Pixels:
    """Apply an affine map (2 x 3, output to input, about the centre)."""
    height, width = pixels.shape[:2]
    (a, b, x), (c, d, y) = matrix
    cx, cy = (width - 1) / 2.0, (height - 1) / 2.0
    shifted = np.array([[a, b, x + cx - a * cx - b * cy], [c, d, y + cy - c * cx - d * cy]], dtype=np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(pixels, shifted, (width, height), flags=flags, borderValue=MEAN_COLOUR), np.uint8)


def _rotate(pixels: Pixels, degrees: float) -> Pixels:
    turn = np.deg2rad(degrees)
    return warp(pixels, [[np.cos(turn), np.sin(turn), 0.0], [-np.sin(turn), np.cos(turn), 0.0]])


def _operations(
    *,
    shear: float,
    pivot: float,
    rotate_deg: float,
    translate: Callable[[int, float], float],
    enhance: float,
    lost_bits: int,
) -> dict[str, Operation]:
    """Return operations by name. Each takes the image and the magnitude, -1 to 1.

    The magnitude's sign is drawn; operations without a direction ignore it.

    Args:
        shear: Pixels per row or column, at the highest magnitude; so are those below.
        pivot: Where a shear is fixed: 0 at the centre, 0.5 at the top left corner.
        rotate_deg: Degrees.
        translate: Pixels, by side and magnitude.
        enhance: Change of the factor of brightness, colour, contrast and sharpness.
        lost_bits: Bits that posterizing takes.
    """

    def shear_x(pixels: Pixels, m: float) -> Pixels:
        return warp(pixels, [[1.0, shear * m, pivot * pixels.shape[0] * shear * m], [0.0, 1.0, 0.0]])

    def shear_y(pixels: Pixels, m: float) -> Pixels:
        return warp(pixels, [[1.0, 0.0, 0.0], [shear * m, 1.0, pivot * pixels.shape[1] * shear * m]])

    return {
        "identity": lambda pixels, _: pixels,
        "shear_x": shear_x,
        "shear_y": shear_y,
        "translate_x": lambda pixels, m: warp(pixels, [[1.0, 0.0, translate(pixels.shape[1], m)], [0.0, 1.0, 0.0]]),
        "translate_y": lambda pixels, m: warp(pixels, [[1.0, 0.0, 0.0], [0.0, 1.0, translate(pixels.shape[0], m)]]),
        "rotate": lambda pixels, m: _rotate(pixels, rotate_deg * m),
        "brightness": lambda pixels, m: brightness(pixels, 1.0 + enhance * m),
        "color": lambda pixels, m: saturation(pixels, 1.0 + enhance * m),
        "contrast": lambda pixels, m: contrast(pixels, 1.0 + enhance * m),
        "sharpness": lambda pixels, m: sharpness(pixels, 1.0 + enhance * m),
        "posterize": lambda pixels, m: posterize(pixels, 8 - round(lost_bits * abs(m))),
        "solarize": lambda pixels, m: solarize(pixels, 255.0 * (1.0 - abs(m))),
        "autocontrast": lambda pixels, _: autocontrast(pixels),
        "equalize": lambda pixels, _: equalize(pixels),
    }


RANDAUGMENT = _operations(
    shear=0.3, pivot=0.0, rotate_deg=30.0, translate=lambda side, m: 150 / 331 * side * m, enhance=0.9, lost_bits=4
)
TRIVIALAUGMENT: dict[str, Operation] = {  # torchvision's TrivialAugmentWide
    **_operations(
        shear=0.99, pivot=0.5, rotate_deg=135.0, translate=lambda _, m: float(int(32 * m)), enhance=0.99, lost_bits=6
    ),
    "solarize": lambda pixels, m: solarize(pixels, 255.0 - 255.0 * abs(m)),
    "equalize": lambda pixels, _: _equalize_as_pillow(pixels),
}


def randaugment_step(pixels: Pixels, draw: NDArray[np.float64], magnitude: float) -> Pixels:
    """Apply one operation of RandAugment, drawn evenly, with a drawn sign.

    Args:
        pixels: uint8 (H, W, 3).
        draw: float64 (4,) in (0, 1): the operation, the sign; two unused.
        magnitude: 0 to 30.

    Source: Cubuk et al., "RandAugment", 2019.
    """
    operation = list(RANDAUGMENT.values())[int(draw[0] * len(RANDAUGMENT))]
    sign = 1.0 if draw[1] < 0.5 else -1.0
    return operation(pixels, sign * magnitude / MAX_MAGNITUDE)


def trivialaugment_choice(draw: NDArray[np.float64]) -> tuple[str, float]:
    """Draw the one operation of TrivialAugment: its name and magnitude, evenly, and a sign.

    Args:
        draw: float64 (4,) in (0, 1): the operation, the magnitude, the sign; one unused.

    Source: Müller and Hutter, "TrivialAugment", 2021.
    """
    name = list(TRIVIALAUGMENT)[int(draw[0] * len(TRIVIALAUGMENT))]
    sign = 1.0 if draw[2] < 0.5 else -1.0
    return name, sign * int(draw[1] * (MAX_MAGNITUDE + 1)) / MAX_MAGNITUDE
