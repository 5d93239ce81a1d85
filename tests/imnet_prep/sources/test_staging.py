"""Compressed tars: read once and in order, brought into the work folder, damaged ones refused."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.build.convert import convert, dry_run
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.errors import Interrupted, PlanError, SourceError
from imnet_prep.sources import detect, merge, read, staging
from imnet_prep.sources.staging import Staging
from imnet_prep.types import ImageRef, Progress, RawImage
from tests.imnet_prep.obstacles import small_disk
from tests.synthetic import WNIDS, jpeg, make_imagenet, tar_bytes

PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
MEMBERS = {f"{wnid}/{wnid}_{k}.JPEG": jpeg(c, k) for c, wnid in enumerate(WNIDS[:2]) for k in range(4)}


def quiet(state: Progress) -> None:
    """Say nothing."""


def run(paths: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    """Convert in one process, and return the manifest."""
    convert(paths, out, None, PlanOptions(), ConvertOptions(workers=1, **options), quiet, lambda: False)
    return dict(json.loads((out / "manifest.json").read_bytes()))


def images(path: Path, folder: Path) -> dict[str, bytes]:
    """Return the images of a source by name."""
    raws = [read(ref) for ref in merge(detect([path], None, Staging(folder))) if isinstance(ref, ImageRef)]
    return {raw.ref.file_name: raw.data for raw in raws if isinstance(raw, RawImage)}


@pytest.mark.parametrize("ending", PACK)
def test_a_compressed_tar_gives_the_same_shards_as_the_tar(tmp_path: Path, ending: str) -> None:
    tar = tar_bytes(MEMBERS)
    (tmp_path / "a.tar").write_bytes(tar)
    packed = tmp_path / f"b.tar{ending}"
    packed.write_bytes(PACK[ending](tar))
    plain, other = run([tmp_path / "a.tar"], tmp_path / "plain"), run([packed], tmp_path / "other")
    (entry,) = other["sources"]
    data = packed.read_bytes()
    assert (entry["name"], entry["size_bytes"]) == (packed.name, len(data))
    assert (entry["md5"], entry["sha256"]) == (hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest())
    assert {**plain, "sources": [], "self_sha256": ""} == {**other, "sources": [], "self_sha256": ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", packed.name, "other", "plain"]


def test_official_archives_may_be_compressed(tmp_path: Path) -> None:
    net = make_imagenet(tmp_path / "net", odd=False, test=0)
    paths = [net.train, net.val]
    plain = run([*paths, net.devkit], tmp_path / "plain")
    packed = [path.with_name(f"{path.name}.gz") for path in paths]
    for path, to in zip(paths, packed, strict=True):
        to.write_bytes(gzip.compress(path.read_bytes()))
    assert run([*packed, net.devkit], tmp_path / "other")["splits"] == plain["splits"]


def test_the_ending_tgz_and_several_streams_and_zeros_after_them_are_read(tmp_path: Path) -> None:
    tar = tar_bytes(MEMBERS)
    path = tmp_path / "x.tgz"
    path.write_bytes(gzip.compress(tar[:5000]) + gzip.compress(tar[5000:]) + bytes(10240))
    assert images(path, tmp_path / "staged") == MEMBERS


@pytest.mark.parametrize("ending", PACK)
def test_a_damaged_stream_is_an_error_and_leaves_nothing(tmp_path: Path, ending: str) -> None:
    packed = PACK[ending](tar_bytes(MEMBERS))
    middle = len(packed) // 2
    damaged = {
        "cut": packed[:middle],
        "without its end": packed[:-1],
        "altered": packed[:middle] + bytes(200) + packed[middle + 200 :],
        "followed": packed + b"something else",
        "followed after zeros": packed + bytes(512) + b"something else",
        "followed by a cut one": packed + packed[:middle],
        "begun": packed[:4],
    }
    for name, data in damaged.items():
        path = tmp_path / f"x.tar{ending}"
        path.write_bytes(data)
        with pytest.raises(SourceError) as error:
            run([path], tmp_path / "out")
        assert str(path) in str(error.value), name
        assert ".work" not in str(error.value), name
        assert [item.name for item in tmp_path.iterdir()] == [path.name], name


def test_what_is_compressed_and_no_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    for data in (b"text", jpeg(), gzip.compress(tar_bytes(MEMBERS)), b""):
        path.write_bytes(gzip.compress(data))
        with pytest.raises(SourceError) as error:
            run([path], tmp_path / "out")
        assert str(path) in str(error.value)
        assert ".work" not in str(error.value)


def test_without_a_folder_to_bring_it_to_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(MEMBERS)))
    with pytest.raises(SourceError, match="cannot be read in place"):
        detect([path])


def test_a_bomb_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_BOMB_BYTES", 1 << 20)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes({"n01440764/a.jpg": bytes(64 << 20)})))
    with pytest.raises(SourceError, match="is a decompression bomb"):
        run([path], tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_what_does_not_fit_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(os.urandom(1 << 20)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100_000))
    with pytest.raises(SourceError, match=r"does not fit on the disk .* got 100,000 bytes"):
        run([path], tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes({f"n01440764/{k}.jpg": os.urandom(100_000) for k in range(40)})))
    monkeypatch.setattr(staging, "_RESERVE_BYTES", 0)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with pytest.raises(SourceError, match="does not fit on the disk"):
            run([path], disk / "out")
        monkeypatch.setattr(staging, "check_room", lambda *_: None)  # others fill the disk meanwhile
        with pytest.raises(PlanError, match="the disk is full"):
            run([path], disk / "out")
        assert not list(disk.iterdir())


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(MEMBERS)))

    def touch(state: Progress) -> None:
        os.utime(path, (1, 1))

    with pytest.raises(SourceError, match="changed while it was read"):
        detect([path], None, Staging(tmp_path / "staged", touch))


def test_what_is_whole_is_used_again_until_the_file_changes(tmp_path: Path) -> None:
    path, folder, read_bytes = tmp_path / "x.tar.gz", tmp_path / "staged", list[int]()

    def count(state: Progress) -> None:
        read_bytes.append(state.done)

    path.write_bytes(gzip.compress(tar_bytes(MEMBERS)))
    for _ in range(2):
        detect([path], None, Staging(folder, count))
    assert read_bytes == [path.stat().st_size]
    path.write_bytes(gzip.compress(tar_bytes(dict(list(MEMBERS.items())[:3]))))
    again = Staging(folder, count)
    (source,) = detect([path], None, again)
    assert len(list(source.refs())) == 3
    assert len(read_bytes) == 2
    again.forget_others()
    assert len(list(folder.iterdir())) == 2  # a folder and its note


def test_an_unfinished_copy_is_brought_again(tmp_path: Path) -> None:
    path, folder = tmp_path / "x.tar.gz", tmp_path / "staged"
    path.write_bytes(gzip.compress(tar_bytes(MEMBERS)))
    images(path, folder)
    (note,) = folder.glob("*.json")
    (copy,) = folder.glob("*/x.tar")
    for spoil in (note.unlink, lambda: copy.write_bytes(b"short"), lambda: note.write_bytes(b"{")):
        spoil()
        assert images(path, folder) == MEMBERS


def test_stopped_it_keeps_what_is_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        members = {f"{name}/{k}.jpg": jpeg(k) for k in range(3)}
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(tar_bytes(members)) + bytes(20 << 20))
    seen: list[str] = []

    def stop() -> bool:
        return "b.tar.gz" in seen

    def note(state: Progress) -> None:
        seen.append(state.note)

    paths = [tmp_path / "a.tar.gz", tmp_path / "b.tar.gz"]
    with pytest.raises(Interrupted):
        convert(paths, tmp_path / "out", None, PlanOptions(), ConvertOptions(workers=1), note, stop)
    staged = tmp_path / "out.partial" / ".work" / "staged"
    assert [path.name for path in staged.glob("*/*")] == ["a.tar"]
    run(paths, tmp_path / "out")
    run(paths, tmp_path / "whole")
    first, second = ((tmp_path / name / "manifest.json").read_bytes() for name in ("out", "whole"))
    assert first == second
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_killed_while_it_is_brought_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    path, out = tmp_path / "x.tar.bz2", tmp_path / "out"
    path.write_bytes(bz2.compress(tar_bytes(MEMBERS | {"noise.bin": os.urandom(4 << 20)})))
    command = [sys.executable, "-m", "imnet_prep", "to-mindrecord", str(path), "--out", str(out), "--workers", "1"]
    staged = tmp_path / "out.partial" / ".work" / "staged"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(staged.glob("*/x.tar")):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert not list(staged.glob("*.json"))  # it was not whole
    subprocess.run(command, check=True, capture_output=True)
    run([path], tmp_path / "whole")
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(MEMBERS)))
    shown = dry_run([path], tmp_path / "out", None, PlanOptions(), ConvertOptions(workers=1), quiet, lambda: False)
    assert shown["images"] == len(MEMBERS)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_compressed_class_tars_within_a_source_are_refused_not_lost(tmp_path: Path) -> None:
    plain = {wnid: tar_bytes({f"{wnid}_{k}.JPEG": jpeg(c, k) for k in range(3)}) for c, wnid in enumerate(WNIDS[:3])}
    members = {f"{wnid}.tar": data for wnid, data in plain.items()}
    members[f"{WNIDS[2]}.tar.gz"] = gzip.compress(members.pop(f"{WNIDS[2]}.tar"))
    (tmp_path / "nested.tar").write_bytes(tar_bytes(members))
    (tmp_path / "classes.tar").write_bytes(tar_bytes(MEMBERS | {"n01484850.tgz": b"x"}))
    (tmp_path / "all.tar").write_bytes(tar_bytes({f"{wnid}.tar.gz": gzip.compress(plain[wnid]) for wnid in plain}))
    (tmp_path / "folder").mkdir()
    for name, data in members.items():
        (tmp_path / "folder" / name).write_bytes(data)
    for name in ("nested.tar", "classes.tar", "all.tar", "folder"):
        with pytest.raises(SourceError, match=r"is an archive that is not read here|holds no images"):
            run([tmp_path / name], tmp_path / "out")
