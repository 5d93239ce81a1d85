"""Hash what an image shows, so that re-encoded, rescaled and mirrored copies of it are found.

An image's hash is 128 bits: the signs of the lowest frequencies of a 32 x 32 grey copy. Mirroring changes the sign of
the odd horizontal frequencies only, so the hash of the mirrored image follows from the hash of the image.

Source: Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010 (the DCT hash).

Measured on 250 photographs of ImageNet: copies at q60, scaled to 70 %, mirrored, and all three differ in at most 8
bits, different photographs in at least 37; in pixels they correlate at 0.93 or more, and at 0.66 or less.
"""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from imnet_prep.images.check import examine

SIDE = 32  # pixels on each side of the grey copy
BITS = 128
LOWEST = 16  # the 128 frequencies lie among the lowest 16 of each direction
MIN_CORRELATION = 0.8
_FEATURELESS = 2.0  # grey levels of standard deviation below which there is nothing to compare
_BLUR = 3.0  # pixels; what is smoother than this (a white background, a dark corner) says nothing
_MAX_ASPECT = 0.06  # difference of log(width / height)
Grey = NDArray[np.float32]
Signatures = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class PerceptualHash:
    """What two images are compared by.

    Attributes:
        bits: uint64 (2,), zeros where there is nothing to see.
        grey: float32 (32, 32), mean 0. aspect: log(width / height).
    """

    bits: Signatures
    grey: Grey
    aspect: float


@cache
def _frequencies() -> NDArray[np.int64]:
    """Return the positions of the 128 lowest frequencies among 16 x 16 of the transform, the mean left out."""
    vertical, horizontal = np.mgrid[0:LOWEST, 0:LOWEST]
    return np.argsort(((vertical + horizontal) * SIDE + vertical).ravel(), kind="stable")[1 : BITS + 1]


@cache
def bits_flipped_by_mirroring() -> Signatures:
    """Return the bits that differ between any image and its mirror image, uint64 (2,)."""
    return _pack(_frequencies() % LOWEST % 2 == 1)


def _pack(bits: NDArray[np.bool_]) -> Signatures:
    return np.packbits(bits, bitorder="little").view(np.uint64)


@cache
def _weights(small: int, full: int) -> Grey:
    """Return area weights (32, small) from ``small`` samples for ``full`` pixels; the last sample may be partial.

    A decode at 1/8 rounds the size up, so that a plain resize would shift a mirrored copy against the original.
    """
    reduce = next((scale for scale in (1, 2, 4, 8) if -(-full // scale) == small), full / small)
    end = full / reduce
    edges = np.linspace(0, end, SIDE + 1)
    low = np.maximum(edges[:-1, None], np.arange(small))
    high = np.minimum(edges[1:, None], np.minimum(np.arange(1, small + 1), end))
    weights = np.clip(high - low, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


@cache
def _spectrum(small: int, full: int) -> Grey:
    """Return the lowest frequencies of the 32 samples that ``small`` ones are brought to: float32 (16, small)."""
    basis = cv2.dct(np.eye(SIDE, dtype=np.float32), flags=cv2.DCT_ROWS).T[:LOWEST]
    return np.asarray(basis @ _weights(small, full), dtype=np.float32)


def signature(grey: NDArray[np.uint8], width: int, height: int) -> Signatures:
    """Return an image's bits, uint64 (2,): the signs of its lowest frequencies; zeros where there is nothing to see.

    Args:
        grey: uint8 (H, W), perhaps decoded at a smaller scale, its short side 32 or more where the image has them.
        width: Of the whole image, in pixels. height: Likewise.
    """
    tall, wide = grey.shape
    lowest = (_spectrum(tall, height) @ grey.astype(np.float32) @ _spectrum(wide, width).T).ravel()
    if float(np.dot(lowest, lowest)) - float(lowest[0]) ** 2 < (_FEATURELESS * SIDE) ** 2:  # without the mean
        return np.zeros(2, np.uint64)
    return _pack(lowest[_frequencies()] > 0)


def hash_pixels(grey: NDArray[np.uint8], width: int, height: int) -> PerceptualHash:
    """Hash an image from its grey pixels; see :func:`signature` for the arguments."""
    small = _weights(grey.shape[0], height) @ grey.astype(np.float32) @ _weights(grey.shape[1], width).T
    small -= small.mean()
    return PerceptualHash(signature(grey, width, height), small, float(np.log(width / height)))


def same_picture(first: PerceptualHash, second: PerceptualHash, mirrored: bool) -> bool:
    """Tell whether two images show the same, by the correlation of their detail (finer than a few pixels)."""
    if abs(first.aspect - second.aspect) > _MAX_ASPECT:
        return False
    one, other = _detail(first.grey), _detail(second.grey[:, ::-1] if mirrored else second.grey)
    norm = float(np.sqrt((one * one).sum() * (other * other).sum()))
    return norm > 0 and float((one * other).sum()) / norm >= MIN_CORRELATION


def _detail(grey: Grey) -> Grey:
    fine = grey - cv2.GaussianBlur(grey, (0, 0), _BLUR)
    return np.asarray(fine - fine.mean(), dtype=np.float32)


def hash_image(data: bytes) -> PerceptualHash:
    """Hash an encoded image.

    Raises:
        ImageFault: It does not decode.
    """
    seen = examine(data, SIDE)
    return hash_pixels(seen.grey, seen.width, seen.height)
