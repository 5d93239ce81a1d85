"""The same picture: copies are found whatever was done to them, different photographs are not."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from imnet_prep.check.duplicates import Pair, candidates, near_duplicates
from imnet_prep.images.perceptual_hash import BITS, hash_image, signature
from tests.synthetic import encode


def scene(seed: int, width: int, height: int) -> Image.Image:
    """A picture with content at every scale, as photographs have it."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for size in (3, 6, 12, 24, 48):
        layer = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((width, height), 3)
        pixels += (np.asarray(layer, float) - 128) * (1.6 / size**0.5)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def variants(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """Copies as they turn up: re-encoded at q60, scaled to 70 %, mirrored, and all three."""
    size = round(0.7 * image.width), round(0.7 * image.height)
    small = image.resize(size, Image.Resampling.BICUBIC)
    yield "q60", encode(image, quality=60)
    yield "scaled", encode(small, quality=90)
    yield "mirrored", encode(ImageOps.mirror(image), quality=90)
    yield "all", encode(ImageOps.mirror(small), quality=60)


def missed_and_false(images: list[Image.Image], originals: list[bytes]) -> tuple[list[tuple[int, str]], list[Pair]]:
    """Copies without a pair to one of their own, and pairs of different images."""
    data = list(originals)
    owner = list(range(len(images)))
    kinds = ["original"] * len(images)
    for number, image in enumerate(images):
        for kind, copy in variants(image):
            data.append(copy)
            owner.append(number)
            kinds.append(kind)
    bits = np.stack([hash_image(item).bits for item in data])
    pairs = near_duplicates(bits, data.__getitem__)
    paired = {pair.second for pair in pairs if owner[pair.first] == owner[pair.second]}
    missed = [(owner[k], kinds[k]) for k in range(len(images), len(data)) if k not in paired]
    return missed, [pair for pair in pairs if owner[pair.first] != owner[pair.second]]


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("count", [80, pytest.param(250, marks=pytest.mark.long)])
def test_of_photographs_every_copy_is_found_and_no_pair_is_false(shared_data: Path, count: int) -> None:
    with tarfile.open(shared_data / "imagenet-samples-250.tar") as archive:
        members = [archive.extractfile(member) for member in archive if member.isfile()]
        originals = [member.read() for member in members if member is not None]
    assert len(originals) == 250
    originals = originals[:count]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in originals]
    missed, false = missed_and_false(images, originals)
    assert missed == []
    assert false == []


@pytest.mark.parametrize("size", [(64, 64), (90, 140), (333, 251), (1001, 407)])
def test_copies_are_found_at_any_size(size: tuple[int, int]) -> None:
    images = [scene(seed, *size) for seed in range(8)]
    missed, false = missed_and_false(images, [encode(image, quality=90) for image in images])
    assert missed == []
    assert false == []


def test_mirroring_flips_the_bits_that_are_known() -> None:
    image = scene(3, 300, 200)
    pixels = np.asarray(image.convert("L"))
    plain, mirrored = signature(pixels, 300, 200), signature(np.ascontiguousarray(pixels[:, ::-1]), 300, 200)
    found = list(candidates(np.stack([plain, mirrored])))
    assert {(pair.first, pair.second, pair.mirrored) for pair in found} == {(0, 1, True)}


def brute(bits: NDArray[np.uint64], most: int) -> set[tuple[int, int]]:
    rows = np.unpackbits(bits.view(np.uint8), axis=1)
    distance = (rows[:, None] != rows[None]).sum(axis=2)
    return {(i, j) for i, j in np.argwhere(distance <= most).tolist() if i < j}


def test_sorting_finds_what_comparing_all_pairs_finds() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 63, (400, 2), dtype=np.uint64)
    for copy in range(100):  # each of the last hundred is one of the first with up to 8 bits changed
        bits[300 + copy] = bits[copy]
        for bit in rng.choice(BITS, copy % 9, replace=False).tolist():
            bits[300 + copy, bit // 64] ^= np.uint64(1 << (bit % 64))
    found = {(pair.first, pair.second) for pair in candidates(bits) if not pair.mirrored}
    assert found >= {(copy, 300 + copy) for copy in range(100)}
    assert found <= brute(bits, 24)


def test_a_crowd_of_equal_pictures_is_joined_without_all_pairs() -> None:
    data = encode(scene(7, 200, 150), quality=90)
    bits = np.stack([hash_image(data).bits] * 500)
    reads: list[int] = []

    def read(position: int) -> bytes:
        reads.append(position)
        return data

    pairs = near_duplicates(bits, read)
    assert {pair.second for pair in pairs} == set(range(1, 500))
    assert len(pairs) == 499
    assert len(reads) <= 1000


def test_few_hashes_are_kept_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [scene(seed, 120, 90) for seed in range(6)]
    data = [encode(image, quality=quality) for image in images for quality in (90, 60, 40)]
    bits = np.stack([hash_image(item).bits for item in data])
    expected = near_duplicates(bits, data.__getitem__)
    monkeypatch.setattr("imnet_prep.check.duplicates.MAX_HASHES", 1)
    assert near_duplicates(bits, data.__getitem__) == expected
    assert len(expected) == 12
