"""RawImage -> Sample | Rejected: every compressed bit of an image is read before it is stored.

A clean JPEG is stored byte for byte. What training decoders would read differently or not at all (another format, CMYK,
an EXIF orientation) becomes a baseline RGB JPEG. What is not whole is rejected with its reason. docs/validation.md has
the table.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from imnet_prep.errors import PlanError
from imnet_prep.images import imaging
from imnet_prep.images.formats import check_container, sniff
from imnet_prep.images.jpeg import ImageFault, JpegInfo, read_markers, without_oddities
from imnet_prep.images.native import decode_shrunk
from imnet_prep.images.native.scan import clean_end
from imnet_prep.types import Change, RawImage, Reason, Rejected, Sample

CONVERT_QUALITY = 95  # a conversion is not meant to be seen; 4:4:4 at 95 stays above 40 dB on photographs
_CHECK_REDUCE = 8  # a decode at 1/8 reads the whole stream and skips most of the inverse DCT
# libjpeg's words for data that it made up. Its other complaints (JFIF revision, Adobe transform) cost no pixel.
_DAMAGE = re.compile(r"^(Corrupt JPEG data.*|Premature end of JPEG.*|Inconsistent progression.*)$", re.MULTILINE)
_PADDING = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9$")


@dataclass(frozen=True, slots=True)
class ValidateOptions:
    """What an image must be, and how it is stored.

    Attributes:
        short_side: Shrink larger images to this many pixels on the short side; None stores them as they are.
        quality: JPEG quality of shrunk images, 1 to 100. 90 costs about a quarter of the original's bytes at 256.
        max_pixels: More pixels than these, by the header, are a bomb. ImageNet's largest image has 25 million or so.
        max_bytes: A stored image may have this many bytes at most, for a row must fit in a page.
    """

    short_side: int | None = None
    quality: int = 90
    max_pixels: int = 100_000_000
    max_bytes: int = 1 << 25

    def __post_init__(self) -> None:
        if self.short_side is not None and not 8 <= self.short_side <= imaging.MAX_JPEG_SIDE:
            raise PlanError("--short-side is out of range", expected="8 pixels or more", got=str(self.short_side))
        if not 1 <= self.quality <= 100:
            raise PlanError("--quality is out of range", expected="1 to 100", got=str(self.quality))
        if self.max_pixels < 1 or self.max_bytes < 1:
            raise PlanError("limits must be positive", got=f"{self.max_pixels} pixels, {self.max_bytes} bytes")


def validate(raw: RawImage, options: ValidateOptions) -> Sample | Rejected:
    """Read every compressed bit of an image and return what is to be stored, or why not.

    Never raises on any bytes, and never prints. Deterministic: the same bytes and options give the same sample.

    Args:
        raw: The image as found.
        options: Limits and storage.

    Returns:
        The sample, or the rejection with its reason.
    """
    ref = raw.ref
    try:
        if not raw.data:
            raise ImageFault(Reason.EMPTY, "zero bytes")
        kind = sniff(raw.data)
        image, width, height, changes = _jpeg(raw.data, options) if kind == "JPEG" else _other(raw.data, kind, options)
        if len(image) > options.max_bytes:
            raise ImageFault(Reason.TOO_LARGE, f"{len(image)} bytes, a record holds at most {options.max_bytes}")
    except ImageFault as fault:
        return Rejected(ref.split, ref.file_name, fault.reason, fault.detail)
    except MemoryError:
        return Rejected(ref.split, ref.file_name, Reason.TOO_MANY_PIXELS, "not enough memory to decode it")
    found = hashlib.sha256(raw.data).hexdigest()
    stored = found if image is raw.data else hashlib.sha256(image).hexdigest()
    noticed = tuple(change for change in Change if change in changes)
    return Sample(ref, image, width, height, sha256=stored, source_sha256=found, changes=noticed)


@dataclass(frozen=True, slots=True)
class Examined:
    """A stored image that is whole: its size as stored, what was noticed, and a small grey copy, uint8 (H, W)."""

    width: int
    height: int
    changes: tuple[Change, ...]
    grey: imaging.Pixels


def examine(data: bytes, short_side: int) -> Examined:
    """Read every compressed bit of a stored image, of whatever format.

    Args:
        data: The bytes.
        short_side: The grey copy has at least this many pixels on its short side, where the image has them.

    Raises:
        ImageFault: It is not whole, or no image.
    """
    options = ValidateOptions()
    if not data:
        raise ImageFault(Reason.EMPTY, "zero bytes")
    kind = sniff(data)
    if kind != "JPEG":
        pixels, _ = imaging.decode_other(data, kind, deep=check_container(data, kind), max_pixels=options.max_pixels)
        return Examined(pixels.shape[1], pixels.shape[0], (), imaging.grey(pixels))
    info = read_markers(data)
    imaging.refuse_bomb(info.width, info.height, options.max_pixels)
    changes = _noticed(info, len(data))
    if info.plain and info.components in (1, 3):
        decoded = imaging.decode_jpeg(data, grey=True, reduce=_reduction(info, short_side))
        grey = _undamaged(data, info, *decoded, changes)
    else:
        grey = imaging.grey(_decode_checked(data, info, options, changes))
    seen = (Change.PROGRESSIVE, Change.GREYSCALE, Change.EXIF_DAMAGED, Change.TRAILING_BYTES)
    return Examined(info.width, info.height, tuple(change for change in seen if change in changes), grey)


def _jpeg(data: bytes, options: ValidateOptions) -> tuple[bytes, int, int, list[Change]]:
    # What the scan calls clean libjpeg decodes without a word, so it only saves time.
    scan_end = clean_end(data) if options.short_side is None else 0
    info = read_markers(data, scan_end)
    imaging.refuse_bomb(info.width, info.height, options.max_pixels)
    if info.components not in (1, 3, 4):
        raise ImageFault(Reason.CORRUPT, f"a JPEG of {info.components} components")
    changes = _noticed(info, len(data))
    convert = not info.plain or info.components == 4 or info.orientation != 1
    shrinks = options.short_side is not None and (
        min(info.width, info.height) > options.short_side or (info.progressive and not convert)
    )
    if not convert and not shrinks:
        if not (scan_end if options.short_side is None else clean_end(data)):
            _undamaged(data, info, *imaging.decode_jpeg(data, grey=True, reduce=_CHECK_REDUCE), changes)
        return data, info.width, info.height, changes
    size = (info.height, info.width) if info.orientation >= 5 else (info.width, info.height)
    pixels = None if convert else _shrunk_at_once(data, info, options)
    if pixels is None:
        pixels = imaging.orient(_decode_checked(data, info, options, changes), info.orientation)
    return _store(pixels, size, options, changes)


def _noticed(info: JpegInfo, size_bytes: int) -> list[Change]:
    seen = (
        (Change.FORMAT, not info.plain and info.precision == 8),
        (Change.CMYK, info.components == 4),
        (Change.SIXTEEN_BIT, info.precision != 8),
        (Change.ORIENTED, info.orientation != 1),
        (Change.PROGRESSIVE, info.progressive),
        (Change.GREYSCALE, info.components == 1),
        (Change.EXIF_DAMAGED, info.exif_damaged),
        (Change.TRAILING_BYTES, size_bytes > info.size_bytes),
    )
    return [change for change, is_so in seen if is_so]


def _shrunk_at_once(data: bytes, info: JpegInfo, options: ValidateOptions) -> imaging.Pixels | None:
    """Do with the C++ library what :func:`_decode_checked` and :func:`imaging.shrink` do, where every bit is clean."""
    if options.short_side is None or min(info.width, info.height) <= options.short_side:
        return None
    pixels, end = decode_shrunk.decode(
        data,
        components=info.components,
        reduce=_reduction(info, options.short_side),
        size=(info.width, info.height),
        small=short_side_size(info.width, info.height, options.short_side),
    )
    return pixels if end == info.size_bytes else None


def _reduction(info: JpegInfo, short_side: int) -> int:
    """Return the largest DCT-domain divisor that leaves ``short_side`` pixels."""
    room = min(info.width, info.height) // short_side
    return max((divisor for divisor in (1, 2, 4, 8) if divisor <= room), default=1)


def _decode_checked(data: bytes, info: JpegInfo, options: ValidateOptions, changes: list[Change]) -> imaging.Pixels:
    """Decode at the smallest scale that still has the pixels asked for, and refuse what the decoder made up."""
    if info.components == 4:
        _, said = imaging.decode_jpeg(data, grey=True, reduce=_CHECK_REDUCE)
        return _undamaged(data, info, imaging.decode_cmyk_jpeg(data), said, changes)
    reduce = _reduction(info, options.short_side) if options.short_side is not None and info.plain else 1
    decoded = imaging.decode_jpeg(data, grey=info.components == 1, reduce=reduce)
    return _undamaged(data, info, *decoded, changes)


def _undamaged(
    data: bytes, info: JpegInfo, pixels: imaging.Pixels | None, said: str, changes: list[Change]
) -> imaging.Pixels:
    """Return what was decoded, or raise an :class:`ImageFault` where the decoder gave up or made something up."""
    damage = _DAMAGE.search(said)
    if said and damage is None and pixels is not None:
        _, said = imaging.decode_jpeg(without_oddities(data, info), grey=True, reduce=_CHECK_REDUCE)
        damage = _DAMAGE.search(said)
    if pixels is not None and damage is None:
        return pixels
    words = damage.group().strip() if damage else f"does not decode ({info.precision}-bit JPEG)"
    padding, end = _PADDING.match(words), info.size_bytes - 2
    # Some encoders fill up with zeros before EOI. A slipped decoder leaves bytes over too, but not zeros.
    if pixels is not None and padding is not None and not any(data[max(0, end - int(padding[1])) : end]):
        changes.append(Change.TRAILING_BYTES)
        return pixels
    raise ImageFault(Reason.TRUNCATED if "remature end" in words else Reason.CORRUPT, words)


def _other(data: bytes, kind: str, options: ValidateOptions) -> tuple[bytes, int, int, list[Change]]:
    deep = check_container(data, kind)
    pixels, changes = imaging.decode_other(data, kind, deep=deep, max_pixels=options.max_pixels)
    return _store(pixels, (pixels.shape[1], pixels.shape[0]), options, [Change.FORMAT, *changes])


def _store(
    pixels: imaging.Pixels, size: tuple[int, int], options: ValidateOptions, changes: list[Change]
) -> tuple[bytes, int, int, list[Change]]:
    """Shrink where asked, and encode.

    Args:
        pixels: Upright; perhaps already reduced while decoding.
        size: Width and height of the whole image, upright, in pixels.
        options: Storage.
        changes: Grows by ``RESIZED``.
    """
    if options.short_side is not None and min(size) > options.short_side:
        width, height = short_side_size(*size, options.short_side)
        if (width, height) != (pixels.shape[1], pixels.shape[0]):
            pixels = imaging.shrink(pixels, width, height)
        changes = [*changes, Change.RESIZED]
    quality = CONVERT_QUALITY if options.short_side is None else options.quality
    image = imaging.encode_jpeg(pixels, quality, halve_chroma=options.short_side is not None)
    return image, pixels.shape[1], pixels.shape[0], changes


def short_side_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Scale a size so that its short side is ``short_side``, the long one rounded to the nearest pixel."""
    if width <= height:
        return short_side, max(short_side, (height * short_side + width // 2) // width)
    return max(short_side, (width * short_side + height // 2) // height), short_side
