"""What can still be seen of an image that was kept out, small, for the report: a whole picture would need its bytes."""

from __future__ import annotations

import base64

from PIL import ImageFile

from imnet_prep.images import imaging
from imnet_prep.images.formats import sniff
from imnet_prep.images.jpeg import ImageFault

SIDE, QUALITY = 96, 70


def glimpse(data: bytes, max_pixels: int) -> str:
    """Return a JPEG of at most 96 pixels a side in base64; empty where nothing can be seen, or it would be a bomb.

    What a damaged file still gives is shown: the upper part of a cut JPEG, the first frame of an animation.

    Args:
        data: The bytes as found.
        max_pixels: More than these by the header are not decoded.
    """
    try:
        with imaging.opened(data, sniff(data)) as image:
            imaging.refuse_bomb(*image.size, max_pixels)
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded no larger than needed
            ImageFile.LOAD_TRUNCATED_IMAGES = True  # nobody else uses Pillow meanwhile: `opened` holds a lock
            try:
                pixels = imaging.bgr(image)
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
        height, width = pixels.shape[:2]
        scale = SIDE / max(width, height, SIDE)
        small = imaging.shrink(pixels, max(1, round(width * scale)), max(1, round(height * scale)))
        return base64.b64encode(imaging.encode_jpeg(small, QUALITY, halve_chroma=True)).decode()
    except (ImageFault, MemoryError):
        return ""
