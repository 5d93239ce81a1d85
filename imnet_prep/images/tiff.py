"""Read the first directory of a TIFF: of a TIFF file, or of the EXIF block in a JPEG.

Source: TIFF 6.0, section 2.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple

ORIENTATION, BITS_PER_SAMPLE = 0x0112, 0x0102  # tags
SHORT = 3  # the field type of 16-bit numbers
FIELD_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # by field type


class Entry(NamedTuple):
    """A directory entry.

    Attributes:
        tag: What it says. kind: Its field type. number: Of values.
        at: Where its last four bytes are: the values, or where the values are.
    """

    tag: int
    kind: int
    number: int
    at: int


class Directory(NamedTuple):
    """A directory, as far as the data reaches.

    Attributes:
        order: Byte order. start: Where the directory is.
        entries: Those that the data holds. whole: It holds all of them.
    """

    order: Literal["little", "big"]
    start: int
    entries: list[Entry]
    whole: bool


def first_directory(tiff: bytes) -> Directory | None:
    """Return the first directory; None where the data ends before it."""
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    start = int.from_bytes(tiff[4:8], order)
    if len(tiff) < 8 or start + 2 > len(tiff):
        return None
    end = start + 2 + 12 * int.from_bytes(tiff[start : start + 2], order)
    places = range(start + 2, min(end, len(tiff) - 11), 12)
    layout = struct.Struct("<HHI" if order == "little" else ">HHI")
    return Directory(
        order, start, [Entry._make((*layout.unpack_from(tiff, at), at + 8)) for at in places], end <= len(tiff)
    )
