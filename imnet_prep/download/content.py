"""Judge whether an answer is a real image. The check itself is :mod:`imnet_prep.images.check`."""

from dataclasses import dataclass

import numpy as np

from imnet_prep.download.fetch import Body, Failure
from imnet_prep.download.options import ContentOptions, FailReason
from imnet_prep.images.check import ValidateOptions, validate
from imnet_prep.images.decode import decode_jpeg
from imnet_prep.images.formats import sniff
from imnet_prep.types import ImageRef, RawImage, Reason, Sample

_EXTENSION = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
_FAIL = {  # any other reason is NOT_AN_IMAGE
    Reason.TRUNCATED: FailReason.TRUNCATED,
    Reason.TOO_MANY_PIXELS: FailReason.TOO_LARGE,
    Reason.TOO_LARGE: FailReason.TOO_LARGE,
}
_MAYBE_FLAT_BYTES_PER_PIXEL = 0.12  # of coded data; photographs lie above, and a second look costs a decode
_ONE_COLOUR_RANGE = 8  # largest spread of any channel, of 255: what JPEG's rounding leaves of one colour
_FLAT_SHARE = 0.4  # of the pixels in one of 4,096 colours: a sign or an icon
_MAX_STORED = 1 << 30  # the byte cap of the fetch rules here


@dataclass(frozen=True, slots=True)
class Image:
    """An image that passed.

    Attributes:
        sample: What the check found; its ``sha256`` is that of ``data`` where that was re-encoded.
        ext: Extension of the stored bytes' real format.
        data: What to store: the bytes as they came, or re-encoded ones.
        flat: Whether one colour dominates, as in a sign.
    """

    sample: Sample
    ext: str
    data: bytes
    flat: bool


def judge(body: Body, options: ContentOptions) -> Image | Failure:
    """Read every compressed bit of an answer, and return the image or why there is none.

    Args:
        body: The answer.
        options: Limits and storage.
    """
    checks = ValidateOptions(short_side=options.short_side, quality=options.quality, max_bytes=_MAX_STORED)
    sample = validate(RawImage(ImageRef("train", "", "download", "", 0, len(body.data)), body.data), checks)
    if not isinstance(sample, Sample):
        return Failure(_FAIL.get(sample.reason, FailReason.NOT_AN_IMAGE), sample.detail, body.status)
    if min(sample.width, sample.height) < options.min_side:
        tiny = f"tiny: {sample.width} x {sample.height} pixels"
        return Failure(FailReason.PLACEHOLDER, tiny, body.status)
    one_colour, flat = _colours(sample)
    if one_colour:
        return Failure(FailReason.PLACEHOLDER, "an image of one colour", body.status)
    if options.short_side is None:
        return Image(sample, _EXTENSION[sniff(body.data)], body.data, flat)
    return Image(sample, "jpg", sample.image, flat)


def _colours(sample: Sample) -> tuple[bool, bool]:
    """Return whether an image has one colour, and whether one colour dominates it."""
    coded = len(sample.image) - max(0, sample.image.find(b"\xff\xda"))  # a flat JPEG has hardly any coded data
    few = coded < _MAYBE_FLAT_BYTES_PER_PIXEL * sample.width * sample.height
    pixels = decode_jpeg(sample.image, reduce=8)[0] if few else None
    if pixels is None:
        return False, False
    by_pixel = pixels.reshape(-1, 3)
    spread = int((by_pixel.max(axis=0).astype(int) - by_pixel.min(axis=0)).max())
    codes = (by_pixel >> 4).astype(np.int64) @ np.array([256, 16, 1])
    share = np.bincount(codes).max() / len(codes)
    return spread <= _ONE_COLOUR_RANGE, bool(share >= _FLAT_SHARE)
