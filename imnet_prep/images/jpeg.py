"""What a JPEG says of itself, read from its markers alone: no pixel is decoded.

Source: ITU-T T.81 annex B (markers), JFIF 1.02, the Adobe APP14 segment, EXIF 2.32 section 4.6 (a TIFF in APP1).
"""

import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from imnet_prep.images.tiff import FIELD_BYTES, ORIENTATION, SHORT, first_directory
from imnet_prep.types import ImageFault, Reason

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
_TEM, _DRI, _APP1 = 0x01, 0xDD, 0xE1
_RESTARTS = range(0xD0, 0xD8)
_APPLICATION, _COM = range(0xE0, 0xF0), 0xFE
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # DHT, JPG and DAC lie between the frame headers
_PLAIN = frozenset({0xC0, 0xC1, 0xC2})  # neither lossless nor hierarchical nor arithmetic-coded
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SEQUENTIAL_HUFFMAN = frozenset({0xC0, 0xC1})
_MAX_RESTART_INTERVAL = 0xFFFF  # MCUs
_MAX_SCANS = 500  # encoders write about 10; each is a pass over every block, so thousands are an attack
_MAX_SCANNED_PIXELS = 2_000_000_000  # in all scans together: ten seconds of decoding at worst
# In entropy-coded data FF 00 is a stuffed FF, FF D0-D7 a restart, FF FF a fill byte; anything else ends the scan.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class JpegInfo:
    """What the markers of a whole JPEG say.

    Attributes:
        width: Columns, in pixels, as stored (before any EXIF orientation).
        height: Rows, in pixels.
        components: 1 grey, 3 colour, 4 CMYK or YCCK.
        precision: Bits a sample.
        progressive: Decoded in several passes.
        plain: Huffman-coded DCT of 8 bits: what every decoder reads.
        orientation: EXIF orientation, 1 to 8; 1 where there is none.
        exif_damaged: There is EXIF, and it cannot be read.
        size_bytes: Up to and with the end marker; what follows is no part of the image.
        clean: The C++ library read every bit and found no fault.
    """

    width: int
    height: int
    components: int
    precision: int
    progressive: bool
    plain: bool
    orientation: int
    exif_damaged: bool
    size_bytes: int
    clean: bool


def read_markers(data: bytes, scan_end: int = 0) -> JpegInfo:
    """Walk every marker from SOI to EOI.

    Args:
        data: The file's bytes.
        scan_end: What :func:`~imnet_prep.images.native.clean_end` returns for them, which saves the search for the end.

    Returns:
        What the headers say.

    Raises:
        ImageFault: The stream ends before EOI, or its markers contradict T.81.
    """
    frame: tuple[int, bytes] | None = None
    exif: tuple[int, bool] | None = None
    scans, end = 0, 2
    for marker, body, _, end in _segments(data, scan_end):  # noqa: B007 - the last end is the image's
        if marker in _SOF:
            if frame is not None:
                raise ImageFault(Reason.CORRUPT, "two frame headers")
            frame = (marker, body)
        elif marker == _APP1 and body.startswith(b"Exif") and exif is None:
            exif = _read_orientation(body[6:])
        elif marker == SOS:
            scans += 1
            if frame is None:
                raise ImageFault(Reason.CORRUPT, "a scan before the frame header")
            if scans > _MAX_SCANS:
                raise ImageFault(Reason.CORRUPT, f"more than {_MAX_SCANS} scans")
    if frame is None or scans == 0:
        raise ImageFault(Reason.CORRUPT, "no image between the start and end markers")
    width, height, components, precision = _read_frame(frame[1])
    if scans * width * height > max(_MAX_SCANNED_PIXELS, width * height):
        raise ImageFault(Reason.TOO_MANY_PIXELS, f"{scans} scans of {width} x {height} pixels")
    orientation, exif_damaged = exif or (1, False)
    return JpegInfo(
        width=width,
        height=height,
        components=components,
        precision=precision,
        progressive=frame[0] in _PROGRESSIVE,
        plain=precision == 8 and frame[0] in _PLAIN,
        orientation=orientation,
        exif_damaged=exif_damaged,
        size_bytes=end,
        clean=scan_end > 0,
    )


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height by the first frame header; None where there is none. Nothing after it is read."""
    with suppress(ImageFault):
        for marker, body, _, _ in _segments(data):
            if marker in _SOF:
                return _read_frame(body)[:2]
            if marker == SOS:
                break
    return None


def _read_frame(body: bytes) -> tuple[int, int, int, int]:
    """Return a frame header's width, height, number of components, and bits a sample."""
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise ImageFault(Reason.CORRUPT, "the frame header is too short")
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if width == 0 or height == 0:
        raise ImageFault(Reason.CORRUPT, f"the header gives {width} x {height} pixels")
    return width, height, components, precision


def _read_orientation(exif: bytes) -> tuple[int, bool]:
    """Read the orientation from an EXIF block, which is a TIFF without pixels.

    Returns:
        The orientation, 1 to 8 (1 where none is given), and whether the block is damaged.
    """
    directory = first_directory(exif) if exif.startswith((b"II*\x00", b"MM\x00*")) else None
    if directory is None:
        return 1, True
    order, entries, whole = directory
    orientation, damaged = 1, not whole
    for tag, kind, number, at in entries:
        value = int.from_bytes(exif[at : at + 2], order)
        if tag == ORIENTATION:
            if kind == SHORT and number == 1 and 1 <= value <= 8:
                orientation = value
            elif value != 0:  # 0 is what cameras write for "not known"
                damaged = True
        else:
            size = FIELD_BYTES.get(kind, 0) * number
            damaged |= kind not in FIELD_BYTES or (size > 4 and value + size > len(exif))
    return orientation, damaged


def without_oddities(data: bytes, info: JpegInfo) -> bytes:
    """Copy a JPEG without its metadata, and with the scan parameters that a sequential one must have.

    libjpeg complains once a file; a harmless complaint (an unknown JFIF revision, say) would hide a serious one.

    Args:
        data: A file that :func:`read_markers` accepted.
        info: What it said.
    """
    parts, done = [], 0
    for marker, body, start, end in _segments(data):
        if marker in _APPLICATION or marker == _COM:
            parts.append(data[done:start])
            done = end
        elif marker == SOS and not info.progressive and len(body) >= 3:
            parts.append(data[done : end - 3] + b"\x00\x3f\x00")
            done = end
    return b"".join((*parts, data[done : info.size_bytes]))


def reporting(data: bytes) -> bytes | None:
    """Copy a JPEG so that libjpeg reports every Huffman code in it that does not exist; the pixels are the same.

    libjpeg-turbo decodes sequential Huffman images faster where they have no restart interval, and then takes a code of
    more than 16 bits for a zero without a warning. So the copy has the longest interval, where no scan reaches its end.
    Source: libjpeg-turbo 3.0, jdhuff.c, decode_mcu and HUFF_DECODE_FAST.

    Args:
        data: A file that :func:`read_markers` accepted.

    Returns:
        The copy, which may be ``data`` itself; None where a scan has more MCUs than an interval can have.
    """
    parts, done, frame, interval = [], 0, b"", 0
    for marker, body, start, _ in _segments(data):
        if marker in _SOF:
            frame = body
            if marker not in _SEQUENTIAL_HUFFMAN:
                return data
        elif marker == _DRI:
            interval = int.from_bytes(body, "big")
        elif marker == SOS:
            if interval == 0:
                if _mcus(frame, interleaved=body[:1] > b"\x01") > _MAX_RESTART_INTERVAL:
                    return None
                parts.append(data[done:start] + struct.pack(">3H", 0xFF00 | _DRI, 4, _MAX_RESTART_INTERVAL))
                done = start
            if body[:1] == frame[5:6]:  # the only scan
                break
    return b"".join((*parts, memoryview(data)[done:]))


def _mcus(frame: bytes, *, interleaved: bool) -> int:
    """Return the number of MCUs in a scan of several components, or the largest number in a scan of one."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    sampling = frame[7::3] if interleaved else b"\x11"
    across, down = max(1, *(byte >> 4 for byte in sampling)), max(1, *(byte & 15 for byte in sampling))
    return -(-width // (8 * across)) * -(-height // (8 * down))


def _segments(data: bytes, scan_end: int = 0) -> Iterator[tuple[int, bytes, int, int]]:
    """Yield each marker from SOI to EOI, its segment's body, and where its first byte and what follows it are.

    Of two segments with other bytes between, the first is a scan's header.

    Raises:
        ImageFault: As :func:`read_markers` raises it.
    """
    marker, end, size = SOI, 2, len(data)
    while marker != EOI:
        at = end
        if at < size and data[at] != 0xFF:
            raise ImageFault(Reason.CORRUPT, f"no marker at byte {at}, got 0x{data[at]:02x}")
        while at < size and data[at] == 0xFF:  # fill bytes may come before a marker
            at += 1
        if at >= size:
            raise ImageFault(Reason.TRUNCATED, "ends between two markers, no end marker (EOI)")
        marker, end = data[at], at + 1
        if marker == 0:
            raise ImageFault(Reason.CORRUPT, f"no marker at byte {at}")
        if marker == SOI:
            raise ImageFault(Reason.CORRUPT, f"a second image begins inside the first, at byte {at - 1}")
        if marker == _TEM or marker in _RESTARTS:
            continue
        if marker != EOI:
            length = int.from_bytes(data[at + 1 : at + 3], "big")
            end += length
            if max(at + 3, end) > size:
                raise ImageFault(Reason.TRUNCATED, "ends inside a header segment")
            if length < 2:
                raise ImageFault(Reason.CORRUPT, f"a header segment of length {length} at byte {at + 1}")
        yield marker, data[at + 3 : end], at - 1, end
        if marker == SOS and scan_end:
            end = scan_end - 2
        elif marker == SOS:
            found = _NEXT_MARKER.search(data, end)
            if found is None:
                raise ImageFault(Reason.TRUNCATED, "no end marker (EOI)")
            end = found.start()
