"""Draw a thumbnail of an image that was rejected, for the report: as much of it as still decodes."""

import base64
import re

from imnet_prep.images.decode import bgr, opened
from imnet_prep.images.encode import encode_jpeg, shrink_to_fit
from imnet_prep.images.formats import refuse_bomb, sniff
from imnet_prep.types import ImageFault

SIDE, QUALITY = 96, 70
_PARTIAL = re.compile("truncated|when reading image file")  # Pillow's words where it has decoded a part


def thumbnail(data: bytes, max_pixels: int) -> str:
    """Return a JPEG of at most 96 pixels a side in base64; empty where nothing decodes, or the image is too large.

    What a damaged file still has is shown: the upper part of a cut JPEG, the first frame of an animation.

    Args:
        data: The bytes as found.
        max_pixels: Decode nothing with more pixels by its header.
    """
    try:
        kind = sniff(data)
        # With an end marker, the decoder hands out the last rows of a cut JPEG as well.
        with opened(data + b"\xff\xd9" if kind == "JPEG" else data, kind) as image:
            refuse_bomb(*image.size, max_pixels)
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded no larger than needed
            try:
                image.load()
            except OSError as error:
                if not _PARTIAL.search(str(error)):
                    raise
            image.tile = []  # type: ignore[attr-defined]  # so that Pillow hands out what it has decoded so far
            pixels = bgr(image)
        return base64.b64encode(encode_jpeg(shrink_to_fit(pixels, SIDE), QUALITY, halve_chroma=True)).decode()
    except (ImageFault, MemoryError):
        return ""
