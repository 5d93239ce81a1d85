"""Turn, shrink and encode the pixels that are to be stored."""

import cv2
import numpy as np
from PIL import Image

from imnet_prep.images.decode import Pixels
from imnet_prep.types import ImageFault, Reason


def to_grey(pixels: Pixels) -> Pixels:
    """Convert BGR to grey, uint8 (H, W); grey stays as it is."""
    if pixels.ndim == 2:
        return pixels
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY), dtype=np.uint8)


def orient(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror pixels upright. Source: EXIF 2.32, tag 0x0112."""
    if orientation >= 5:
        pixels = cv2.transpose(pixels)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)


def short_side_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Scale a size down so that its short side is ``short_side``, the long one rounded to the nearest pixel.

    None, or what is no less than the short side, leaves the size as it is.
    """
    if short_side is None or min(width, height) <= short_side:
        return width, height
    if width <= height:
        return short_side, (height * short_side + width // 2) // width
    return (width * short_side + height // 2) // height, short_side


def shrink(pixels: Pixels, width: int, height: int) -> Pixels:
    """Resize down to ``width`` x ``height`` with Pillow's antialiased bilinear filter.

    It works in integers, so the result is the same on every CPU. :func:`~.native.decode_shrunk` does the same faster.
    """
    image = Image.fromarray(pixels)  # to Pillow BGR is RGB: all channels are treated alike
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def shrink_to_fit(pixels: Pixels, side: int) -> Pixels:
    """Shrink pixels so that neither side is longer than ``side``; smaller ones keep their size."""
    height, width = pixels.shape[:2]
    scale = side / max(width, height, side)
    return shrink(pixels, max(1, round(width * scale)), max(1, round(height * scale)))


def encode_jpeg(pixels: Pixels, quality: int, *, halve_chroma: bool) -> bytes:
    """Encode a baseline JPEG with no metadata: grey as one component, else YCbCr 4:2:0 or 4:4:4."""
    sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420 if halve_chroma else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    done, out = cv2.imencode(".jpg", pixels, options)
    if not done:
        raise ImageFault(Reason.CORRUPT, "cannot be encoded as a JPEG")
    return bytes(out)
