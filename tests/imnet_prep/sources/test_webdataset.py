"""WebDataset tars: labels in every form, names, splits, provenance, and nothing lost."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.sources import Found, Source, detect, merge
from imnet_prep.sources.staging import Staging
from imnet_prep.types import ImageRef, Reason, Rejected
from tests.records import prep, prep_json, run
from tests.synthetic import jpeg, make_image_folder, tar_bytes

A, B, C = (jpeg(label, 0, 20, 16) for label in range(3))
CLASSES = ("cat", "dog", "owl")


def put(folder: Path, name: str, members: Mapping[str, bytes | str | dict[str, Any] | int]) -> Path:
    """Write a tar of files; texts, numbers and JSON are encoded."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(tar_bytes({name: _bytes(data) for name, data in members.items()}))
    return path


def _bytes(data: bytes | str | dict[str, Any] | int) -> bytes:
    if isinstance(data, bytes):
        return data
    return json.dumps(data).encode() if isinstance(data, dict) else str(data).encode()


def found_in(
    *paths: Path, split: str | None = None, classes: Sequence[str] = ()
) -> tuple[dict[str, ImageRef], dict[str, Rejected], Sequence[Source]]:
    sources = detect(paths, split, classes=classes)
    rows: list[Found] = list(merge(sources))
    stored = {f"{row.split}/{row.file_name}": row for row in rows if isinstance(row, ImageRef)}
    rejected = {f"{row.split}/{row.file_name}": row for row in rows if isinstance(row, Rejected)}
    assert len(stored) + len(rejected) == len(rows)
    return stored, rejected, sources


def names(*paths: Path, **options: Any) -> list[str]:
    stored, rejected, _ = found_in(*paths, **options)
    assert not rejected
    return list(stored)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"cls": 1}, "dog"),
        ({"cls": " 1\n"}, "dog"),
        ({"cls": "cat"}, "cat"),
        ({"txt": "wild cat"}, "wild cat"),
        ({"json": {"label": 1}}, "dog"),
        ({"json": {"label": "1"}}, "dog"),
        ({"json": {"label": 1.0, "other": 2}}, "dog"),
        ({"json": {"label": "fox"}}, "fox"),
        ({"json": {"cls": 2}}, "owl"),
        ({"json": {"class": "fox"}}, "fox"),
        ({"json": {"label": 1, "class_name": "n02"}}, "n02"),
        ({"json": {"label": 1, "wnid": "n01440764", "class_name": "tench"}}, "n01440764"),
        ({"json": {"width": 5}, "cls": 2}, "owl"),
        ({"txt": "a caption", "cls": 0}, "cat"),
        ({"json": {"class": "a/b"}}, "a_b"),
    ],
)
def test_a_label_in_every_form(tmp_path: Path, label: dict[str, Any], expected: str) -> None:
    path = put(tmp_path, "x.tar", {"1.jpg": A, **{f"1.{suffix}": data for suffix, data in label.items()}})
    assert names(path, classes=CLASSES) == [f"train/{expected}/1.jpg"]
    assert names(tmp_path, classes=CLASSES) == [f"train/{expected}/1.jpg"]


def test_a_tar_is_told_from_one_of_class_folders_by_all_members(tmp_path: Path) -> None:
    late = put(tmp_path, "late.tar", {"0.jpg": A, "1.jpg": B, "1.cls": 0, "2.jpg": C, "2.cls": 1})
    stored, rejected, sources = found_in(late, classes=CLASSES)
    assert list(stored) == ["train/cat/1.jpg", "train/dog/2.jpg"]
    assert {name: row.reason for name, row in rejected.items()} == {"train/0.jpg": Reason.UNLABELLED}
    assert sources[0].kind == "webdataset"
    sidecars = put(tmp_path, "b.tar", {"cat/1.jpg": A, "cat/1.json": {"x": 1}, "dog/1.jpg": B, "dog/1.txt": "a dog"})
    stored, _, sources = found_in(sidecars)
    assert list(stored) == ["train/cat/1.jpg", "train/dog/1.jpg"]
    assert sources[0].kind == "class-tar"
    assert sources[0].notes == ("b.tar: 2 other files ignored (.json 1, .txt 1)",)


def test_official_names_do_not_hide_the_labels(tmp_path: Path) -> None:
    path = put(
        tmp_path, "imagenet1k-validation-00.tar", {"ILSVRC2012_val_00000001.JPEG": A, "ILSVRC2012_val_00000001.cls": 7}
    )
    wnid = next(wnid for wnid, label in catalog.labels().items() if label == 7)
    imagenet = tuple(wnid for wnid, _ in catalog.synsets())
    assert names(path, classes=imagenet) == [f"val/{wnid}/ILSVRC2012_val_00000001.JPEG"]


def test_keys_in_folders_and_names_in_the_json(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        "x.tar",
        {
            "cat/1.jpg": A, "cat/1.cls": "cat", "more/1.jpg": A, "more/1.cls": "cat",
            "k.jpg": B, "k.json": {"label": "dog", "filename": "photos/k.JPEG"},
            "up.jpg": B, "up.json": {"label": "dog", "file_name": "dog/../../up.jpg"},
            "m.jpg": B, "m.json": {"label": "dog", "file_name": "dog/sub/Every.Dot.png"},
            "n.jpg": B, "n.json": {"label": "dog", "file_name": "elsewhere/other.png", "url": "http://a/b.jpg"},
            "my.photo.jpg": C, "my.cls": "owl",
        },
    )  # fmt: skip
    stored, rejected, _ = found_in(path)
    assert not rejected
    assert list(stored) == [
        "train/cat/1.jpg", "train/cat/more/1.jpg", "train/dog/k.JPEG", "train/dog/n.jpg", "train/dog/sub/Every.Dot.png",
        "train/dog/up.jpg", "train/owl/my.photo.jpg",
    ]  # fmt: skip
    assert stored["train/dog/n.jpg"].meta == '{"file_name":"elsewhere/other.png"}'
    assert stored["train/dog/n.jpg"].url == "http://a/b.jpg"
    assert stored["train/dog/sub/Every.Dot.png"].meta == ""


def test_what_is_no_whole_sample_is_rejected_by_name(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        "x.tar",
        {
            "ok.jpg": A, "ok.cls": 1, "none.jpg": B, "label.cls": 3, "info.json": {"label": 4}, "notes.txt": "hello",
            "two.png": A, "two.jpg": B, "two.cls": 1, "bad.jpg": A, "bad.json": "{", "list.jpg": A, "list.json": "[]",
            "minus.jpg": A, "minus.cls": -1, "no.jpg": A, "no.json": {"caption": "x"}, "both.jpg": A, "both.cls": 1,
            "both.json": {"label": 2}, "long.jpg": A, "long.cls": b"\xff\xfe", ".hidden.jpg": A,
        },
    )  # fmt: skip
    stored, rejected, sources = found_in(path, classes=CLASSES)
    assert list(stored) == ["train/dog/ok.jpg", "train/dog/two.jpg"]
    reasons = {name.removeprefix("train/"): (row.reason.value, row.detail) for name, row in rejected.items()}
    beside = "no .cls, .json or .txt of its name beside it in the tar"
    assert {name: (reason, detail.split(":")[0]) for name, (reason, detail) in reasons.items()} == {
        "none.jpg": ("unlabelled", beside),
        "label": ("unreadable", "a label, and no image beside it in the tar"),
        "info": ("unreadable", "a label, and no image beside it in the tar"),
        "two.png": ("duplicate_name", "a second image of its sample"),
        "bad.jpg": ("unreadable", "its JSON cannot be read"),
        "list.jpg": ("unreadable", "its JSON is no object"),
        "minus.jpg": ("unlabelled", "no class in its sample, whose JSON has nothing"),
        "no.jpg": ("unlabelled", "no class in its sample, whose JSON has caption"),
        "both.jpg": ("unreadable", "its labels contradict each other"),
        "long.jpg": ("unlabelled", "no class in its sample, whose JSON has nothing"),
    }
    assert sources[0].notes == ("x.tar: 1 other files ignored (.jpg 1)",)


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("[" * 100_000, "its JSON cannot be read"),
        ('{"label": "\\ud800"}', "no class in its sample, whose JSON has label"),
        ('{"\\ud800": 1}', "no class in its sample, whose JSON has \\ud800"),
        ('{"label": "a\\u0000b"}', "no class"),
        ('{"label": ".."}', "no class"),
        ('{"label": 1e400}', "no class"),
        ('{"label": [1]}', "no class"),
        ('{"label": 99999999999999999999}', "no class"),
    ],
)
def test_a_hostile_json_rejects_its_image(tmp_path: Path, text: str, detail: str) -> None:
    path = put(tmp_path, "x.tar", {"1.jpg": A, "1.json": text, "2.jpg": B, "2.cls": "b"})
    stored, rejected, _ = found_in(path)
    assert list(stored) == ["train/b/2.jpg"]
    assert [row.detail.startswith(detail) for row in rejected.values()] == [True], rejected


def test_a_key_twice_is_rejected_in_one_tar_and_told_apart_in_two(tmp_path: Path) -> None:
    put(tmp_path / "ds", "00000.tar", {"1.jpg": A, "1.cls": 0, "2.jpg": A, "2.cls": 0})
    put(tmp_path / "ds", "00001.tar", {"1.jpg": B, "1.cls": 0})
    assert names(tmp_path / "ds", classes=CLASSES) == [
        "train/cat/00000/1.jpg", "train/cat/00001/1.jpg", "train/cat/2.jpg",
    ]  # fmt: skip
    out = tmp_path / "twice.tar"
    out.write_bytes(tar_bytes({"1.jpg": A, "1.cls": b"0", "./1.jpg": B, "./1.cls": b"0"}))
    stored, rejected, _ = found_in(out, classes=CLASSES)
    assert (list(stored), list(rejected)) == (["train/cat/1.jpg"], ["train/cat/1.jpg"])


def test_a_key_twice_in_a_row_gives_no_image_the_label_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    path.write_bytes(tar_bytes({"1.jpg": A, "1.cls": b"0", "./1.jpg": B, "./1.cls": b"1"}))
    assert names(path, classes=CLASSES) == ["train/cat/1.jpg", "train/dog/1.jpg"]
    path.write_bytes(tar_bytes({"1.cls": b"0", "1.jpg": A, "./1.cls": b"1", "./1.jpg": B}))
    assert names(path, classes=CLASSES) == ["train/cat/1.jpg", "train/dog/1.jpg"]
    path.write_bytes(tar_bytes({"1.cls": b"0", "1.jpg": A, "./1.cls": b"1"}))
    stored, rejected, _ = found_in(path, classes=CLASSES)
    assert (list(stored), list(rejected)) == (["train/cat/1.jpg"], ["train/1"])


# --- names of classes ------------------------------------------------------------------------------------------------


def test_numbers_are_named_by_a_list_beside_by_imagenet_or_by_themselves(tmp_path: Path) -> None:
    members = {f"{k}.jpg": A for k in range(3)} | {f"{k}.cls": 5 * k for k in range(3)}
    path = put(tmp_path / "ds", "x.tar", dict(sorted(members.items())))
    stored, _, sources = found_in(path)
    assert list(stored) == ["train/00/0.jpg", "train/05/1.jpg", "train/10/2.jpg"]
    assert "--classes FILE" in sources[0].notes[0]
    (tmp_path / "ds" / "classnames.txt").write_text("".join(f"c{k}\n" for k in range(11)))
    stored, _, sources = found_in(path)
    assert list(stored) == ["train/c0/0.jpg", "train/c10/2.jpg", "train/c5/1.jpg"]
    assert sources[0].notes == ("x.tar: its classes are named by classnames.txt",)
    assert names(tmp_path / "ds") == list(stored)
    with pytest.raises(SourceError, match="class 10 has no name"):
        found_in(path, classes=CLASSES)
    wnids = [wnid for wnid, _ in catalog.synsets()][:3]
    timm = {f"{wnid}_{k}.jpg": A for k, wnid in enumerate(wnids)} | {f"{w}_{k}.cls": k for k, w in enumerate(wnids)}
    path = put(tmp_path, "timm.tar", dict(sorted(timm.items())))
    stored, _, sources = found_in(path)
    assert list(stored) == [f"train/{wnid}/{wnid}_{k}.jpg" for k, wnid in enumerate(wnids)]
    assert "numbered as ImageNet's" in sources[0].notes[0]
    timm[f"{wnids[0]}_0.cls"] = 2
    assert all(name.startswith("train/1") for name in names(put(tmp_path, "timm.tar", dict(sorted(timm.items()))))[:1])


def test_a_list_beside_a_compressed_tar_names_its_classes(tmp_path: Path) -> None:
    path = put(tmp_path / "ds", "x.tar", {"1.jpg": A, "1.cls": 0, "2.jpg": B, "2.cls": 1})
    (tmp_path / "ds" / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "ds" / "classes.txt").write_text("cat\ndog\n")
    manifest = run(tmp_path / "ds" / "x.tar.gz", tmp_path / "out").manifest
    assert manifest.classes == ("cat", "dog")
    assert (manifest.sources[0]["kind"], manifest.sources[0]["name"]) == ("webdataset", "x.tar.gz")


def test_sources_that_would_call_one_number_by_two_names_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.tar", {"1.jpg": A, "1.cls": 1, "2.jpg": B, "2.cls": 7})
    put(tmp_path, "b.tar", {"3.jpg": C, "3.cls": 7, "4.jpg": B, "4.cls": 11})
    (tmp_path / "names.txt").write_text("".join(f"class {number}\n" for number in range(12)))
    sources = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for more in ([], ["--dry-run"]):
        result = prep("to-mindrecord", *sources, "--out", tmp_path / "out", *more)
        assert (result.returncode, "with 1 and 2 digits" in result.stderr) == (1, True)
    assert run(sources, tmp_path / "out", classes=str(tmp_path / "names.txt")).manifest.classes == (
        "class 1", "class 11", "class 7",
    )  # fmt: skip


@pytest.mark.slow
def test_the_option_names_classes_and_is_in_the_manifest_when_used(tmp_path: Path) -> None:
    put(tmp_path / "ds", "train-0.tar", {"1.jpg": A, "1.cls": 0, "2.jpg": B, "2.cls": 2})
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    done = prep_json("to-mindrecord", tmp_path / "ds", "--out", tmp_path / "out", "--classes", tmp_path / "names.txt")
    manifest = RecordsFolder.open(tmp_path / "out").manifest
    assert (done["images"], manifest.classes) == (2, ("cat", "owl"))
    assert manifest.options["classes"] == list(CLASSES)
    assert "classes" not in run(make_image_folder(tmp_path / "photos", 2, 2), tmp_path / "plain").manifest.options
    for source, names, message in (("ds", "none.txt", "No such file"), ("photos", "names.txt", "leave it out")):
        wrong = prep("to-mindrecord", tmp_path / source, "--out", tmp_path / "no", "--classes", tmp_path / names)
        assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
        assert message in wrong.stderr


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names_of_tars", "expected"),
    [
        (("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"), ("train", "val")),
        (("train/00000.tar", "val/00000.tar"), ("train", "val")),
        (("00000.tar", "00001.tar"), ("train", "train")),
        (("constraint-0.tar", "trainer-1.tar"), ("train", "train")),
        (("TEST_0.tar", "valid_0.tar"), ("test", "val")),
    ],
)
def test_splits_are_told_by_names(tmp_path: Path, names_of_tars: Sequence[str], expected: Sequence[str]) -> None:
    for k, name in enumerate(names_of_tars):
        path = tmp_path / "ds" / name
        put(path.parent, path.name, {f"{k}.jpg": A, f"{k}.cls": 0})
    stored, _, sources = found_in(tmp_path / "ds", classes=CLASSES)
    assert sorted(stored) == sorted(f"{split}/cat/{k}.jpg" for k, split in enumerate(expected))
    assert sources[0].kind == "webdataset"
    for split in set(expected):
        if len(set(expected)) > 1:
            assert {row.split for row in found_in(tmp_path / "ds", split=split)[0].values()} == {split}
    if set(expected) == {"train"}:
        assert {row.split for row in found_in(tmp_path / "ds", split="val")[0].values()} == {"val"}


def test_a_name_without_a_split_among_others_is_not_guessed(tmp_path: Path) -> None:
    for name in ("train-0.tar", "extra.tar"):
        put(tmp_path, name, {"1.jpg": A, "1.cls": 0})
    with pytest.raises(SourceError, match=r"extra\.tar tells no split"):
        detect([tmp_path])
    with pytest.raises(SourceError, match="by its name"):
        found_in(tmp_path / "train-0.tar", split="val")


@pytest.mark.parametrize("name", ["more/b.tar", "train/more/b.tar", "b.tar.gz", "B.TAR", "b.zip"])
def test_no_archive_beside_the_tars_is_passed_over(tmp_path: Path, name: str) -> None:
    put(tmp_path / "ds", "a.tar", {"1.jpg": A, "1.cls": 0})
    put((tmp_path / "ds" / name).parent, Path(name).name, {"2.jpg": A, "2.cls": 0})
    with pytest.raises(SourceError, match=f"{name} would be passed over"):
        found_in(tmp_path / "ds")
    with pytest.raises(SourceError, match=r"passed over|further down"):
        detect([f"file://{tmp_path}/ds"], None, Staging(tmp_path / "staged"))


def test_a_test_split_needs_no_labels(tmp_path: Path) -> None:
    path = put(
        tmp_path, "test-0.tar", {"1.jpg": A, "1.json": {"label": -1, "id": 7}, "2.jpg": B, "3.jpg": C, "3.cls": 0}
    )
    stored, rejected, _ = found_in(path, classes=CLASSES)
    assert (list(stored), rejected) == (["test/1.jpg", "test/2.jpg", "test/cat/3.jpg"], {})


def test_tars_without_labels_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "cat.tar", {"1.jpg": A})
    put(tmp_path, "dog.tar", {"1.jpg": B})
    with pytest.raises(SourceError, match="hold no WebDataset samples"):
        found_in(tmp_path)


# --- what other tools write beside -----------------------------------------------------------------------------------


def test_timms_list_is_compared_with_the_tars(tmp_path: Path) -> None:
    for name in ("t-train-0000.tar", "t-train-0001.tar", "t-validation-00.tar"):
        put(tmp_path, name, {f"{name[:12]}.jpg": A, f"{name[:12]}.cls": 0})
    info = {
        "splits": {
            "train": {"filenames": ["t-train-0000.tar", "t-train-0001.tar"], "shard_lengths": [1, 1]},
            "validation": {"filenames": ["t-validation-00.tar"]},
        }
    }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert len(names(tmp_path, classes=CLASSES)) == 3
    (tmp_path / "_info.json").write_text(json.dumps(info).replace("[1, 1]", "[1, 2]"))
    with pytest.raises(SourceError, match=r"1 of 2 tars of train have another number .* with 2 samples"):
        found_in(tmp_path)
    (tmp_path / "t-train-0001.tar").unlink()
    with pytest.raises(SourceError, match="1 of 2 tars of train are missing"):
        found_in(tmp_path)
    assert len(names(tmp_path, split="val", classes=CLASSES)) == 1
    (tmp_path / "_info.json").write_text("[[")
    assert len(names(tmp_path, classes=CLASSES)) == 2


def test_a_gap_in_a_series_is_noted(tmp_path: Path) -> None:
    for number in (0, 1, 2, 4):
        put(tmp_path, f"{number:05d}.tar", {f"{number}.jpg": A, f"{number}.cls": 0})
    _, _, sources = found_in(tmp_path)
    assert any("1 of the series are missing, the first is number 3" in note for note in sources[0].notes)


def img2dataset(folder: Path, number: int, failed: int, label: str = "label") -> None:
    """Write a tar, its statistics and its table as img2dataset 1.45 does, with ``label`` as an additional column."""
    rows = [
        {
            "url": f"http://host/{number}/{k}.jpg", label: ("cat", "dog")[k % 2], "key": f"{number:05d}{k:04d}",
            "status": "success", "error_message": None, "width": 20, "height": 16, "original_width": 40,
            "original_height": 32, "exif": "{}", "sha256": "0" * 64,
        }
        for k in range(4)
    ]  # fmt: skip
    members: dict[str, Any] = {}
    for row in rows:
        members |= {f"{row['key']}.jpg": A, f"{row['key']}.json": row, f"{row['key']}.txt": "a caption"}
    put(folder, f"{number:05d}.tar", members)
    stats = {
        "count": 4 + failed, "successes": 4, "failed_to_download": failed, "failed_to_resize": 0, "duration": 1.5,
        "status_dict": {"success": 4, "HTTP Error 404: Not Found": failed},
    }  # fmt: skip
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))


def test_img2datasets_output_keeps_its_provenance_and_accounts_for_failed_urls(tmp_path: Path) -> None:
    img2dataset(tmp_path / "ds", 0, 3)
    img2dataset(tmp_path / "ds", 1, 0)
    stored, rejected, sources = found_in(tmp_path / "ds")
    assert (len(stored), rejected) == (8, {})
    row = stored["train/cat/000000000.jpg"]
    assert (row.url, row.status) == ("http://host/0/0.jpg", None)
    meta = json.loads(row.meta)
    assert (meta["sha256"], meta["status"], meta["original_width"]) == ("0" * 64, "success", 40)
    assert not {"label", "url", "error_message"} & meta.keys()
    assert sources[0].notes[0] == "00000.tar: 3 of 7 URLs failed (failed_to_download 3)"
    manifest = run(tmp_path / "ds", tmp_path / "out").manifest
    lines = list(RecordsFolder(tmp_path / "out", manifest).lines("train"))
    assert {line.url for line in lines} == {f"http://host/{n}/{k}.jpg" for n in range(2) for k in range(4)}
    assert all(line.meta and line.meta["status"] == "success" for line in lines)


def test_img2datasets_table_tells_why_urls_failed(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    img2dataset(tmp_path, 0, 3)
    statuses = ["success"] * 4 + ["failed_to_download"] * 2 + ["failed_to_resize"]
    parquet.write_table(pyarrow.table({"status": statuses}), tmp_path / "00000.parquet")
    _, _, sources = found_in(tmp_path)
    assert sources[0].notes[0] == "00000.tar: 3 of 7 URLs failed (failed_to_download 2, failed_to_resize 1)"


def test_a_tar_of_img2dataset_with_fewer_images_than_it_wrote_is_an_error(tmp_path: Path) -> None:
    img2dataset(tmp_path, 0, 0)
    text = (tmp_path / "00000_stats.json").read_text()
    (tmp_path / "00000_stats.json").write_text(text.replace('"successes": 4', '"successes": 5'))
    for path in (tmp_path, tmp_path / "00000.tar"):
        with pytest.raises(SourceError, match=r"00000\.tar lacks images; expected 5"):
            found_in(path)


def test_img2datasets_output_without_classes_says_what_it_has(tmp_path: Path) -> None:
    img2dataset(tmp_path / "ds", 0, 0, label="note")
    done = prep("to-mindrecord", tmp_path / "ds", "--out", tmp_path / "out")
    assert done.returncode == 3
    assert "unlabelled 4" in done.stderr
    rejected = (tmp_path / "out.partial" / "rejected.jsonl").read_text()
    assert "whose JSON has error_message, exif, height" in rejected


# --- written by the webdataset package -------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["ds-train-%04d.tar", "%05d.tar"])
def test_what_the_webdataset_package_writes_gives_the_shards_of_the_folder(tmp_path: Path, pattern: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    root = make_image_folder(tmp_path / "photos", 3, 8, splits=())
    (tmp_path / "ds").mkdir()
    images = sorted(root.rglob("*.jpg"), key=lambda path: path.name[::-1])
    labels = {name: k for k, name in enumerate(sorted({path.parent.name for path in images}))}
    with webdataset.ShardWriter(str(tmp_path / "ds" / pattern), maxcount=7, verbose=0) as sink:
        for path in images:
            sample = {
                "jpg": path.read_bytes(),
                "cls": labels[path.parent.name],
                "json": {"label": labels[path.parent.name]},
            }
            sink.write({"__key__": path.stem, **sample})
    (tmp_path / "ds" / "classnames.txt").write_text("".join(f"{name}\n" for name in labels))
    plain = run(root, tmp_path / "a").manifest
    manifest = run(tmp_path / "ds", tmp_path / "b").manifest
    assert manifest.splits == plain.splits
    assert manifest.classes == plain.classes
    assert len(list((tmp_path / "ds").glob("*.tar"))) == 4
