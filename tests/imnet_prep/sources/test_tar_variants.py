"""Undamaged tars as other programs write them: everything is found, and nothing is called damage."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from imnet_prep.sources import detect, read
from imnet_prep.sources.base import Source
from imnet_prep.types import ImageRef, RawImage
from tests.imnet_prep.sources.damaged import image
from tests.synthetic import tar_bytes

BLOCK = 512


def found_in(path: Path) -> tuple[Source, dict[str, bytes]]:
    """The source, and the bytes of each image in it; nothing is rejected."""
    (source,) = detect([path])
    images = {}
    for ref in source.refs():
        assert isinstance(ref, ImageRef), ref
        raw = read(ref)
        assert isinstance(raw, RawImage), raw
        images[ref.file_name] = raw.data
    return source, images


def variant(rng: random.Random) -> tuple[bytes, dict[str, bytes], str]:
    """Draw a tar: its bytes, its images, and how it was made."""
    kind = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
    deep = rng.choice(("", "ds/", "./", "a/b/c/"))
    odd = rng.choice(("", "ü", " with blanks ")) if kind != tarfile.USTAR_FORMAT else ""
    long = rng.choice((1, 80, 140)) if kind != tarfile.USTAR_FORMAT else rng.choice((1, 80))
    images = {f"class{odd}{k % 3}/{'n' * long}{k}.jpg": image(rng.randrange(500)) for k in range(rng.randrange(3, 12))}
    out = io.BytesIO()
    pax = {"comment": "made by hand"} if kind == tarfile.PAX_FORMAT and rng.random() < 0.5 else None
    with tarfile.open(fileobj=out, mode="w", format=kind, pax_headers=pax) as archive:
        for name in rng.sample(sorted(images), len(images)) if rng.random() < 0.5 else sorted(images):
            if rng.random() < 0.2:
                archive.addfile(_folder(deep + name.rpartition("/")[0]))
            archive.addfile(_member(rng, deep + name, len(images[name]), kind), io.BytesIO(images[name]))
    data = out.getvalue()
    factor = rng.choice((1, 2, 4, 20, 20, 20, 64, 128, 2048))
    data = rebased(data, factor)
    v7 = kind == tarfile.USTAR_FORMAT and long == 1 and rng.random() < 0.3
    if v7:
        data = as_v7(data)
    if two := rng.random() < 0.2 and factor == 20:
        more = {f"more/{k}.jpg": image(k) for k in range(3)}
        data += tar_bytes({deep + name: body for name, body in more.items()})
        images |= more
    return data, images, f"format {kind}, deep {deep!r}, long {long}, -b {factor}, v7 {v7}, two {two}"


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def _member(rng: random.Random, name: str, size_bytes: int, kind: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    info.mtime = rng.choice((0, 1_600_000_000, 1_600_000_000.25 if kind == tarfile.PAX_FORMAT else 1))
    info.uid = rng.choice((0, 1000, 1 << 31 if kind != tarfile.USTAR_FORMAT else 7))
    info.uname, info.gname = rng.choice((("", ""), ("root", "wheel"), ("müller", "staff")))
    info.mode = rng.choice((0o644, 0o400, 0o100755))
    if kind == tarfile.PAX_FORMAT and rng.random() < 0.3:
        info.pax_headers = {"LIBARCHIVE.xattr.a": "b", "size": str(size_bytes)}
    return info


def rebased(data: bytes, factor: int) -> bytes:
    """Pad a tar as ``tar -b`` does."""
    data = data.rstrip(b"\x00")
    data += bytes(-len(data) % BLOCK + 2 * BLOCK)
    return data + bytes(-len(data) % (factor * BLOCK))


def as_v7(data: bytes) -> bytes:
    """Take away what POSIX added to the headers."""
    out, at = bytearray(data), 0
    while out[at : at + BLOCK].strip(b"\x00"):
        size = int(bytes(out[at + 124 : at + 135]), 8)
        out[at + 257 : at + BLOCK] = bytes(255)
        if out[at + 156 : at + 157] == b"0":
            out[at + 156] = 0
        out[at + 148 : at + 156] = b" " * 8
        out[at + 148 : at + 156] = b"%06o\x00 " % sum(out[at : at + BLOCK])
        at += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
    return bytes(out)


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 300), marks=pytest.mark.long)], ids=["some", "all"]
)
def test_undamaged_variants_are_read_whole(seeds: range, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for seed in seeds:
        data, images, made = variant(random.Random(seed))
        path.write_bytes(data)
        source, found = found_in(path)
        assert found == images, f"seed {seed}: {made}"
        assert source.skipped_bytes is None


def test_archives_that_follow_one_another_are_all_read(tmp_path: Path) -> None:
    parts = [{f"{name}/{k}.jpg": image(10 * number + k) for k in range(5)} for number, name in enumerate("abc")]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(map(tar_bytes, parts)))
    assert found_in(path)[1] == {name: data for part in parts for name, data in part.items()}


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax"],
        ["--format=ustar"],
        ["--format=v7"],
        ["--format=gnu", "-b", "64", "-V", "label"],
    ],
)
def test_tars_of_gnu_tar_are_read_whole(options: list[str], tmp_path: Path) -> None:
    images: Mapping[str, bytes] = {f"cat{k % 2}/{k}.jpg": image(k) for k in range(6)}
    for name, data in images.items():
        (tmp_path / "ds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ds" / name).write_bytes(data)
    path = tmp_path / "x.tar"
    made = subprocess.run(["tar", "-cf", path, *options, "-C", tmp_path, "ds"], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"another tar: {made.stderr.decode()[:200]}")
    assert found_in(path)[1] == images
