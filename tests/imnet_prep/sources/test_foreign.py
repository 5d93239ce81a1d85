"""Formats that are not read are named in one line, with what to do."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from imnet_prep.cli.prep import main
from imnet_prep.errors import SourceError
from imnet_prep.sources import detect
from tests.synthetic import jpeg, make_image_folder


def tfrecord(data: bytes = b"example") -> bytes:
    """Make a record as TensorFlow does, with the CRC-32C by the slow, obvious way."""

    def masked(text: bytes) -> int:
        crc = 0xFFFFFFFF
        for byte in text:
            for bit in range(8):
                low = (crc ^ (byte >> bit)) & 1
                crc = (crc >> 1) ^ (0x82F63B78 * low)
        crc ^= 0xFFFFFFFF
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, images=np.zeros((2, 8, 8, 3), np.uint8))
    return out.getvalue()


def cifar() -> bytes:
    return pickle.dumps({b"data": b"\0" * 300, b"labels": [1, 2]}, protocol=2)


URLS = b"n00004475_1\thttp://example.org/1.jpg\nn00004475_2\thttp://example.org/2.jpg\n"
CASES = [
    ("train-00000-of-01024", tfrecord(), "TFRecord", "tensorflow"),
    ("imagenet.tfrecord", tfrecord(), "TFRecord", "tensorflow"),
    ("validation.tfrecord-00001-of-00128", b"cut", "TFRecord", "tensorflow"),
    ("train.beton", b"\2\0\3\0" + bytes(300), "FFCV", "ffcv"),
    ("data.mdb", bytes(16) + b"\xde\xc0\xef\xbe" + bytes(300), "LMDB", "lmdb"),
    ("unnamed", bytes(16) + b"\xde\xc0\xef\xbe" + bytes(300), "LMDB", "lmdb"),
    ("train.h5", b"\x89HDF\r\n\x1a\n" + bytes(300), "HDF5", "h5py"),
    ("images.npz", npz(), "NumPy", "numpy"),
    ("data_batch_1", cifar(), "pickle, as CIFAR", "pickle"),
    ("test_batch", pickle.dumps([1], protocol=4), "pickle, as CIFAR", "pickle"),
    ("train.rec", b"\x0a\x23\xd7\xce" + bytes(300), "RecordIO", "mxnet"),
    ("train.idx", b"0\t0\n1\t1000\n", "index of a RecordIO", "mxnet"),
    ("shard.00000.mds", bytes(300), "MosaicML", "streaming"),
    ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff" + bytes(300), "Arrow", "to_parquet"),
    ("train-images-idx3-ubyte", b"\0\0\x08\x03" + bytes(300), "MNIST", "numpy"),
    ("train-00000-of-00004.mindrecord", bytes(300), "MindRecord already", "imnet-prep adopt"),
    ("photos.7z", b"7z\xbc\xaf\x27\x1c" + bytes(300), "7z", "unpack it"),
    ("photos.rar", b"Rar!\x1a\x07\x01\0" + bytes(300), "RAR", "unpack it"),
    ("fall11_urls.txt", URLS, "list of URLs", "imnet-prep download --urls"),
    ("train.csv", b"url,label\nhttps://example.org/1.jpg,cat\n", "list of URLs", "imnet-prep download --urls"),
    ("labels.csv", b"image,label\n1.jpg,cat\n2.jpg,dog\n", "a list, not images", "their class folders are the labels"),
    ("LOC_train_solution.csv", b"ImageId,PredictionString\nn02017213_7894,n02017213 1 2 3 4\n", "a list", "folder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "what", "remedy"), CASES, ids=[case[0] for case in CASES])
def test_it_is_named_with_what_to_do(tmp_path: Path, name: str, data: bytes, what: str, remedy: str) -> None:
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / name
    path.write_bytes(data)
    result = CliRunner().invoke(main, ["to-mindrecord", str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert what in result.stderr
    assert remedy in result.stderr
    assert str(path) in result.stderr
    assert result.stderr.count("\n") == 1
    for folder in (tmp_path / "given", tmp_path):  # and in a folder, or one below it; texts are everywhere
        with pytest.raises(SourceError) as caught:
            detect([folder])
        assert (what if "list of URLs" in what or "a list" not in what else "no class folders") in str(caught.value)


def test_beside_images_they_are_noted(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 1)
    for name in ("train.tfrecord", "train.beton", "notes.txt"):
        (root / name).write_bytes(b"x")
    (source,) = detect([root])
    assert len(list(source.refs())) == 4
    assert source.notes == ("x: data files beside the images are not read (train.beton, train.tfrecord)",)


def _cut_tfrecord() -> bytes:
    return tfrecord()[:11]


@pytest.mark.parametrize("make", [_cut_tfrecord, lambda: bytes(300), lambda: b"\x80", lambda: b"plain text"])
def test_what_is_not_known_is_no_archive_that_can_be_read(tmp_path: Path, make: Callable[[], bytes]) -> None:
    (tmp_path / "unknown").write_bytes(make())
    with pytest.raises(SourceError, match=r"not a tar archive that can be read|holds no images"):
        detect([tmp_path / "unknown"])


def test_an_archive_of_images_is_read_whatever_its_name(tmp_path: Path) -> None:
    from tests.synthetic import tar_bytes

    for name in ("x.rec", "x.txt", "x.tfrecord"):
        (tmp_path / name).write_bytes(tar_bytes({"cat/1.jpg": jpeg(), "dog/1.jpg": jpeg(1)}))
        assert len(list(detect([tmp_path / name])[0].refs())) == 2
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/1.jpg", jpeg())
        archive.writestr("dog/1.jpg", jpeg(1))
    assert len(list(detect([tmp_path / "x.zip"])[0].refs())) == 2
