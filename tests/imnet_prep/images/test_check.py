"""Every kind of file ends as the bytes that decoders read alike, or as a rejection with its reason."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from imnet_prep.errors import PlanError
from imnet_prep.images.check import ValidateOptions, examine, validate
from imnet_prep.images.decode import bgr, decode_jpeg
from imnet_prep.images.encode import orient, short_side_size, shrink
from imnet_prep.images.stderr import captured_stderr
from imnet_prep.types import Change, ImageFault, ImageRef, RawImage, Reason, Rejected, Sample
from tests import synthetic
from tests.imnet_prep.images.libraries import without_library
from tests.synthetic import Picture, encode, exif, jpeg, odd_images, picture, with_exif

PLAIN = ValidateOptions()
SMALL = ValidateOptions(short_side=24)


def check(data: bytes, options: ValidateOptions = PLAIN) -> Sample | Rejected:
    return validate(RawImage(ImageRef("train", "c", "c/x.jpg", "x.jpg", 0, len(data)), data), options)


def kept(data: bytes, options: ValidateOptions = PLAIN) -> Sample:
    result = check(data, options)
    assert isinstance(result, Sample), result
    return result


def refused(data: bytes, options: ValidateOptions = PLAIN) -> Rejected:
    result = check(data, options)
    assert isinstance(result, Rejected), result
    return result


def rgb(data: bytes) -> Picture:
    """What a training decoder sees: OpenCV, EXIF ignored."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return np.ascontiguousarray(pixels[:, :, ::-1])


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open with Pillow, which warns of the damaged EXIF that is kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            yield image


def distance(a: Picture, b: Picture) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).mean())


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, odd in odd_images().items() if odd.reason is None])
def test_an_odd_image_is_kept_and_noted(name: str) -> None:
    odd = odd_images()[name]
    sample = kept(odd.data)
    assert sample.changes == odd.changes
    with opened(sample.image) as image:
        assert image.size == (sample.width, sample.height)
        assert image.mode == ("L" if name == "grey" else "RGB")
    assert sample.sha256 == hashlib.sha256(sample.image).hexdigest()
    assert sample.source_sha256 == hashlib.sha256(odd.data).hexdigest()


@pytest.mark.parametrize("name", [name for name, odd in odd_images().items() if odd.reason is not None])
def test_an_odd_image_is_rejected_for_its_reason(name: str) -> None:
    odd = odd_images()[name]
    for options in (PLAIN, SMALL):
        rejected = refused(odd.data, options)
        assert rejected.reason is odd.reason
        assert rejected.detail
        assert "\n" not in rejected.detail


@pytest.mark.parametrize("quality", [30, 75, 90, 95, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_clean_jpeg_is_stored_byte_for_byte(quality: int, subsampling: int) -> None:
    data = jpeg(2, 3, 61, 47, quality=quality, subsampling=subsampling)
    sample = kept(data)
    assert sample.image is data
    assert (sample.width, sample.height, sample.changes) == (61, 47, ())


@pytest.mark.parametrize("name", ["grey", "progressive", "exif_damaged", "trailing", "restarts"])
def test_what_is_only_noticed_is_stored_byte_for_byte(name: str) -> None:
    data = odd_images()[name].data
    assert kept(data).image == data


@pytest.mark.parametrize("name", ["cmyk", "ycck"])
def test_inks_become_the_colours_they_print(name: str) -> None:
    assert distance(rgb(kept(odd_images()[name].data).image), picture(1, 42)) < 6


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_another_format_becomes_a_baseline_jpeg_of_the_same_picture(kind: str) -> None:
    pixels = picture(3, 5)
    sample = kept(encode(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert Change.FORMAT in sample.changes
    assert b"\xff\xc0" in sample.image  # baseline
    assert b"\xff\xc2" not in sample.image  # not progressive
    assert distance(rgb(sample.image), pixels) < (12 if kind == "GIF" else 2)


def test_transparency_is_composed_over_white() -> None:
    clear = np.zeros((40, 48, 4), np.uint8)
    clear[:, 24:] = (10, 20, 30, 255)
    seen = rgb(kept(encode(clear, "PNG")).image)
    assert seen[:, :20].min() > 245
    assert distance(seen[:, 30:], np.broadcast_to(np.array([10, 20, 30], np.uint8), (40, 18, 3))) < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparency_of_a_large_image_is_composed_in_bands_as_at_once(mode: str) -> None:
    rng = np.random.default_rng(7)
    image = Image.fromarray(rng.integers(0, 256, (1100, 1500, 4), np.uint8))
    if mode in ("P", "PA"):
        image = Image.frombytes("P", image.size, rng.integers(0, 64, (1100, 1500), np.uint8).tobytes())
        image.putpalette(rng.integers(0, 256, 3 * 64, np.uint8).tobytes())
    image = image.convert(mode) if image.mode != mode else image
    if mode in ("P", "L", "RGB"):
        image.info["transparency"] = {"P": bytes(range(64)), "L": 17, "RGB": image.getpixel((3, 5))}[mode]
    assert image.has_transparency_data
    over = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    assert np.array_equal(bgr(image, over_white=True), np.asarray(whole)[:, :, ::-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_the_high_eight(channels: int) -> None:
    pixels = picture(1, 2)[..., :channels].squeeze()
    deep = pixels.astype(np.uint16) * np.uint16(256) + np.uint16(99)
    sample = kept(synthetic.png16(deep))
    assert sample.changes == (Change.FORMAT, Change.SIXTEEN_BIT)
    expected = np.dstack([pixels] * 3) if channels == 1 else pixels
    assert distance(rgb(sample.image), expected) < 2


# How an upright picture is stored under each EXIF orientation: mirrored or not, then quarter turns to the left.
_AS_STORED = {1: (0, 0), 2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 1), 7: (1, 3), 8: (0, 3)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [PLAIN, SMALL])
def test_orientation_is_applied_to_the_pixels(orientation: int, options: ValidateOptions) -> None:
    upright = cv2.imdecode(np.frombuffer(jpeg(2, 2, 64, 36, quality=95), np.uint8), cv2.IMREAD_COLOR)
    flip, turns = _AS_STORED[orientation]
    as_stored = np.ascontiguousarray(np.rot90(np.fliplr(upright) if flip else upright, turns))
    stored = np.ascontiguousarray(as_stored[:, :, ::-1])
    sample = kept(with_exif(encode(stored, quality=95), exif(orientation)), options)
    assert (Change.ORIENTED in sample.changes) == (orientation != 1)
    expected = np.ascontiguousarray(upright[:, :, ::-1])
    if options.short_side:
        expected = shrink(expected, *short_side_size(64, 36, 24))
    assert distance(rgb(sample.image), expected) < 5
    assert np.array_equal(orient(as_stored, orientation), upright)


def test_zeros_before_the_end_marker_are_padding_and_other_bytes_are_damage() -> None:
    data = jpeg()
    assert kept(data[:-2] + bytes(40) + data[-2:]).changes == (Change.TRAILING_BYTES,)
    assert refused(data[:-2] + b"\x5a" * 40 + data[-2:]).reason is Reason.CORRUPT


def test_a_harmless_complaint_does_not_hide_damage() -> None:
    """libjpeg speaks once a file: an unknown JFIF revision must not be all that it says."""
    garbled = odd_images()["garbled"].data
    odd_revision = bytearray(garbled)
    odd_revision[garbled.index(b"JFIF") + 5] = 2
    assert refused(bytes(odd_revision)).reason is Reason.CORRUPT
    clean = bytearray(jpeg())
    clean[clean.index(b"JFIF") + 5] = 2
    assert kept(bytes(clean)).image == bytes(clean)


# --- codes that no table has -----------------------------------------------------------------------------------------


def plainly_decoded(data: bytes) -> tuple[Picture, str]:
    """Decode with OpenCV alone."""
    with captured_stderr() as heard:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return pixels, "".join(heard)


def miscoded(data: bytes, count: int) -> list[bytes]:
    """Copy a JPEG with 48 one bits somewhere, of which OpenCV says nothing: no Huffman code consists of ones alone."""
    rng, start = random.Random(5), data.rindex(b"\xff\xda") + 20
    places = (rng.randrange(start, len(data) - 4500) for _ in range(300))  # near the end OpenCV speaks
    mutants = (data[:at] + b"\x00" + b"\xff\x00" * 6 + data[at + 13 :] for at in places)
    found = list(itertools.islice((mutant for mutant in mutants if not plainly_decoded(mutant)[1]), count))
    assert len(found) == count
    return found


def large(mode: str = "RGB", **options: Any) -> bytes:
    return encode(Image.fromarray(picture(1, 2, 240, 180)).convert(mode), **options)


@pytest.fixture(params=["with the C++ library", "without it"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without it":
        without_library(monkeypatch)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "data",
    [large(), large("L"), large(subsampling=0), large("CMYK"), with_exif(large(), exif(6))],
    ids=["colour", "grey", "444", "cmyk", "turned"],
)
def test_a_huffman_code_that_does_not_exist_is_found(data: bytes) -> None:
    """libjpeg-turbo's fast decoder takes such a code for a zero in silence."""
    for options in (PLAIN, SMALL):
        kept(data, options)
        for mutant in miscoded(data, 3):
            assert refused(mutant, options).detail == "Corrupt JPEG data: bad Huffman code"
            with pytest.raises(ImageFault, match="bad Huffman code"):
                examine(mutant, 16)


def test_a_restart_interval_of_zero_hides_no_code() -> None:
    data = large()
    at = data.index(b"\xff\xda")
    data = data[:at] + b"\xff\xdd\x00\x04\x00\x00" + data[at:]
    kept(data)
    assert all(refused(mutant).reason is Reason.CORRUPT for mutant in miscoded(data, 3))


@pytest.mark.usefixtures("library")
def test_a_code_is_found_in_an_image_of_more_blocks_than_a_restart_interval_has() -> None:
    noise = np.random.default_rng(1).integers(108, 148, (8 * 41, 8 * 1600), np.uint8)
    data = encode(Image.fromarray(noise), quality=60)
    assert kept(data).image is data
    for mutant in miscoded(data, 2):
        assert refused(mutant).detail == "Corrupt JPEG data: bad Huffman code"


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_pixels_are_those_of_opencv_alone(options: dict[str, Any]) -> None:
    pixels, said = decode_jpeg(large(**options))
    assert pixels is not None
    assert said == ""
    assert np.array_equal(pixels, plainly_decoded(large(**options))[0])


# --- what is rejected ------------------------------------------------------------------------------------------------


def test_a_jpeg_cut_anywhere_is_found() -> None:
    data = jpeg(1, 1, 200, 150, quality=90)
    for end in range(1, len(data), 97):
        for options in (PLAIN, SMALL):
            assert isinstance(check(data[:end], options), Rejected), end
    sos = data.index(b"\xff\xda")
    for end in range(sos + 60, len(data) - 40, 211):  # cut, and closed again with an end marker
        assert refused(data[:end] + b"\xff\xd9").reason in (Reason.TRUNCATED, Reason.CORRUPT), end


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_another_format_cut_is_found(kind: str) -> None:
    data = encode(picture(1, 1), kind)
    for share in (0.3, 0.6, 0.9):
        assert isinstance(check(data[: int(len(data) * share)]), Rejected), share


def test_the_detail_of_a_rejection_is_the_same_in_every_run() -> None:
    tiff = b"II*\x00" + (8).to_bytes(4, "little") + bytes(6)  # a directory without entries
    assert refused(tiff).detail == "TIFF: cannot identify image file"


def test_limits_are_applied() -> None:
    data = jpeg(0, 0, 64, 64)
    assert refused(data, ValidateOptions(max_pixels=64 * 64 - 1)).reason is Reason.TOO_MANY_PIXELS
    assert kept(data, ValidateOptions(max_pixels=64 * 64)).width == 64
    assert refused(data, ValidateOptions(max_bytes=len(data) - 1)).reason is Reason.TOO_LARGE
    wide = encode(np.zeros((1, 70_000, 3), np.uint8), "PNG")
    assert refused(wide).reason is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("fields", [{"short_side": 0}, {"quality": 0}, {"quality": 101}, {"max_pixels": 0}])
def test_options_out_of_range_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(PlanError, match="got"):
        ValidateOptions(**fields)


# --- shrinking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (500, 375), (24, 90), (1001, 1003), (48, 48), (25, 25)])
def test_the_short_side_is_met_and_nothing_is_enlarged(size: tuple[int, int]) -> None:
    sample = kept(jpeg(1, 1, *size), SMALL)
    assert min(sample.width, sample.height) == 24
    assert sample.width / sample.height == pytest.approx(size[0] / size[1], rel=0.5 / 24)
    assert (Change.RESIZED in sample.changes) == (min(size) > 24)
    with opened(sample.image) as image:
        assert image.size == (sample.width, sample.height)


def test_a_shrunk_image_is_baseline_with_halved_chroma() -> None:
    for data in (
        jpeg(1, 1, 100, 80, subsampling=0),
        encode(picture(1, 1, 100, 80), progressive=True),
        odd_images()["png"].data,
    ):
        image = kept(data, SMALL).image
        at = image.index(b"\xff\xc0")
        assert image[at + 11] == 0x22  # luma sampled 2 x 2 against chroma
        assert b"\xff\xc2" not in image


def test_scans_are_limited_by_the_pixels_that_they_pass_over() -> None:
    assert isinstance(check(synthetic.many_scans(64, 64, 400)), Sample)
    assert refused(synthetic.many_scans(64, 64, 500)).reason is Reason.CORRUPT
    many = refused(synthetic.many_scans(4000, 4000, 200))
    assert many.reason is Reason.TOO_MANY_PIXELS
    assert "201 scans" in many.detail


def test_a_small_progressive_image_becomes_baseline_under_short_side() -> None:
    sample = kept(odd_images()["progressive"].data, ValidateOptions(short_side=200))
    assert sample.changes == (Change.PROGRESSIVE,)
    assert b"\xff\xc2" not in sample.image


def test_shrinking_does_not_alias() -> None:
    """A one-pixel checkerboard is mid-grey from afar; without a filter it turns into waves."""
    y, x = np.mgrid[:300, :400]
    board = np.repeat((((x + y) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)
    for short_side in (160, 200, 100, 60):
        small = rgb(kept(encode(board, "PNG"), ValidateOptions(short_side=short_side)).image)
        assert small.std() < 30, short_side
        plain = cv2.resize(board, (small.shape[1], small.shape[0]), interpolation=cv2.INTER_NEAREST)
        assert plain.std() > 100


@pytest.mark.parametrize(
    ("kind", "short_side"), [("PNG", 20), ("PNG", 60), ("PNG", 100), ("JPEG", 256), ("JPEG", 328), ("JPEG", 470)]
)
def test_the_stored_picture_is_pillows_antialiased_one(kind: str, short_side: int) -> None:
    data = encode(picture(2, 9, 600, 480), kind, quality=100)
    sample = kept(data, ValidateOptions(short_side=short_side, quality=100))
    with opened(data) as image:
        theirs = np.asarray(image.resize((sample.width, sample.height), Image.Resampling.BILINEAR))
    assert distance(rgb(sample.image), theirs) < 1.5  # what halving the chroma costs


# --- never raises, never prints --------------------------------------------------------------------------------------


def _mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not data:
            break
        at = rng.randrange(len(data) if rng.random() < 0.6 else min(64, len(data)))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 255, 127, 128))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            del data[at : at + rng.randrange(1, 40)]
        else:
            other = rng.choice(seeds)
            start = rng.randrange(len(other))
            data[at : at + 50] = other[start : start + 50]
    return bytes(data)


def test_two_thousand_damaged_files_raise_nothing_and_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(7)
    seeds = [odd.data for odd in odd_images().values() if odd.data]
    seeds += [encode(picture(0, 0), "TIFF", compression=how) for how in ("jpeg", "tiff_adobe_deflate", "packbits")]
    seeds += [jpeg(subsampling=0), jpeg(progressive=True), encode(picture(0, 0), "WEBP", lossless=True)]
    outcomes = {Sample: 0, Rejected: 0}
    for k in range(2000):
        data = _mutated(rng, seeds)
        result = check(data, ValidateOptions(short_side=rng.choice((None, 16, 32))))
        outcomes[type(result)] += 1
        if isinstance(result, Sample):
            with opened(result.image) as image:
                image.load()
                assert image.size == (result.width, result.height), k
    assert capfd.readouterr() == ("", "")
    assert min(outcomes.values()) > 100


def test_stderr_is_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    check(odd_images()["garbled"].data)
    os.write(2, b"still here\n")
    assert capfd.readouterr().err == "still here\n"


def test_a_process_without_stderr_validates_too() -> None:
    code = (
        "import os; os.close(2)\n"
        "from tests.imnet_prep.images.test_check import check\nfrom tests.synthetic import jpeg, odd_images\n"
        "a, b = check(jpeg()), check(odd_images()['garbled'].data)\n"
        "print(type(a).__name__, b.reason.value)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["Sample", "corrupt"]


def test_forked_children_do_not_hear_each_other() -> None:
    """Each child reads only what its own decoder says: clean images stay clean beside a sibling full of damage."""
    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    check(odd_images()["garbled"].data)  # the parent has opened its own capture
    children = []
    for k in range(2):
        child = os.fork()
        if child == 0:
            wanted = Rejected if k else Sample
            data = odd_images()["garbled"].data if k else jpeg()
            os._exit(0 if all(isinstance(check(data), wanted) for _ in range(300)) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


@pytest.mark.real_data
def test_damage_in_real_photographs_is_found(shared_data: Path) -> None:
    """Of spliced and zeroed streams at least 9 in 10, of cut ones every one; nothing whole is refused."""
    from imnet_prep.sources import detect, read

    photographs = []
    for ref in list(detect([shared_data / "imagenet-samples-250.tar"])[0].refs())[::6]:
        assert isinstance(ref, ImageRef)
        raw = read(ref)
        assert isinstance(raw, RawImage)
        photographs.append(raw.data)
    assert all(isinstance(check(data), Sample) for data in photographs)
    rng, found = random.Random(3), {"cut": 0, "zeroed": 0, "spliced": 0}
    for k, data in enumerate(photographs):
        sos = data.rindex(b"\xff\xda")
        at = rng.randrange(sos + 100, len(data) - 2000)
        other = photographs[k - 1]
        cases = {
            "cut": data[:at],
            "zeroed": data[:at] + bytes(1000) + data[at + 1000 :],
            "spliced": data[:at] + other[len(other) // 2 :],
        }
        for name, bad in cases.items():
            found[name] += isinstance(check(bad), Rejected)
    assert found["cut"] == len(photographs)
    assert min(found.values()) >= 0.9 * len(photographs), found
