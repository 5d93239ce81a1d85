"""The C++ library: its parts, and whole images decoded as OpenCV decodes them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from imnet_prep.images import native
from imnet_prep.images.native import clean_end, decode_shrunk, decode_whole, decoder_status
from tests.synthetic import encode, jpeg, odd_images, picture

needs_decoder = pytest.mark.skipif(not decoder_status()[0], reason=decoder_status()[1])


def use(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (library, ""))
    monkeypatch.setattr(native, "function", cache(native.function.__wrapped__))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_without_libjpegs_headers_the_library_still_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library = Path(native.__file__).with_name("scan.cc"), tmp_path / "scan_only.so"
    subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    use(ctypes.CDLL(str(library)), monkeypatch)
    data = jpeg()
    assert clean_end(data) == len(data)
    assert decode_whole(data, grey=False, reduce=1, size=(48, 40)) is None
    assert decode_shrunk(data, components=3, reduce=1, size=(48, 40), small=(24, 20)) == (None, 0)
    built, why = decoder_status()
    assert not built
    assert "libjpeg-turbo's headers" in why


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("body", ['extern "C" int imnet_abi() { return 3; }', "int other;"])
def test_a_library_of_another_version_is_not_used(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library = tmp_path / "old.cc", tmp_path / "old.so"
    source.write_text(body)
    subprocess.run(["g++", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(native, "LIBRARY", library)
    found, why = native.load.__wrapped__()
    assert found is None
    assert "another version" in why


@needs_decoder
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
def test_whole_images_are_decoded_as_opencv_decodes_them(options: dict[str, Any], reduce: int) -> None:
    data = encode(picture(1, 2, 157, 121), **options)
    for grey in (False, True):
        kind = "GRAYSCALE" if grey else "COLOR"
        flag = getattr(cv2, f"IMREAD_{kind}" if reduce == 1 else f"IMREAD_REDUCED_{kind}_{reduce}")
        decoded = decode_whole(data, grey=grey, reduce=reduce, size=(157, 121))
        assert decoded is not None
        pixels, said = decoded
        assert said == ""
        assert pixels is not None
        assert np.array_equal(pixels, cv2.imdecode(np.frombuffer(data, np.uint8), flag))


@needs_decoder
def test_the_first_warning_of_libjpeg_is_reported() -> None:
    decoded = decode_whole(odd_images()["garbled"].data, grey=True, reduce=8, size=(48, 40))
    assert decoded is not None
    assert decoded[1].startswith("Corrupt JPEG data: ")


@needs_decoder
def test_what_may_differ_between_versions_of_libjpeg_is_left_to_opencv() -> None:
    flags = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411]
    rare = cv2.imencode(".jpg", picture(1, 1), flags)[1].tobytes()
    for data in (rare, odd_images()["cmyk"].data, jpeg()[:-40]):
        assert decode_whole(data, grey=False, reduce=1, size=(48, 40)) is None
