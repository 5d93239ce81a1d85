"""The C++ decoder makes what the portable one makes, whatever JPEG it is given, and survives any bytes."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.images.batch_decoder import INTERPOLATIONS, Geometry, NativeDecoder, PortableDecoder, image_size
from imnet_prep.images.jpeg import jpeg_size
from imnet_prep.images.native import decoder_status
from imnet_prep.loader.augment import eval_geometry, train_geometry
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.types import ImageFault
from tests.imnet_prep.images.variants import VARIANTS
from tests.synthetic import encode, picture

pytestmark = pytest.mark.skipif(not decoder_status()[0], reason=decoder_status()[1])
TOLERANCE = 1  # of 255, bilinear, no reduction in the DCT domain: the resize rounds in 14 bits, Pillow in 22
MEAN_TOLERANCE = 1.0  # of 255, the mean over any one photograph, with the reduction


def _geometry(images: list[bytes], mode: str = "train", size: int = 48, epoch: int = 0) -> Geometry:
    sizes, faults = PortableDecoder().sizes(images)
    assert not faults
    if mode == "eval":
        return eval_geometry(EvalOptions(1, size), sizes)
    return train_geometry(TrainOptions(1, size), sizes, 0, epoch, np.arange(len(images), dtype=np.uint64))


def _decode(
    decoder: PortableDecoder | NativeDecoder, images: list[bytes], geometry: Geometry, size: int = 48,
    interpolation: str = "bilinear",
) -> NDArray[np.uint8]:  # fmt: skip
    out = np.full((len(images), size, size, 3), 77, dtype=np.uint8)
    assert decoder.decode(images, geometry, interpolation, out) == {}
    return out


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", VARIANTS)
def test_pixels_are_those_of_the_portable_decoder(name: str, mode: str) -> None:
    repeats = 1 if mode == "eval" else 12
    images = [VARIANTS[name]] * repeats
    geometry = _geometry(images, mode)
    expected = _decode(PortableDecoder(), images, geometry)
    for fast in (False, True):
        found = _decode(NativeDecoder(reduce=False, fast=fast), images, geometry)
        assert np.abs(found.astype(int) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_is_close_to_pillows(interpolation: str) -> None:
    images = [encode(picture(seed, 0, 150 + seed, 100 + 3 * seed)) for seed in range(20)]
    geometry = _geometry(images)
    expected = _decode(PortableDecoder(), images, geometry, interpolation=interpolation)
    found = _decode(NativeDecoder(), images, geometry, interpolation=interpolation)
    assert np.abs(found.astype(int) - expected).mean() < 0.1


@pytest.mark.parametrize("side", [1, 2, 3, 7, 8, 9, 10, 11, 16, 33])
def test_any_output_size_is_written_whole_and_nothing_beyond(side: int) -> None:
    images = [VARIANTS["subsampling_420"]] * 3
    geometry = _geometry(images, size=side)
    around = np.full((5, side, side, 3), 77, dtype=np.uint8)
    assert NativeDecoder(reduce=False).decode(images, geometry, "bilinear", around[1:4]) == {}
    assert (around[[0, 4]] == 77).all()
    assert np.abs(around[1:4].astype(int) - _decode(PortableDecoder(), images, geometry, side)).max() <= TOLERANCE


def test_flat_areas_keep_their_value() -> None:
    images = [
        encode(np.full((90, 130, 3), value, dtype=np.uint8), quality=100, subsampling=0) for value in (0, 127, 255)
    ]
    found = _decode(NativeDecoder(), images, _geometry(images))
    assert [one.min() == one.max() for one in found] == [True] * 3


def test_the_order_of_images_and_the_thread_change_nothing() -> None:
    images = [data for name, data in VARIANTS.items() if name.startswith(("sub", "prog", "rest", "grey"))] * 4
    geometry = _geometry(images)
    decoder = NativeDecoder()
    expected = _decode(decoder, images, geometry)

    def one(row: int) -> NDArray[np.uint8]:
        part = slice(row, row + 1)
        return _decode(decoder, [images[row]], geometry.of(part))

    with ThreadPoolExecutor(4) as pool:
        found = np.concatenate(list(pool.map(one, reversed(range(len(images))))))
    assert np.array_equal(found[::-1], expected)


def test_large_images_are_halved_within_the_tolerance() -> None:
    images = [
        encode(cv2.resize(picture(seed, 0, 300, 225), (1200, 900), interpolation=cv2.INTER_CUBIC)) for seed in range(3)
    ]
    geometry = _geometry(images, "eval")
    whole = _decode(NativeDecoder(reduce=False), images, geometry)
    halved = _decode(NativeDecoder(reduce=True), images, geometry)
    difference = np.abs(halved.astype(int) - whole)
    assert difference.any()  # else nothing was reduced and the test shows nothing
    assert difference.mean(axis=(1, 2, 3)).max() < MEAN_TOLERANCE


@pytest.mark.slow
@pytest.mark.real_data
def test_real_photographs_are_within_one_level_of_pillow(shared_data: Path) -> None:
    with tarfile.open(shared_data / "imagenet-samples-250.tar") as archive:
        files = [archive.extractfile(member) for member in archive if member.name.endswith(".JPEG")]
        images = [file.read() for file in files[::4] if file is not None]
    geometry = _geometry(images, "eval", 224)
    found = _decode(NativeDecoder(), images, geometry, 224)
    for data, square in zip(images, found, strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        short = min(image.size)
        wide, tall = (256 * edge // short for edge in image.size)
        left, top = round((wide - 224) / 2), round((tall - 224) / 2)
        whole = image.resize((wide, tall), Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
        assert np.abs(np.asarray(whole).astype(int) - square).mean() < MEAN_TOLERANCE
    trained = _geometry(images, "train", 224)
    for fast in (False, True):
        native = _decode(NativeDecoder(fast=fast), images, trained, 224)
        assert np.abs(native.astype(int) - _decode(PortableDecoder(), images, trained, 224)).max() <= TOLERANCE


def test_a_truncated_image_is_a_fault_of_its_row_alone() -> None:
    good = VARIANTS["subsampling_420"]
    images = [good, good[: len(good) // 2], good]
    geometry = _geometry([good] * 3, "eval")
    for fast in (False, True):
        out = np.zeros((3, 48, 48, 3), dtype=np.uint8)
        faults = NativeDecoder(fast=fast).decode(images, geometry, "bilinear", out)
        assert list(faults) == [1]
        assert faults[1]
        assert np.array_equal(out[0], out[2])


def test_damaged_entropy_data_is_reported_alike_with_both_entropy_decoders() -> None:
    good = VARIANTS["quality_100"]
    rng = np.random.default_rng(0)
    images = []
    for _ in range(200):
        data = bytearray(good)
        data[int(rng.integers(700, len(data) - 2))] = int(rng.integers(0, 256))
        images.append(bytes(data))
    geometry = _geometry([good] * 200, "eval")
    found = []
    for fast in (False, True):
        out = np.zeros((200, 48, 48, 3), dtype=np.uint8)
        faults = NativeDecoder(fast=fast).decode(images, geometry, "bilinear", out)
        bad = list(faults)
        out[bad] = 0
        found.append((bad, out))
    assert found[0][0] == found[1][0]
    assert 2 < len(found[0][0]) < 200
    assert np.array_equal(found[0][1], found[1][1])


def test_no_mutation_crashes_either_decoder_or_lies_about_its_size() -> None:
    rng = np.random.default_rng(1)
    sources = [data for name, data in VARIANTS.items() if name not in ("size_1000x3", "png")]
    decoder, portable = NativeDecoder(), PortableDecoder()
    decoded = 0
    for number in range(1500):
        data = bytearray(sources[number % len(sources)])
        for _ in range(int(rng.integers(1, 8))):
            place = int(rng.integers(0, len(data)))
            action = rng.integers(0, 4)
            if action == 0:
                data[place] = int(rng.integers(0, 256))
            elif action == 1:
                data[place] ^= 1 << int(rng.integers(0, 8))
            elif action == 2:
                del data[place : place + int(rng.integers(1, 60))]
            else:
                data[place:place] = data[: int(rng.integers(1, 60))]
            data = data or bytearray(b"\xff")
        images = [bytes(data)]
        sizes, faults = decoder.sizes(images)
        if faults or sizes.prod() > 4_000_000:
            continue
        geometry = train_geometry(TrainOptions(1, 32), sizes, 0, number, np.array([0], dtype=np.uint64))
        out = np.zeros((1, 32, 32, 3), dtype=np.uint8)
        faults = decoder.decode(images, geometry, "bilinear", out)
        decoded += not faults
        if number % 10 == 0:
            portable.decode(images, geometry, "bilinear", out)
    assert decoded > 100


@pytest.mark.parametrize("name", ["subsampling_420", "progressive", "grey", "cmyk", "png"])
@pytest.mark.parametrize("other", [(157, 120), (156, 121), (158, 121), (121, 157), (4000, 3000)])
def test_an_image_of_another_size_than_listed_is_a_fault_of_its_row_alone(name: str, other: tuple[int, int]) -> None:
    images = [VARIANTS[name]] * 3
    sizes = np.array([(157, 121), other, (157, 121)], dtype=np.int32)
    geometry = eval_geometry(EvalOptions(1, 48), sizes)
    for decoder in (NativeDecoder(), NativeDecoder(fast=False), PortableDecoder()):
        out = np.zeros((3, 48, 48, 3), dtype=np.uint8)
        faults = decoder.decode(images, geometry, "bilinear", out)
        assert faults == {1: f"157 x 121 by its header, {other[0]} x {other[1]} by the record list"}
        assert np.array_equal(out[::2], _decode(decoder, images[:2], geometry.of(slice(None, None, 2))))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the memory taken from")
@pytest.mark.parametrize("decoder", ["NativeDecoder", "PortableDecoder"])
def test_a_header_that_lies_is_refused_before_memory_is_taken(decoder: str, tmp_path: Path) -> None:
    data = bytearray(encode(picture(0, 0, 64, 48), progressive=True))
    place = data.index(b"\xff\xc2")
    data[place + 5 : place + 9] = (8000).to_bytes(2, "big") * 2  # 192 MB of coefficients, and as much of pixels
    (tmp_path / "lies.jpg").write_bytes(data)
    program = (
        "import sys, numpy as np; from pathlib import Path; from imnet_prep.loader.augment import *\n"
        "from imnet_prep.loader.options import *\n"
        "from imnet_prep.images.batch_decoder import Geometry, NativeDecoder, PortableDecoder\n"
        "def peak_mb():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith('VmHWM')).split()[1]) // 1024\n"
        "decoder, data = getattr(sys.modules[__name__], sys.argv[1])(), Path(sys.argv[2]).read_bytes()\n"
        "before = peak_mb()\n"
        "for size in ((64, 48), (8000, 8000)):\n"
        "    geometry = eval_geometry(EvalOptions(1, 32), np.array([size], dtype=np.int32))\n"
        "    faults = decoder.decode([data], geometry, 'bilinear', np.zeros((1, 32, 32, 3), dtype=np.uint8))\n"
        "    print(peak_mb() - before, *faults.values(), sep=';')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, decoder, str(tmp_path / "lies.jpg")], capture_output=True, text=True, check=True
    )
    listed, (believed, *_) = (line.split(";") for line in done.stdout.splitlines())
    assert int(listed[0]) < 16
    assert listed[1:] == ["8000 x 8000 by its header, 64 x 48 by the record list"]
    assert int(believed) > 100  # else nothing could be seen here


def test_sizes_are_read_from_headers_of_any_format() -> None:
    for data in VARIANTS.values():
        assert image_size(data) == Image.open(io.BytesIO(data)).size
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"no image", b"\xff\xd8\xff\xc0\x00\x02", b"\xff" * 50):
        assert jpeg_size(data) is None
        with pytest.raises(ImageFault, match="no image header"):
            image_size(data)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    data = bytearray(encode(picture(0, 0, 16, 16)))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageFault, match="65535 x 65535"):
        image_size(bytes(data))


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_damaged_bytes_raise_no_sanitizer_alarm(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "imnet_prep" / "images" / "native"
    names = ["fuzz.cc", "decode_whole.cc", "decoder.cc", "resample.cc"]
    flags = ["-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if "own Huffman decoder" in decoder_status()[1]:
        names += ["entropy.cc", "shrink.cc", "decode_shrunk.cc"]
        flags.append("-DIMNET_FAST_ENTROPY")
    program = tmp_path / "fuzz"
    command = ["g++", *flags, *(str(source / name) for name in names), "-ljpeg", "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and "sanitize" in built.stderr:
        pytest.skip("g++ has no sanitizers here")
    assert built.returncode == 0, built.stderr
    files = []
    for name, data in VARIANTS.items():
        files.append(str(tmp_path / f"{name}.jpg"))
        Path(files[-1]).write_bytes(data)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1"}
    done = subprocess.run(
        [str(program), "4000", "1", *files], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    good, bad, taken = (int(done.stdout.split()[place]) for place in (1, 3, 7))
    assert good > 300
    assert bad > 300
    assert taken > 100 or len(names) == 3
