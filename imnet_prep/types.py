"""The types that cross a stage boundary, in the order in which the data flows.

``ImageRef`` (the place of an image) -> ``RawImage`` (its bytes) -> ``Sample`` or ``Rejected`` -> ``ShardInfo`` ->
``Manifest`` (see :mod:`imnet_prep.records.manifest`) -> ``Batch``.
"""

import enum
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # no command needs it to start
    import numpy as np
    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Reason(enum.StrEnum):
    """Why an image was rejected. The value is the key in ``rejected.jsonl`` and in every summary."""

    EMPTY = "empty"  # zero bytes
    NOT_AN_IMAGE = "not_an_image"  # no known image format
    TRUNCATED = "truncated"  # the stream ends early, or its end marker is missing
    CORRUPT = "corrupt"  # the stream does not decode
    TOO_MANY_PIXELS = "too_many_pixels"  # a decompression bomb, by its header
    TOO_LARGE = "too_large"  # more bytes than a record may hold
    ANIMATED = "animated"  # more than one frame
    UNREADABLE = "unreadable"  # the file or archive member cannot be read
    UNLABELLED = "unlabelled"  # its class is unknown
    DUPLICATE = "duplicate"  # same bytes as another image, with --duplicates reject
    DUPLICATE_NAME = "duplicate_name"  # a second member of the same name


class ImageFault(Exception):
    """An image that cannot be used: the reason and the detail of its rejection."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Change(enum.StrEnum):
    """What was done to, or noticed about, a stored image."""

    FORMAT = "format"  # was not a JPEG: converted
    CMYK = "cmyk"  # CMYK or YCCK: converted to RGB
    SIXTEEN_BIT = "sixteen_bit"  # more than 8 bits per channel: converted
    ALPHA = "alpha"  # had transparency: composed over white
    ORIENTED = "oriented"  # EXIF orientation applied to the pixels
    PROGRESSIVE = "progressive"  # noticed, stored as it was (or baseline where re-encoded)
    GREYSCALE = "greyscale"  # noticed, stored as it was
    EXIF_DAMAGED = "exif_damaged"  # noticed, metadata only
    TRAILING_BYTES = "trailing_bytes"  # bytes after the end marker, noticed
    RESIZED = "resized"  # --short-side


def name_fault(name: object) -> str:
    """Return why something cannot be the file_name of a record, or an empty string."""
    if not isinstance(name, str) or not name:
        return "it has no name"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return "its name holds control characters" if _CONTROL.search(name) else ""


def record_id(split: str, file_name: str) -> int:
    """Return the 64-bit id of a record. Resharding, moving the folder and the worker count do not change it.

    Returns:
        The first 8 bytes, little-endian, of SHA-256 of ``"<split>/<file_name>"`` in UTF-8.
    """
    return int.from_bytes(hashlib.sha256(f"{split}/{file_name}".encode()).digest()[:8], "little")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """The place of an image: a byte range of a file or of an archive (nested archives included).

    Attributes:
        split: ``train``, ``val`` or ``test``.
        class_name: The class folder or wnid; empty for the test split.
        file_name: ``<class_name>/<name>``, or ``<name>`` without a class; unique within its split.
        path: The plain file or the outermost archive.
        offset: First byte of the image in ``path``, in bytes.
        size_bytes: Length in bytes, not compressed.
        url: The URL that it was downloaded from, or empty.
        status: The HTTP status of that download, or None.
        line: Its line in the record list of a records folder, or empty for other sources. An image with a line is
            stored unchanged, as its digests are known.
        deflated_bytes: Length of the raw DEFLATE stream at ``offset``; 0 for an image that is not compressed.
        crc32: The CRC-32 that its bytes must have, or None.
        meta: What the source says of it beyond class and name: a JSON object as text, or empty.
    """

    split: str
    class_name: str
    file_name: str
    path: str
    offset: int
    size_bytes: int
    url: str = ""
    status: int | None = None
    line: str = ""
    deflated_bytes: int = 0
    crc32: int | None = None
    meta: str = ""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {self.split!r}")
        if fault := name_fault(self.file_name):
            raise ValueError(f"file_name {self.file_name!r}: {fault}")


@dataclass(frozen=True, slots=True)
class RawImage:
    """An image as found: its reference and its bytes, not checked yet."""

    ref: ImageRef
    data: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """An image ready to be stored: all of its compressed data was read.

    Attributes:
        image: The bytes to store: a JPEG that any decoder reads as 8-bit greyscale or YCbCr.
        width: Columns of ``image``, in pixels.
        height: Rows of ``image``, in pixels.
        sha256: Hex digest of ``image``.
        source_sha256: Hex digest of the bytes as found.
        changes: What was done or noticed, in :class:`Change` order.
    """

    image: bytes
    width: int
    height: int
    sha256: str
    source_sha256: str
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A rejected image.

    Attributes:
        split: The split of its source.
        file_name: Its name, as in :class:`ImageRef` (or the archive member's, escaped if it is not printable).
        reason: Why it was rejected.
        detail: One line for the user.
        thumbnail: The part that can be decoded, as a small JPEG in base64; empty for most.
    """

    split: str
    file_name: str
    reason: Reason
    detail: str = ""
    thumbnail: str = ""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read back what :func:`dataclasses.asdict` wrote, from JSON; keys of later versions are ignored."""
        known = {name: values[name] for name in cls.__slots__ if name in values}
        return cls(**{**known, "reason": Reason(values["reason"])})


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One MindRecord file and its index, as committed.

    Attributes:
        file: Path relative to the records folder, ``train/train-00000-of-00128.mindrecord``.
        rows: Number of records.
        size_bytes: Size of the data file.
        sha256: Hex digest of the data file.
        index_size_bytes: Size of the ``.db``.
        index_sha256: Hex digest of the ``.db``.
    """

    file: str
    rows: int
    size_bytes: int
    sha256: str
    index_size_bytes: int
    index_sha256: str


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of a training or evaluation step.

    Attributes:
        image: uint8 (N, H, W, 3), RGB.
        label: int32 (N,).
        record_id: uint64 (N,).
        mix_label: int32 (N,), the second label if MixUp or CutMix was applied, else None.
        mix_weight: float32 (N,), the share of ``label`` (1 - share is ``mix_label``'s), else None.
    """

    image: "NDArray[np.uint8]"
    label: "NDArray[np.int32]"
    record_id: "NDArray[np.uint64]"
    mix_label: "NDArray[np.int32] | None" = None
    mix_weight: "NDArray[np.float32] | None" = None

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of worker time since the split was opened, all threads together, and the images they made."""

    read_s: float = 0.0
    check_s: float = 0.0
    decode_s: float = 0.0
    augment_s: float = 0.0
    images: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(self)))


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a long job, for a progress bar or a log line.

    Attributes:
        done: Units finished. total: Units in all, or None if unknown. unit: What is counted.
        bytes_done: Bytes handled so far.
        counts: Further counters by name, e.g. ``{"rejected": 2}``.
        note: A short text, e.g. the loss.
        per_s: Units a second as the job measures it, start-up left out, 0 while it is unknown; None: not measured.
    """

    done: int
    total: int | None
    unit: str = "images"
    bytes_done: int = 0
    counts: tuple[tuple[str, int], ...] = ()
    note: str = ""
    per_s: float | None = None


ProgressCallback = Callable[[Progress], None]
Stop = Callable[[], bool]  # returns whether to stop once the work in progress is finished
