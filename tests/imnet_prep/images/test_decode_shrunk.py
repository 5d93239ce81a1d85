"""Decoding and shrinking in one pass gives OpenCV's and Pillow's pixels to the bit, or nothing."""

from __future__ import annotations

import ctypes
import io
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.images import batch_decoder, native
from imnet_prep.images.batch_decoder import INTERPOLATIONS
from imnet_prep.images.check import ValidateOptions, validate
from imnet_prep.images.decode import decode_jpeg
from imnet_prep.images.encode import short_side_size, shrink
from imnet_prep.images.jpeg import read_markers
from imnet_prep.images.native import decode_shrunk, decoder_status, function
from imnet_prep.loader.augment import train_geometry
from imnet_prep.loader.options import TrainOptions
from imnet_prep.types import ImageFault, ImageRef, RawImage
from tests.imnet_prep.images.libraries import without_library
from tests.imnet_prep.images.variants import mutated
from tests.synthetic import encode, jpeg, odd_images, picture

pytestmark = pytest.mark.skipif(
    function("imnet_decode_shrunk") is None, reason="the C++ library is not built, or without jpegint.h"
)
NATIVE = Path(native.__file__).parent
TAKEN: dict[str, dict[str, object]] = {
    "444": {"subsampling": 0, "quality": 95}, "422": {"subsampling": 1}, "420": {"subsampling": 2},
    "optimised": {"optimize": True}, "worst": {"quality": 3}, "best": {"quality": 100},
    "restarts": {"restart_marker_blocks": 1}, "restart_rows": {"restart_marker_rows": 1},
}  # fmt: skip


def both(data: bytes, short_side: int, reduce: int = 1) -> bool:
    """Shrink with and without the library, and compare; gives whether the library took it."""
    info = read_markers(data)
    width, height = -(-info.width // reduce), -(-info.height // reduce)
    wanted = short_side_size(width, height, min(short_side, width, height))
    pixels, end = decode_shrunk(
        data, components=info.components, reduce=reduce, size=(info.width, info.height), small=wanted
    )
    if pixels is None:
        return False
    decoded, said = decode_jpeg(data, grey=info.components == 1, reduce=reduce)
    assert said == ""
    assert decoded is not None
    assert end == info.size_bytes
    assert np.array_equal(pixels, shrink(decoded, *wanted))
    return True


def batch(images: list[bytes], interpolation: str, side: int) -> NDArray[np.uint8]:
    """Decode random crops of the images, reduced in the DCT domain where that is allowed."""
    decoder = batch_decoder.NativeDecoder()
    sizes, _ = decoder.sizes(images)
    geometry = train_geometry(TrainOptions(1, side), sizes, 0, 0, np.arange(len(images), dtype=np.uint64))
    out = np.empty((len(images), side, side, 3), dtype=np.uint8)
    assert decoder.decode(images, geometry, interpolation, out) == {}
    return out


def grey(label: int, width: int, height: int) -> bytes:
    return encode(Image.fromarray(picture(label, label, width, height)).convert("L"))


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("name", [*TAKEN, "grey"])
def test_pixels_are_those_of_opencv_and_pillow(name: str, reduce: int) -> None:
    for number, (width, height) in enumerate([(157, 121), (96, 128), (65, 49), (17, 16), (8, 9), (333, 24)]):
        data = grey(number, width, height) if name == "grey" else jpeg(number, 3, width, height, **TAKEN[name])
        assert all(both(data, short_side, reduce) for short_side in (1, 5, 24, 47, 120))


def test_every_factor_gives_pillows_pixels() -> None:
    """Along both axes by different factors, down to one pixel, for colour and grey."""
    for data, components in ((jpeg(1, 1, 131, 89, quality=90), 3), (grey(1, 131, 89), 1)):
        decoded, _ = decode_jpeg(data, grey=components == 1)
        assert decoded is not None
        for width, height in [(131, 89), (130, 89), (131, 88), (88, 60), (66, 45), (65, 44), (33, 89), (10, 7), (1, 1)]:
            pixels, _ = decode_shrunk(data, components=components, reduce=1, size=(131, 89), small=(width, height))
            assert pixels is not None
            assert np.array_equal(pixels, shrink(decoded, width, height)), (width, height)


def test_nothing_is_enlarged_and_no_header_is_trusted() -> None:
    data = jpeg(0, 0, 48, 40)
    assert decode_shrunk(data, components=3, reduce=1, size=(48, 40), small=(49, 40)) == (None, 0)
    assert decode_shrunk(data, components=3, reduce=1, size=(49, 40), small=(24, 20)) == (None, 0)
    assert decode_shrunk(data, components=1, reduce=1, size=(48, 40), small=(24, 20)) == (None, 0)


@pytest.mark.parametrize("name", ["411", "440"])
def test_rare_samplings_are_left_to_opencv(name: str) -> None:
    sampling = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}")
    data = cv2.imencode(".jpg", picture(1, 1), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling])[1].tobytes()
    assert not both(data, 24)


def test_progressive_images_are_left_to_opencv() -> None:
    assert not both(jpeg(progressive=True), 24)
    assert not both(jpeg(progressive=True), 24, 2)


def test_tables_of_one_image_do_not_serve_the_next() -> None:
    """libjpeg keeps tables between images; a file without its own must not be read with another's."""
    whole = jpeg(0, 0)
    at = whole.index(b"\xff\xdb")
    without = whole[:at] + whole[at + 2 + int.from_bytes(whole[at + 2 : at + 4], "big") :]
    assert both(whole, 24)
    assert not both(without, 24)


def samples() -> list[bytes]:
    drawn = [jpeg(k, k, 60 + 9 * k, 40 + 7 * k, **options) for k, options in enumerate(TAKEN.values())]
    return [*drawn, grey(2, 70, 50), jpeg(0, 0, 1, 1), jpeg(progressive=True)]


def test_what_it_takes_libjpeg_decodes_without_a_complaint() -> None:
    rng, pool, taken = random.Random(5), samples(), 0
    for number in range(6000):
        data = mutated(rng.choice(pool), rng)
        try:
            info = read_markers(data)
        except ImageFault:
            assert decode_shrunk(data, components=3, reduce=1, size=(60, 40), small=(30, 20)) == (None, 0)
            continue
        if info.components in (1, 3) and info.width * info.height < 1_000_000:
            taken += both(data, 24, 1 << number % 4)
    assert taken > 1000  # flips that only change values: the test has something to compare


def stored(images: list[bytes], short_side: int) -> Iterator[object]:
    for data in images:
        raw = RawImage(ImageRef("train", "c", "c/x.jpg", "x", 0, len(data)), data)
        yield validate(raw, ValidateOptions(short_side=short_side))


def test_results_are_the_same_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(17)
    images = [mutated(data, rng) for data in samples() * 30] + [odd.data for odd in odd_images().values()]
    images += [jpeg(4, 4, 400, 300), jpeg(5, 5, 130, 61), jpeg(6, 6, 48, 96)]
    with_library = [list(stored(images, short_side)) for short_side in (16, 33, 48)]
    without_library(monkeypatch)
    assert [list(stored(images, short_side)) for short_side in (16, 33, 48)] == with_library


def test_threads_share_nothing() -> None:
    images = [jpeg(k, k, 90 + k, 70, subsampling=k % 3) for k in range(40)] * 4
    expected = list(stored(images, 32))
    with ThreadPoolExecutor(4) as pool:
        assert [next(iter(result)) for result in pool.map(lambda data: list(stored([data], 32)), images)] == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_machines_without_avx2_make_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [jpeg(k, k, 60 + 31 * k, 40 + 23 * k, subsampling=k % 3) for k in range(12)]
    with_avx2 = [batch(images, interpolation, side) for interpolation in INTERPOLATIONS for side in (9, 64)]
    library = tmp_path / "portable.so"
    sources = [str(NATIVE / f"{name}.cc") for name in ("decoder", "resample", "entropy", "shrink", "decode_shrunk")]
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-DIMNET_FAST_ENTROPY", "-DIMNET_PORTABLE"]
    subprocess.run(["g++", *flags, *sources, "-ljpeg", "-o", str(library)], check=True)
    monkeypatch.setattr(native, "load", lambda: (ctypes.CDLL(str(library)), ""))
    monkeypatch.setattr(native, "function", cache(function.__wrapped__))
    monkeypatch.setattr(batch_decoder, "function", native.function)
    assert all(both(jpeg(1, 1, 131, 89, **options), short_side) for options in TAKEN.values() for short_side in (9, 50))
    assert "avx2" not in native.decoder_status()[1]
    found = [batch(images, interpolation, side) for interpolation in INTERPOLATIONS for side in (9, 64)]
    assert all(np.array_equal(one, other) for one, other in zip(found, with_avx2, strict=True))


@pytest.mark.slow
@pytest.mark.real_data
def test_photographs_are_taken_and_come_out_as_pillow_shrinks_them(shared_data: Path) -> None:
    taken, distances, whole = 0, [], 0
    with tarfile.open(shared_data / "imagenet-samples-250.tar") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            data = file.read() if file is not None else b""
            if not data.startswith(b"\xff\xd8"):
                continue
            info = read_markers(data)
            short = min(info.width, info.height)
            if short <= 256:
                continue
            whole += 1
            reduce = max(divisor for divisor in (1, 2, 4, 8) if divisor <= short // 256)
            taken += both(data, 256, reduce)
            wide, tall = short_side_size(info.width, info.height, 256)
            if whole % 5 == 0 or reduce > 1:
                with Image.open(io.BytesIO(data)) as image:
                    theirs = np.asarray(image.convert("RGB").resize((wide, tall), Image.Resampling.BILINEAR))
                ours, _ = decode_jpeg(data, reduce=reduce)
                assert ours is not None
                distances.append(np.abs(shrink(ours, wide, tall)[..., ::-1].astype(int) - theirs).mean())
    assert whole > 200
    assert taken >= 0.98 * whole
    assert np.mean(distances) < 1.0
    assert max(distances) < 3.5  # halved in the DCT domain, which keeps more of the finest detail


def test_load_says_which_library_it_is() -> None:
    assert "own Huffman decoder" in decoder_status()[1]
