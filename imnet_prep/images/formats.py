"""Tell image formats by content, and check the containers of those that are not JPEG.

Pillow decodes what it can and lets much pass: a PNG without its end, a WebP shorter than it says. What the container
promises is checked here first, with no pixel decoded.

Source: PNG (ISO 15948) section 5, GIF89a, RFC 9649 (WebP), the BMP file header, TIFF 6.0 section 2.
"""

import struct
import zlib
from collections.abc import Callable

from imnet_prep.images.tiff import BITS_PER_SAMPLE, SHORT, first_directory
from imnet_prep.types import ImageFault, Reason

MAX_JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KNOWN = (
    (b"\xff\xd8\xff", "JPEG"),
    (_PNG_SIGNATURE, "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
)
_STRANGERS = (
    (b"<", "HTML or XML"),
    (b"%PDF", "PDF"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"8BPS", "Photoshop"),
    (b"\x00\x00\x00\x0cjP", "JPEG 2000"),
    (b"{", "JSON"),
)


def sniff(data: bytes) -> str:
    """Name the format by its first bytes, as Pillow names it.

    Raises:
        ImageFault: None of JPEG, PNG, GIF, WebP, BMP and TIFF.
    """
    for magic, kind in _KNOWN:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    start = data[:64].lstrip()
    looks = next((name for magic, name in _STRANGERS if start.startswith(magic)), "")
    if data[4:8] == b"ftyp":
        looks = f"ISO media ({data[8:12].decode('ascii', 'replace').strip()})"
    raise ImageFault(Reason.NOT_AN_IMAGE, f"looks like {looks}" if looks else f"begins with {data[:8].hex(' ')}")


MAX_PIXELS = 100_000_000  # more by the header are a decompression bomb; ImageNet's largest image has about 25 million


def refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    """Raise an :class:`ImageFault` for more pixels than ``max_pixels``, or more on a side than a JPEG can hold."""
    if width * height > max_pixels:
        raise ImageFault(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels, at most {max_pixels} are allowed")
    if max(width, height) > MAX_JPEG_SIDE:
        raise ImageFault(
            Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels, a JPEG holds at most {MAX_JPEG_SIDE} a side"
        )


def check_container(data: bytes, kind: str) -> bool:
    """Check that the container is whole and holds one frame.

    Returns:
        Whether it says that its samples have 16 bits.

    Raises:
        ImageFault: It is cut, damaged or animated.
    """
    check: Callable[[bytes], bool | None] = {
        "PNG": _check_png, "WEBP": _check_webp, "GIF": _check_gif, "BMP": _check_bmp, "TIFF": _tiff_is_deep
    }[kind]  # fmt: skip
    return bool(check(data))


def _check_png(data: bytes) -> bool:
    at, depth, pixels_seen, name = len(_PNG_SIGNATURE), 0, False, b""
    while name != b"IEND":
        if at + 12 > len(data):
            raise ImageFault(Reason.TRUNCATED, "PNG without its end chunk (IEND)")
        (length,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            raise ImageFault(Reason.TRUNCATED, f"PNG ends inside its chunk {name!r}")
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImageFault(Reason.CORRUPT, f"PNG chunk {name!r} fails its checksum")
        if depth == 0:
            if name != b"IHDR" or length != 13:
                raise ImageFault(Reason.CORRUPT, f"PNG begins with chunk {name!r}")
            depth = data[at + 16]
        pixels_seen |= name == b"IDAT"
        if name == b"acTL" and int.from_bytes(data[at + 8 : at + 12], "big") > 1:
            raise ImageFault(Reason.ANIMATED, "animated PNG")
        at = end
    if not pixels_seen:
        raise ImageFault(Reason.CORRUPT, "PNG without pixels (IDAT)")
    return depth == 16


def _check_webp(data: bytes) -> None:
    promised = int.from_bytes(data[4:8], "little") + 8
    if len(data) < promised:
        raise ImageFault(Reason.TRUNCATED, f"WebP of {len(data)} bytes that says {promised}")
    if data[12:16] == b"VP8X" and len(data) > 20 and data[20] & 2:
        raise ImageFault(Reason.ANIMATED, "animated WebP")


def _check_gif(data: bytes) -> None:
    if data.rstrip(b"\x00")[-1:] != b";":
        raise ImageFault(Reason.TRUNCATED, "GIF without its trailer")


def _check_bmp(data: bytes) -> None:
    if len(data) < 26:
        raise ImageFault(Reason.TRUNCATED, f"BMP of {len(data)} bytes")
    if int.from_bytes(data[10:14], "little") >= len(data):
        raise ImageFault(Reason.TRUNCATED, "BMP without pixels")


def _tiff_is_deep(data: bytes) -> bool:
    """Look up the bits a sample in the first directory; the decoder finds what is damaged."""
    if len(data) < 10:
        raise ImageFault(Reason.TRUNCATED, f"TIFF of {len(data)} bytes")
    directory = first_directory(data)
    if directory is None:
        raise ImageFault(Reason.TRUNCATED, "TIFF ends before its directory")
    order, entries, _ = directory
    for tag, kind, number, at in entries:
        if tag == BITS_PER_SAMPLE and kind == SHORT:
            place = int.from_bytes(data[at : at + 4], order) if number > 2 else at
            return data[place : place + 2] == (16).to_bytes(2, order)
    return False
