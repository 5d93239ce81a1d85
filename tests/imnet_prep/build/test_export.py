"""The way back: images byte for byte in class folders or tars, which give the same records when converted again."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.build import export_formats
from imnet_prep.build.export import ExportResult, export
from imnet_prep.build.export_names import class_folders, image_path, safe_path, sample_key
from imnet_prep.build.reshard import ReshardOptions, reshard
from imnet_prep.errors import IntegrityError, Interrupted, PlanError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.records.folder import RecordsFolder
from tests.records import flip, make_records, prep, prep_json, quiet, run
from tests.synthetic import jpeg, make_image_folder, make_imagenet


def way_back(records: Path, out: Path, to: str = "imagefolder", split: str | None = None) -> ExportResult:
    return export(records, out, to, split, quiet)


def proof(records: Path, out: Path) -> str:
    return reshard([records], out, ReshardOptions(workers=1), quiet).to_json()["proof"]


def shards(records: Path) -> dict[str, str]:
    manifest = RecordsFolder.open(records).manifest
    return {shard.file: shard.sha256 for split in manifest.splits.values() for shard in split.shards}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("records")
    make_image_folder(root / "photos", 3, {"train": 9, "val": 2})
    for name in ("odd/dots.in.name.jpg", "odd/Ünï.jpg", "odd/sub/0.jpg"):
        path = root / "photos" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(2, len(name)))
    run(root / "photos", root / "records", shards=2)
    return root / "records"


@pytest.mark.parametrize("to", ["imagefolder", "webdataset"])
def test_what_is_exported_gives_the_same_records_when_converted_again(records: Path, tmp_path: Path, to: str) -> None:
    result = way_back(records, tmp_path / "out", to)
    assert (result.images, result.renamed) == ({"train": 30, "val": 6}, 0)
    manifest = run(tmp_path / "out", tmp_path / "again", shards=2).manifest
    assert shards(tmp_path / "again") == shards(records)
    assert manifest.splits == RecordsFolder.open(records).manifest.splits
    assert result.proof == proof(records, tmp_path / "r1") == proof(tmp_path / "again", tmp_path / "r2")


def test_class_folders_hold_the_stored_bytes_under_their_names(records: Path, tmp_path: Path) -> None:
    way_back(records, tmp_path / "out")
    folder = RecordsFolder.open(records)
    for split in ("train", "val"):
        lines = list(folder.lines(split))
        found = {str(p.relative_to(tmp_path / "out" / split)): p for p in (tmp_path / "out" / split).rglob("*.jpg")}
        assert found.keys() == {line.file_name for line in lines}
        assert all(file_digest(found[line.file_name]) == line.sha256 for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "train", "val"]


def test_tars_are_read_by_the_webdataset_package(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr(export_formats, "_TAR_IMAGES", 8)
    way_back(records, tmp_path / "out", "webdataset", "train")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classnames.txt", "export.json", *(f"train-{number:05d}.tar" for number in range(4)),
    ]  # fmt: skip
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    folder = RecordsFolder.open(records)
    lines = list(folder.lines("train"))
    assert [hashlib.sha256(sample["jpg"]).hexdigest() for sample in samples] == [line.sha256 for line in lines]
    assert [int(sample["cls"]) for sample in samples] == [line.label for line in lines]
    assert [json.loads(sample["json"])["file_name"] for sample in samples] == [line.file_name for line in lines]
    names = (tmp_path / "out" / "classnames.txt").read_text().splitlines()
    assert tuple(names) == folder.manifest.classes


def test_what_the_source_said_of_an_image_is_in_the_json_and_comes_back(tmp_path: Path) -> None:
    from tests.imnet_prep.sources.test_webdataset import img2dataset

    img2dataset(tmp_path / "ds", 0, 2)
    run(tmp_path / "ds", tmp_path / "records")
    way_back(tmp_path / "records", tmp_path / "out", "webdataset")
    manifest = run(tmp_path / "out", tmp_path / "again").manifest
    assert manifest.splits == RecordsFolder.open(tmp_path / "records").manifest.splits  # with the same records.jsonl.gz


def test_what_could_be_taken_for_the_class_does_not_change_it_on_the_way_back(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, words in enumerate(("tench", "shark", "hen")):
            said = {"wnid": f"n0000000{number}", "class_name": words, "cls": words, "file_name": "same.jpg"}
            for name, data in ((f"k{number}.jpg", jpeg(1, number)), (f"k{number}.json", json.dumps(said).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    first = run(tmp_path / "a.tar", tmp_path / "records").manifest
    result = way_back(tmp_path / "records", tmp_path / "out", "webdataset")
    second = run(tmp_path / "out", tmp_path / "again").manifest
    assert first.classes == second.classes == ("n00000000", "n00000001", "n00000002")
    assert result.proof == proof(tmp_path / "again", tmp_path / "r")
    said = next(iter(RecordsFolder.open(tmp_path / "again").lines("train"))).meta or {}
    assert {key: said.get(key) for key in ("source_cls", "source_file_name")} == {
        "source_cls": said["source_class_name"], "source_file_name": "same.jpg"
    }  # fmt: skip
    assert way_back(tmp_path / "again", tmp_path / "out2", "webdataset").proof == result.proof


def test_classes_that_are_called_by_numbers_come_back(tmp_path: Path) -> None:
    for name in ("10", "2", "7", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "0.jpg").write_bytes(jpeg(1, len(name)))
    run(tmp_path / "photos", tmp_path / "records")
    result = way_back(tmp_path / "records", tmp_path / "out", "webdataset")
    run(tmp_path / "out", tmp_path / "again")
    assert result.proof == proof(tmp_path / "again", tmp_path / "r")


def test_images_without_labels_are_exported(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "official", 3, 3, odd=False)
    run(made.folder, tmp_path / "records")
    for to in ("imagefolder", "webdataset"):
        assert way_back(tmp_path / "records", tmp_path / to, to).images == {"train": 9, "val": 9, "test": 4}
        run(tmp_path / to, tmp_path / f"again-{to}")
        assert shards(tmp_path / f"again-{to}") == shards(tmp_path / "records")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n01/n01_1.JPEG", "n01/n01_1.JPEG"),
        ("a:b/c?.jpg", "a_b/c_.jpg"),
        ("con/nul.jpg", "_con/_nul.jpg"),
        ("../../x.jpg", "__/__/x.jpg"),
        ("a./b .jpg", "a_/b .jpg"),
        ("/a//b.jpg", "_/a/_/b.jpg"),
        (".hidden/__MACOSX", "_.hidden/___MACOSX"),
        ("a\\b.jpg", "a_b.jpg"),
    ],
)
def test_names_are_safe_on_every_file_system(name: str, expected: str) -> None:
    assert safe_path(name) == expected


def test_long_names_and_missing_suffixes() -> None:
    long = image_path("c/" + "é" * 300 + ".JPEG")
    assert long.endswith(".JPEG")
    assert max(len(part.encode()) for part in long.split("/")) <= 255
    assert long != image_path("c/" + "é" * 301 + ".JPEG")
    assert image_path("c/photo") == "c/photo.jpg"
    assert sample_key("c/my.photo.JPEG") == "c/my_photo"
    assert sample_key("c.d/photo") == "c.d/photo"


def test_names_that_differ_in_case_alone_are_told_apart(tmp_path: Path) -> None:
    assert len({folder.casefold() for folder in class_folders(["Cat", "cat", "dog"]).values()}) == 3
    for k, name in enumerate(("cat/A.jpg", "cat/a.jpg", "cat/a.b.jpg", "cat/a_b.jpg", "dog/x:y.jpg", "Dog/x.jpg")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(1, k))
    run(tmp_path / "photos", tmp_path / "records")
    result = way_back(tmp_path / "records", tmp_path / "out")
    found = [str(path.relative_to(tmp_path / "out" / "train")) for path in (tmp_path / "out").rglob("*.jpg")]
    assert len({name.casefold() for name in found}) == 6
    assert {"cat/a.b.jpg", "cat/a_b.jpg"} < set(found)
    assert result.renamed == 4
    assert way_back(tmp_path / "records", tmp_path / "tars", "webdataset").renamed == 0
    run(tmp_path / "tars", tmp_path / "again")
    assert shards(tmp_path / "again") == shards(tmp_path / "records")


# --- refusals and failures -------------------------------------------------------------------------------------------


def test_the_same_export_again_is_done_and_another_is_refused(records: Path, tmp_path: Path) -> None:
    first = way_back(records, tmp_path / "out")
    again = way_back(records, tmp_path / "out")
    assert again.already_done
    assert again.note() == first.note()
    for to, split in (("webdataset", None), ("imagefolder", "val")):
        with pytest.raises(PlanError, match="holds another export"):
            way_back(records, tmp_path / "out", to, split)


@pytest.mark.parametrize("kind", ["file", "folder", "partial", "inside", "format", "split", "no records"])
def test_what_cannot_be_done_is_said_before_anything_is_written(records: Path, tmp_path: Path, kind: str) -> None:
    out, source, to, split = tmp_path / "out", records, "imagefolder", None
    if kind == "file":
        out.write_text("mine")
    elif kind in ("folder", "partial"):
        place = out if kind == "folder" else tmp_path / "out.partial"
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    elif kind == "inside":
        out = records / "train" / "out"
    elif kind == "format":
        to = "tfrecord"
    elif kind == "split":
        split = "test"
    else:
        source = tmp_path / "none"
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises((PlanError, RecordsError)):
        way_back(source, out, to, split)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_url_is_no_folder_to_write(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (lambda: way_back(records, Path("s3://bucket/out")), lambda: run(records, Path("s3://bucket/out"))):
        with pytest.raises(PlanError, match="cannot be a URL"):
            write()
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_may_be_taken(records: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert way_back(records, tmp_path / "out").images["val"] == 6


def test_damaged_records_are_not_exported(tmp_path: Path) -> None:
    records = make_records(tmp_path / "made", per_class=4)
    shard = min((records / "train").glob("*.mindrecord"))
    data = shard.read_bytes()
    flip(shard, 8 * (data.index(b"\xff\xd8\xff") + 200))
    with pytest.raises(IntegrityError, match="is not what was stored"):
        way_back(records, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stop() -> bool:
    return True


@pytest.mark.parametrize("to", ["imagefolder", "webdataset"])
def test_a_full_disk_and_an_interruption_leave_nothing(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    with pytest.raises(Interrupted):
        export(records, tmp_path / "out", to, None, quiet, _stop)
    assert not list(tmp_path.iterdir())
    writer = export_formats.ClassFolders if to == "imagefolder" else export_formats.Tars
    write: Callable[..., None] = writer.write
    calls: list[int] = []

    def fails_later(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 9:
            _full()
        write(*arguments)

    monkeypatch.setattr(writer, "write", fails_later)
    with pytest.raises(PlanError, match="disk is full"):
        way_back(records, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_a_killed_export_starts_over(records: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / "train" / "n0").mkdir(parents=True)
    (partial / "train" / "n0" / "half.jpg").write_bytes(b"half")
    (partial / ".export.json").touch()
    assert way_back(records, tmp_path / "out").images["train"] == 30
    assert not list((tmp_path / "out").rglob("half.jpg"))
    assert not partial.exists()


@pytest.mark.slow
def test_the_command(records: Path, tmp_path: Path) -> None:
    result = prep_json("export", records, "--to", "webdataset", "--out", tmp_path / "out", "--split", "val")
    assert (result["images"], result["splits"], result["format"]) == (6, {"val": 6}, "webdataset")
    with tarfile.open(tmp_path / "out" / "val-00000.tar") as archive:
        assert len(archive.getnames()) == 18
    failed = prep("export", records, "--to", "webdataset", "--out", tmp_path / "out")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
