"""Judge whether an answer is a real image. The check itself is :mod:`imnet_prep.images.check`."""

import numpy as np

from imnet_prep.download.fetch import Body, Failure
from imnet_prep.download.memory import pixels_of
from imnet_prep.download.options import ContentOptions, FailReason
from imnet_prep.images.check import ValidateOptions, validate
from imnet_prep.images.decode import decode_jpeg
from imnet_prep.types import ImageRef, RawImage, Reason, Sample

_FAIL = {  # any other reason is NOT_AN_IMAGE
    Reason.TRUNCATED: FailReason.TRUNCATED,
    Reason.TOO_MANY_PIXELS: FailReason.TOO_LARGE,
    Reason.TOO_LARGE: FailReason.TOO_LARGE,
}
_MAYBE_FLAT_BYTES_PER_PIXEL = 0.12  # of coded data; photographs lie above, and a second look costs a decode
_ONE_COLOUR_RANGE = 8  # largest spread of any channel, of 255: what JPEG's rounding leaves of one colour
_FLAT_SHARE = 0.4  # of the pixels in one of 4,096 colours: a sign or an icon
_MAX_STORED = 1 << 30  # the byte cap of the fetch rules here


def judge(body: Body, options: ContentOptions) -> tuple[Sample, bool] | Failure:
    """Read every compressed bit of an answer.

    Args:
        body: The answer.
        options: Limits and storage.

    Returns:
        What the check found, and whether one colour dominates the image, as in a sign; or why there is no image.
    """
    checks = ValidateOptions(short_side=options.short_side, quality=options.quality, max_bytes=_MAX_STORED)
    sample = validate(RawImage(ImageRef("train", "", "download", "", 0, len(body.data)), body.data), checks)
    if not isinstance(sample, Sample):
        return Failure(_FAIL.get(sample.reason, FailReason.NOT_AN_IMAGE), sample.detail, body.status)
    if min(sample.width, sample.height) < options.min_side:
        return Failure(FailReason.PLACEHOLDER, f"tiny: {sample.width} x {sample.height} pixels", body.status)
    if options.max_area is not None and (area := pixels_of(body.data)) > options.max_area:
        return Failure(FailReason.UNWANTED_SIZE, f"{area} pixels", body.status)
    short, long = sorted((sample.width, sample.height))
    if options.max_aspect is not None and long > options.max_aspect * short:
        return Failure(FailReason.UNWANTED_SIZE, f"sides of {sample.width} and {sample.height} pixels", body.status)
    one_colour, flat = _colours(sample)
    if one_colour:
        return Failure(FailReason.PLACEHOLDER, "an image of one colour", body.status)
    return sample, flat


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
