"""RawImage -> Sample | Rejected: every compressed bit of an image is read before it is stored.

A clean JPEG is stored byte for byte. What training decoders would read differently or not at all (another format, CMYK,
an EXIF orientation) becomes a baseline RGB JPEG. What is not whole is rejected with its reason. docs/validation.md has
the table.

Three steps, each in one function: :func:`read_header` reads, :func:`decide` decides, :func:`store` stores.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from imnet_prep.errors import PlanError
from imnet_prep.images.decode import Pixels, decode_cmyk_jpeg, decode_jpeg, decode_other
from imnet_prep.images.encode import encode_jpeg, orient, short_side_size, shrink, to_grey
from imnet_prep.images.formats import MAX_JPEG_SIDE, MAX_PIXELS, refuse_bomb, sniff
from imnet_prep.images.jpeg import JpegInfo, read_markers, without_oddities
from imnet_prep.images.native import clean_end, decode_shrunk
from imnet_prep.types import Change, ImageFault, RawImage, Reason, Rejected, Sample

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
        max_pixels: More pixels than these, by the header, are a bomb.
        max_bytes: A stored image may have this many bytes at most, for a row must fit in a page.
    """

    short_side: int | None = None
    quality: int = 90
    max_pixels: int = MAX_PIXELS
    max_bytes: int = 1 << 25

    def __post_init__(self) -> None:
        if self.short_side is not None and not 8 <= self.short_side <= MAX_JPEG_SIDE:
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
        kind, info = read_header(raw.data, options.max_pixels, scan=options.short_side is None)
        image, width, height, changes = store(raw.data, kind, info, decide(info, options.short_side), options)
        if len(image) > options.max_bytes:
            raise ImageFault(Reason.TOO_LARGE, f"{len(image)} bytes, a record holds at most {options.max_bytes}")
    except ImageFault as fault:
        return Rejected(ref.split, ref.file_name, fault.reason, fault.detail)
    except MemoryError:
        return Rejected(ref.split, ref.file_name, Reason.TOO_MANY_PIXELS, "not enough memory to decode it")
    found = hashlib.sha256(raw.data).hexdigest()
    stored = found if image is raw.data else hashlib.sha256(image).hexdigest()
    noticed = tuple(change for change in Change if change in changes) if changes else ()
    return Sample(image, width, height, stored, found, noticed)


Action = Literal["keep", "encode", "convert"]
"""What is done to an image: keep its bytes, encode its pixels again, or convert them as well."""


def read_header(data: bytes, max_pixels: int, *, scan: bool = False) -> tuple[str, JpegInfo | None]:
    """Return Pillow's name of an image's format and, for a JPEG, what its markers say; no pixel is decoded.

    Args:
        data: The bytes.
        max_pixels: Refuse a JPEG of more pixels than these.
        scan: Have the C++ library read the pixels' bits as well, which saves a decode of what is kept.

    Raises:
        ImageFault: It is no image, or a JPEG that is not whole by its markers, or too large.
    """
    if not data:
        raise ImageFault(Reason.EMPTY, "zero bytes")
    kind = sniff(data)
    if kind != "JPEG":
        return kind, None
    info = read_markers(data, clean_end(data) if scan else 0)
    refuse_bomb(info.width, info.height, max_pixels)
    return kind, info


def decide(info: JpegInfo | None, short_side: int | None) -> Action:
    """Return what is to be done to a JPEG, or to an image of another format (None).

    Raises:
        ImageFault: A JPEG of so many components cannot be stored.
    """
    if info is None:
        return "convert"
    if info.components not in (1, 3, 4):
        raise ImageFault(Reason.CORRUPT, f"a JPEG of {info.components} components")
    if not info.plain or info.components == 4 or info.orientation != 1:
        return "convert"
    if short_side is None or (min(info.width, info.height) <= short_side and not info.progressive):
        return "keep"
    return "encode"


def store(
    data: bytes, kind: str, info: JpegInfo | None, action: Action, options: ValidateOptions
) -> tuple[bytes, int, int, list[Change]]:
    """Return the bytes to store, their width and height in pixels, and what was noticed or changed.

    Raises:
        ImageFault: The image is not whole.
    """
    if info is None:
        pixels, changes = decode_other(data, kind, options.max_pixels)
        changes.append(Change.FORMAT)
        size = pixels.shape[1], pixels.shape[0]
        target = short_side_size(*size, options.short_side)
    else:
        changes = _noticed(info, len(data))
        if action == "keep":
            # libjpeg decodes what the scan calls clean without a warning, so the scan only saves time.
            if not info.clean and not clean_end(data):
                _decode(data, info, changes, grey=True, reduce=_CHECK_REDUCE)
            return data, info.width, info.height, changes
        size = (info.height, info.width) if info.orientation >= 5 else (info.width, info.height)
        target = short_side_size(*size, options.short_side)
        reduce, shrunk = _reduction(info, options.short_side), None
        if action == "encode" and target != size:
            shrunk, end = decode_shrunk(data, components=info.components, reduce=reduce, size=size, small=target)
            shrunk = shrunk if end == info.size_bytes else None
        pixels = orient(_decode(data, info, changes, reduce=reduce), info.orientation) if shrunk is None else shrunk
    if target != size:
        changes.append(Change.RESIZED)
        if target != (pixels.shape[1], pixels.shape[0]):
            pixels = shrink(pixels, *target)
    quality = CONVERT_QUALITY if options.short_side is None else options.quality
    return encode_jpeg(pixels, quality, halve_chroma=options.short_side is not None), *target, changes


@dataclass(frozen=True, slots=True)
class Examined:
    """A stored image that is whole: its size as stored, what was noticed, and a small grey copy, uint8 (H, W)."""

    width: int
    height: int
    changes: tuple[Change, ...]
    grey: Pixels


def examine(data: bytes, short_side: int) -> Examined:
    """Read every compressed bit of a stored image, of whatever format.

    Args:
        data: The bytes.
        short_side: The grey copy has at least this many pixels on its short side, where the image has them.

    Raises:
        ImageFault: It is not whole, or no image.
    """
    max_pixels = ValidateOptions().max_pixels
    kind, info = read_header(data, max_pixels)
    if info is None:
        pixels, _ = decode_other(data, kind, max_pixels)
        return Examined(pixels.shape[1], pixels.shape[0], (), to_grey(pixels))
    changes = _noticed(info, len(data))
    grey = to_grey(_decode(data, info, changes, grey=True, reduce=_reduction(info, short_side)))
    seen = (Change.PROGRESSIVE, Change.GREYSCALE, Change.EXIF_DAMAGED, Change.TRAILING_BYTES)
    return Examined(info.width, info.height, tuple(change for change in seen if change in changes), grey)


def _noticed(info: JpegInfo, size_bytes: int) -> list[Change]:
    seen = {
        Change.FORMAT: not info.plain and info.precision == 8,
        Change.CMYK: info.components == 4,
        Change.SIXTEEN_BIT: info.precision != 8,
        Change.ORIENTED: info.orientation != 1,
        Change.PROGRESSIVE: info.progressive,
        Change.GREYSCALE: info.components == 1,
        Change.EXIF_DAMAGED: info.exif_damaged,
        Change.TRAILING_BYTES: size_bytes > info.size_bytes,
    }
    return [change for change, is_so in seen.items() if is_so]


def _reduction(info: JpegInfo, short_side: int | None) -> int:
    """Return the largest DCT-domain divisor that leaves ``short_side`` pixels."""
    room = min(info.width, info.height) // short_side if short_side is not None and info.plain else 1
    return max((divisor for divisor in (1, 2, 4, 8) if divisor <= room), default=1)


def _decode(data: bytes, info: JpegInfo, changes: list[Change], *, grey: bool = False, reduce: int = 1) -> Pixels:
    """Decode a JPEG, and refuse what the decoder gave up or made something up for.

    Args:
        data: The bytes.
        info: What its markers say.
        changes: Where zeros before the end marker are noted.
        grey: Decode grey, if it is not CMYK.
        reduce: Divide both sides by 1, 2, 4 or 8, if it is not CMYK.
    """
    if info.components == 4:
        _, said = decode_jpeg(data, grey=True, reduce=_CHECK_REDUCE)
        pixels: Pixels | None = decode_cmyk_jpeg(data)
    else:
        pixels, said = decode_jpeg(data, grey=grey or info.components == 1, reduce=reduce)
    damage = _DAMAGE.search(said)
    if said and damage is None and pixels is not None:
        _, said = decode_jpeg(without_oddities(data, info), grey=True, reduce=_CHECK_REDUCE)
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
