"""Read the bytes of an image: compressed, with a checksum, changed; and what its source says of it."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.sources import read
from imnet_prep.sources.base import MAX_META_BYTES, meta_text
from imnet_prep.types import ImageRef, RawImage, Reason, Rejected

DATA = b"not every byte is random " * 40


@pytest.fixture
def deflated(tmp_path: Path) -> ImageRef:
    """An image in an archive, compressed."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    packed = packer.compress(DATA) + packer.flush()
    (tmp_path / "archive").write_bytes(b"head" + packed + b"tail")
    path = str(tmp_path / "archive")
    return ImageRef("train", "a", "a/1.jpg", path, 4, len(DATA), deflated_bytes=len(packed), crc32=zlib.crc32(DATA))


def test_a_compressed_image_is_inflated(deflated: ImageRef) -> None:
    assert read(deflated) == RawImage(deflated, DATA)


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"crc32": 7}, "CRC-32"),
        ({"size_bytes": len(DATA) - 1}, "bytes read"),
        ({"size_bytes": len(DATA) + 1}, "bytes read"),
        ({"deflated_bytes": 9}, "bytes read"),
        ({"offset": 2}, "damaged"),
        ({"deflated_bytes": 0, "size_bytes": 10}, "CRC-32"),
    ],
)
def test_what_does_not_agree_with_the_archive_is_rejected(
    deflated: ImageRef, change: dict[str, Any], detail: str
) -> None:
    found = read(replace(deflated, **change))
    assert isinstance(found, Rejected)
    assert found.reason is Reason.UNREADABLE
    assert detail in found.detail


def test_meta_is_json_that_can_be_stored() -> None:
    values = {
        "b": 1,
        "a": "\ud800é",
        "none": None,
        "nan": math.nan,
        "deep": [math.inf],
        "raw": b"x",
        "list": [1, {"x": 2}],
    }
    assert json.loads(meta_text(values)) == {"a": "?é", "b": 1, "list": [1, {"x": 2}]}
    assert meta_text({"a": None}) == meta_text({}) == ""
    meta_text(values).encode()


def test_the_longest_values_are_left_out_of_a_meta_that_is_too_long() -> None:
    text = meta_text({"caption": "a cat", "embedding": [0.5] * 9000, "exif": "x" * 9000, "note": "y" * 9000})
    assert len(text.encode()) <= MAX_META_BYTES
    assert set(json.loads(text)) == {"caption", "exif"}
    assert meta_text({"x": "é" * MAX_META_BYTES}) == ""
    assert len(meta_text({"x": "y" * (MAX_META_BYTES - 8)}).encode()) == MAX_META_BYTES
