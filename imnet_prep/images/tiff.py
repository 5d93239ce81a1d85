"""Read the first directory of a TIFF: of a TIFF file, or of the EXIF block in a JPEG.

Source: TIFF 6.0, section 2.
"""

import struct
from typing import Literal

ORIENTATION, BITS_PER_SAMPLE = 0x0112, 0x0102  # tags
SHORT = 3  # the field type of 16-bit numbers
FIELD_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # by field type
Order = Literal["little", "big"]
Entry = tuple[int, int, int, int]  # tag, field type, number of values, and where the values or their place are


def first_directory(tiff: bytes) -> tuple[Order, list[Entry], bool] | None:
    """Return the byte order, the entries that are there, and whether those are all; None without a directory."""
    order: Order = "little" if tiff.startswith(b"II") else "big"
    start = int.from_bytes(tiff[4:8], order)
    if len(tiff) < 8 or not 8 <= start <= len(tiff) - 2:
        return None
    end = start + 2 + 12 * int.from_bytes(tiff[start : start + 2], order)
    layout = struct.Struct("<HHI" if order == "little" else ">HHI")
    places = range(start + 2, min(end, len(tiff) - 11), 12)
    return order, [(*layout.unpack_from(tiff, at), at + 8) for at in places], end <= len(tiff)
