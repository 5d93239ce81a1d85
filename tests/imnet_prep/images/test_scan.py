"""The fast scan never calls clean what libjpeg complains of, and does call clean what encoders write."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imnet_prep.images.check import ValidateOptions, validate
from imnet_prep.images.decode import decode_jpeg
from imnet_prep.images.jpeg import read_markers
from imnet_prep.images.native import clean_end, load
from imnet_prep.types import ImageRef, RawImage
from tests.imnet_prep.images.libraries import without_library
from tests.imnet_prep.images.test_check import miscoded
from tests.synthetic import encode, jpeg, odd_images, picture

pytestmark = pytest.mark.skipif(load()[0] is None, reason=load()[1])
ENCODINGS: list[dict[str, object]] = [
    {"quality": 30}, {"quality": 100, "subsampling": 0}, {"subsampling": 1}, {"optimize": True},
    {"restart_marker_blocks": 3}, {"restart_marker_rows": 1},
]  # fmt: skip


def samples() -> list[bytes]:
    drawn = [jpeg(k, k, 48 + 7 * k, 40 + 3 * k, **options) for k, options in enumerate(ENCODINGS)]
    grey = io.BytesIO()
    Image.fromarray(picture(1, 1)).convert("L").save(grey, "JPEG")
    return [*drawn, grey.getvalue(), jpeg(0, 0, 1, 1), jpeg(0, 0, 8, 8)]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, insert, or splice."""
    changed, kind = bytearray(data), rng.randrange(5)
    place = rng.randrange(2, len(data))
    if kind < 2:
        for _ in range(rng.choice((1, 1, 4))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del changed[place : place + rng.choice((1, 2, 9))]
    elif kind == 3:
        changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 5))))
    else:
        changed = changed[:place] + b"\xff\xd9"
    return bytes(changed)


def periodic() -> list[bytes]:
    """Images whose stream repeats itself, so that a lane may fall into a wrong step, and others of several lanes."""
    rng = np.random.default_rng(3)
    flat = np.full((400, 400, 3), (90, 130, 40), np.uint8)
    tile = rng.integers(0, 256, (16, 16, 3), np.uint8)
    noise = rng.integers(112, 144, (240, 160, 3), np.uint8)
    pictures = (flat, np.tile(tile[:8, :8], (30, 30, 1)), np.tile(tile, (12, 12, 1)), noise, picture(2, 2, 240, 180))
    encodings: tuple[dict[str, Any], ...] = (
        {"subsampling": 0}, {"subsampling": 1, "quality": 95}, {"quality": 50, "subsampling": 2, "optimize": True},
        {"quality": 40, "subsampling": 0, "optimize": True}, {"restart_marker_rows": 3},
    )  # fmt: skip
    colour = [encode(pixels, **options) for pixels in pictures for options in encodings]
    return colour + [
        encode(Image.fromarray(pixels).convert("L"), quality=50, optimize=k % 2) for k, pixels in enumerate(pictures)
    ]


def slipped(data: bytes, rng: random.Random) -> bytes:
    """Change the stream's length: a bit or some bytes more or fewer, or rows more or fewer in the header."""
    start = data.index(b"\xff\xda") + 14
    place, kind = rng.randrange(start, len(data) - 2), rng.randrange(4)
    if kind == 0:
        size = data.index(b"\xff\xc0") + 5
        height = int.from_bytes(data[size : size + 2], "big") + rng.choice((-16, -8, 8, 16))
        return data[:size] + max(1, height).to_bytes(2, "big") + data[size + 2 :]
    if kind == 1:
        return data[:place] + data[place + rng.randrange(1, 40) : -2] + b"\xff\xd9"
    if kind == 2:
        return data[:place] + data[max(start, place - rng.randrange(1, 40)) : -2] + b"\xff\xd9"
    plain = data[start:-2].replace(b"\xff\x00", b"\xff")
    bits, at = f"{int.from_bytes(plain, 'big'):0{8 * len(plain)}b}", rng.randrange(8 * len(plain))
    bits = bits[:at] + (bits[at + 1 :] + "1" if rng.randrange(2) else rng.choice("01") + bits[at:] + "1" * 7)
    whole = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    return data[:start] + whole + b"\xff\xd9"


def test_whole_baseline_images_are_clean() -> None:
    assert all(clean_end(data) == len(data) for data in samples())


def test_what_it_does_not_know_is_in_doubt() -> None:
    progressive = jpeg(progressive=True)
    assert not any(clean_end(data) for data in (b"", b"\xff\xd8", b"GIF89a", progressive, *(d[:-2] for d in samples())))


def test_clean_means_that_libjpeg_has_no_complaint() -> None:
    rng, clean = random.Random(7), 0
    pool = samples()
    for _ in range(4000):
        data = damaged(rng.choice(pool), rng)
        if clean_end(data):
            clean += 1
            pixels, said = decode_jpeg(data, grey=True, reduce=8)
            assert pixels is not None
            assert "orrupt" not in said
            assert "remature" not in said
    assert clean > 500  # flips that only change values: the test has something to compare


@pytest.mark.slow
@pytest.mark.parametrize("count", [1500, pytest.param(6000, marks=pytest.mark.long)])
def test_several_lanes_come_to_the_answer_of_one(count: int) -> None:
    rng, clean = random.Random(17), 0
    pool = periodic()
    assert all(clean_end(data, lanes) == len(data) for data in pool for lanes in (1, 2, 3, 4))
    assert sum(len(data) > 4 * 1024 for data in pool) >= 15  # a lane reads a kilobyte at least
    for k in range(count):
        data = (damaged, slipped)[k % 2](pool[k % len(pool)], rng)
        end = clean_end(data, 1)
        assert [clean_end(data, lanes) for lanes in (2, 3, 4)] == [end] * 3
        clean += end > 0
        if end and k % 5 == 0:
            pixels, said = decode_jpeg(data, grey=True, reduce=8)
            assert pixels is not None
            assert "orrupt" not in said
            assert "remature" not in said
    assert 0.05 * count < clean < 0.95 * count


def test_results_are_the_same_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(11)
    images = [damaged(data, rng) for data in samples() * 40] + [odd.data for odd in odd_images().values()]
    images += miscoded(jpeg(1, 2, 240, 180), 10)
    raws = [RawImage(ImageRef("train", "c", "c/x.jpg", "x", 0, len(data)), data) for data in images]
    fast = [validate(raw, ValidateOptions()) for raw in raws]
    without_library(monkeypatch)
    assert [validate(raw, ValidateOptions()) for raw in raws] == fast


def test_the_end_is_where_the_walk_over_the_markers_finds_it() -> None:
    rng = random.Random(13)
    for data in (damaged(data, rng) for data in samples() * 200):
        if end := clean_end(data):
            info = read_markers(data)
            assert info.size_bytes == end
            assert read_markers(data, end) == replace(info, clean=True)
    trailed = jpeg() + b"\xff\xd8 a second image \xff\xd9"
    assert clean_end(trailed) == len(jpeg())


@pytest.mark.real_data
def test_photographs_are_clean(shared_data: Path) -> None:
    import tarfile

    with tarfile.open(shared_data / "imagenet-samples-250.tar") as archive:
        files = [archive.extractfile(member) for member in archive if member.isfile()]
        photographs = [data for file in files if file and (data := file.read()).startswith(b"\xff\xd8")]
    assert len(photographs) >= 250
    assert sum(clean_end(data) > 0 for data in photographs) >= 0.98 * len(photographs)
