"""What foreign weights expect of their input, told from the file's name and from the weights themselves.

Two conventions are in use. PyTorch, timm, mindcv and MindSpore pad symmetrically and normalise by ImageNet's mean and
standard deviation; TensorFlow pads ``same`` and maps RGB to -1..1. No file says which.
"""

import re
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from mbv2.network.model import IMAGENET_MEAN, IMAGENET_STD

Triple = tuple[float, float, float]
HALF: Triple = (0.5, 0.5, 0.5)  # TensorFlow's mean and standard deviation
_NAMED = re.compile(r"(?<![a-z])tf(?![a-z])|tensorflow|keras", re.IGNORECASE)
# Correlation of neighbouring pixels, and of two colours of a pixel, in photographs of about 224 px.
_NEIGHBOURS, _COLOURS = 0.96, 0.93


class Input(Enum):
    """The normalisation that a stem was trained on."""

    IMAGENET = "ImageNet's mean and standard deviation"
    HALF = "RGB in -1..1, as in TensorFlow"


@dataclass(frozen=True, slots=True)
class Assumed:
    """Padding and normalisation of foreign weights.

    Attributes:
        padding: ``symmetric`` or ``same``.
        mean: Subtracted from RGB in 0..1.
        std: Divides RGB after that.
        why: What says so.
        doubt: Why it may be wrong, or empty.
    """

    padding: str
    mean: Triple
    std: Triple
    why: str
    doubt: str = ""


def assume(name: str, kernel: NDArray[np.float32], mean: NDArray[np.float32], variance: NDArray[np.float32]) -> Assumed:
    """Tell padding and normalisation from a file's name and the weights of its first layer.

    Args:
        name: Of the file.
        kernel: float32 (C, 3, 3, 3), the stem's convolution.
        mean: float32 (C,), the moving mean of the BatchNorm after it.
        variance: float32 (C,), its moving variance.
    """
    seen, named = stem_input(kernel, mean, variance), _NAMED.search(name)
    if seen is Input.HALF:
        return Assumed("same", HALF, HALF, f"the first layer expects {seen.value}")
    if seen is Input.IMAGENET and not named:
        return Assumed("symmetric", IMAGENET_MEAN, IMAGENET_STD, f"the first layer expects {seen.value}")
    if seen is Input.IMAGENET:
        why = f"the name says TensorFlow, but the first layer expects {seen.value}"
        return Assumed("same", IMAGENET_MEAN, IMAGENET_STD, why, "both paddings are possible")
    if named:
        return Assumed("same", HALF, HALF, "the name says TensorFlow")
    doubt = "weights from TensorFlow need --padding same --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    return Assumed("symmetric", IMAGENET_MEAN, IMAGENET_STD, "neither name nor weights tell", doubt)


def stem_input(kernel: NDArray[np.float32], mean: NDArray[np.float32], variance: NDArray[np.float32]) -> Input | None:
    """Tell from the statistics that the first BatchNorm saw how the images were normalised, or return None.

    A channel's mean is the sum of its kernel by colour times the mean of the input; its variance grows with the square
    of the input's contrast, which is 1 with ImageNet's normalisation and 0.46 for RGB in -1..1.
    """
    taps = kernel.astype(np.float64)
    colours = taps.sum((2, 3))
    there = colours @ ((np.array(IMAGENET_MEAN) - HALF) / HALF)  # the mean, had ImageNet's images been mapped to -1..1
    rows, columns = np.mgrid[:3, :3].reshape(2, -1)
    apart = np.hypot(np.subtract.outer(rows, rows), np.subtract.outer(columns, columns))
    covariance = np.kron(np.where(np.eye(3) > 0, 1, _COLOURS), _NEIGHBOURS**apart)
    flat = taps.reshape(len(taps), -1)
    contrast = variance.sum() / max(1e-30, np.einsum("ci,ij,cj->", flat, covariance, flat))
    unexplained = ((mean - there) ** 2).sum() / max(1e-30, (mean**2).sum())
    # Measured: 0.28 and 0.015 on weights from TensorFlow. Of 30 networks trained here with ImageNet's normalisation, on
    # other images, none met both conditions.
    if contrast < 0.35 and unexplained < 0.2:
        return Input.HALF
    return Input.IMAGENET if 0.6 < contrast < 1.6 and unexplained > 0.2 else None
