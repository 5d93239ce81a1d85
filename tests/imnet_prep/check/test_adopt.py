"""Adoption: files of ImageNetToMR and of hand-written scripts get a manifest; all else then works on them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep.build.reshard import ReshardOptions, reshard
from imnet_prep.check.adopt import AdoptOptions, AdoptResult, adopt
from imnet_prep.check.repair import repair_index
from imnet_prep.check.verify import verify
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.records.manifest import MANIFEST, load_manifest
from imnet_prep.records.mindrecord import Shard, index_path
from imnet_prep.records.publish import changing
from imnet_prep.records.record_list import RECORDS
from tests.imnet_prep.obstacles import make_fifo, names_below, shared_folder, small_disk, unprivileged
from tests.records import copy, digests, make_records, prep, prep_json, prep_process, quiet, read_records
from tests.synthetic import WNIDS, encode, jpeg, make_image_folder, picture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ImageNetToMR writes: several files, some perhaps without a row, and absolute paths."""
    ImageNetToMR = pytest.importorskip("mindspore.mindrecord").ImageNetToMR

    folder = tmp_path_factory.mktemp("imagenettomr")
    names = ("zebra", "ant", "n01440764")  # in label order, which is not the sorted one
    make_image_folder(folder / "images", names, 8, ())
    (folder / "map.txt").write_text("".join(f"{name} {label}\n" for label, name in enumerate(names)))
    (folder / "records").mkdir()
    ImageNetToMR(
        str(folder / "map.txt"), str(folder / "images"), str(folder / "records" / "imagenet.mindrecord"), 3
    ).transform()
    return folder / "records"


def take(folder: Path, **options: Any) -> AdoptResult:
    return adopt(folder, AdoptOptions(workers=1, **options), quiet)


def write(path: Path, fields: dict[str, str], rows: list[dict[str, Any]], shards: int = 1) -> Path:
    FileWriter = pytest.importorskip("mindspore.mindrecord").FileWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = FileWriter(str(path), shard_num=shards)
    writer.set_header_size(1 << 16)
    writer.set_page_size(1 << 15)
    writer.add_schema({name: {"type": kind} for name, kind in fields.items()}, "by hand")
    writer.write_raw_data(rows)
    writer.commit()
    return path


def test_imagenettomr_is_adopted_verified_and_read_by_the_pipeline(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "records")
    before = {path.name: file_digest(path) for path in folder.iterdir()}
    result = take(folder)
    assert {path.name: file_digest(path) for path in folder.glob("imagenet*")} == before
    assert result.manifest.classes == ("zebra", "ant", "n01440764")
    assert result.manifest.splits["train"].images == 24
    assert result.manifest.splits["train"].class_counts == (8, 8, 8)
    checked = verify(folder, "decode", 1, quiet)
    assert checked.ok, checked.problems
    line = next(read_records(folder, result.manifest.splits["train"]))
    assert line.file_name.startswith("zebra/zebra_")
    with open_batches(folder, "train", TrainOptions(batch_size=8, image_size=32), seed=1) as batches:
        labels = np.concatenate([batch.label for batch in batches])
    assert np.bincount(labels).tolist() == [8, 8, 8]


def test_adopted_records_reshard_to_our_format_with_every_image_as_it_was(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "records")
    take(folder)
    result = reshard([folder], tmp_path / "ours", ReshardOptions(shards=2, workers=1), quiet)
    assert result.labels_unchanged
    assert result.written.records == 24
    assert result.built.manifest.classes == ("zebra", "ant", "n01440764")
    assert verify(tmp_path / "ours", "decode", 1, quiet).ok
    lines = [list(read_records(f, load_manifest(f).splits["train"])) for f in (folder, tmp_path / "ours")]
    pairs = [sorted((line.sha256, line.label, line.file_name) for line in part) for part in lines]
    assert pairs[0] == pairs[1]


def test_adopted_index_is_made_again_with_the_same_rows(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "records")
    take(folder)
    path = folder / "imagenet.mindrecord0"
    with Shard(path) as shard:
        before = [getattr(shard.index, name).tolist() for name in ("raw_start", "raw_end", "blob_start", "blob_end")]
    index_path(path).unlink()
    result = repair_index(folder, quiet)
    assert not result.ok  # the manifest has the digest of the index that MindSpore wrote
    assert [shard.state for shard in result.shards if not shard.exact] == ["rebuilt"]
    with Shard(path) as shard:
        again = [getattr(shard.index, name).tolist() for name in ("raw_start", "raw_end", "blob_start", "blob_end")]
    assert again == before
    with open_batches(folder, "train", EvalOptions(batch_size=8, image_size=32)) as batches:
        assert sum(len(batch) for batch in batches) == 24


def test_hand_written_data_and_label_in_two_splits(tmp_path: Path) -> None:
    fields = {"data": "bytes", "label": "int64"}
    for place, split in enumerate(("train", "val")):
        rows = [{"data": jpeg(k % 3, 100 * place + k), "label": k % 3} for k in range(12)]
        write(tmp_path / "r" / split / "mine.mindrecord", fields, rows, shards=3 - place)
    result = take(tmp_path / "r")
    assert result.manifest.classes == ("0", "1", "2")
    assert {name: split.images for name, split in result.manifest.splits.items()} == {"train": 12, "val": 12}
    assert any("--label-space" in note for note in result.notes)
    assert verify(tmp_path / "r", "decode", 1, quiet).ok
    with open_batches(tmp_path / "r", "val", EvalOptions(batch_size=5, image_size=24)) as batches:
        assert sum(len(batch) for batch in batches) == 12


def test_class_names_come_from_a_list_or_from_imagenet(tmp_path: Path) -> None:
    fields = {"image": "bytes", "label": "int32", "file_name": "string"}
    rows = [{"image": jpeg(k, k), "label": k, "file_name": f"{WNIDS[k]}_{k}.JPEG"} for k in range(3)]
    write(tmp_path / "r" / "val.mindrecord", fields, rows)
    by_name = take(tmp_path / "r").manifest
    assert (by_name.label_space, len(by_name.classes), list(by_name.splits)) == ("imagenet1k", 1000, ["val"])
    assert verify(tmp_path / "r", "decode", 1, quiet).ok
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name}\n" for name in (*WNIDS[:3], "other")))
    given = take(tmp_path / "r", label_space=str(names), force=True).manifest
    assert given.classes == (*WNIDS[:3], "other")
    names.write_text("a\nb\n")
    with pytest.raises(RecordsError, match="label 2 has no name"):
        take(tmp_path / "r", label_space=str(names), force=True)


def test_a_label_that_its_folder_contradicts_is_an_integrity_error(tmp_path: Path) -> None:
    fields = {"image": "bytes", "label": "int32", "file_name": "string"}
    rows = [{"image": jpeg(0, k), "label": int(k > 1), "file_name": f"/a/{'xy'[k % 2]}/{k}.jpg"} for k in range(4)]
    write(tmp_path / "r" / "a.mindrecord", fields, rows)
    with pytest.raises(IntegrityError, match="two classes"):
        take(tmp_path / "r")
    assert not (tmp_path / "r" / MANIFEST).exists()


def test_undecodable_records_are_named_and_adopted_only_when_asked(tmp_path: Path) -> None:
    fields = {"image": "bytes", "label": "int32", "file_name": "string"}
    whole = jpeg(0, 1)
    images = [whole, whole[:-200], encode(picture(1, 5), "PNG"), jpeg(1, 3)]
    rows = [{"image": image, "label": k // 2, "file_name": f"/s/c{k // 2}/{k}.jpg"} for k, image in enumerate(images)]
    write(tmp_path / "r" / "a.mindrecord", fields, rows)
    with pytest.raises(IntegrityError, match=r"1 records do not decode.*row 1"):
        take(tmp_path / "r")
    assert take(tmp_path / "r", keep_undecodable=True).undecodable == 1
    assert [(p.kind, p.row) for p in verify(tmp_path / "r", "decode", 1, quiet).problems] == [("image", 1)]


def test_missing_index_is_made_and_missing_parts_are_named(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "records")
    index_path(folder / "imagenet.mindrecord0").unlink()
    assert any("a new one is written" in note for note in take(folder).notes)
    assert verify(folder, "hash", 1, quiet).ok
    fields = {"data": "bytes", "label": "int32"}
    rows = [{"data": jpeg(0, k), "label": 0} for k in range(9)]
    write(tmp_path / "parts" / "p.mindrecord", fields, rows, shards=3)
    for path in tmp_path.glob("parts/p.mindrecord1*"):
        path.unlink()
    with pytest.raises(RecordsError, match=r"files that are missing.*p.mindrecord1"):
        take(tmp_path / "parts")


def test_renamed_files_manifests_that_are_there_and_empty_folders_are_refused(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "records")
    take(folder)
    with pytest.raises(RecordsError, match="--force"):
        take(folder)
    (tmp_path / "renamed").mkdir()
    for suffix in ("", ".db"):
        shutil.copy(folder / f"imagenet.mindrecord0{suffix}", tmp_path / "renamed" / f"other.mindrecord{suffix}")
    with pytest.raises(RecordsError, match="was renamed"):
        take(tmp_path / "renamed")
    (tmp_path / "empty").mkdir()
    for place, text in ((tmp_path / "empty", "has no MindRecord files"), (tmp_path / "none", "no such folder")):
        with pytest.raises(RecordsError, match=text):
            take(place)


def test_worker_count_changes_nothing(made: Path, tmp_path: Path) -> None:
    folders = [copy(made, tmp_path / name) for name in ("one", "two")]
    take(folders[0])
    adopt(folders[1], AdoptOptions(workers=2), quiet)
    texts = [(folder / MANIFEST).read_bytes() for folder in folders]
    assert texts[0] == texts[1]
    assert names_below(folders[0]) == names_below(folders[1])


def by_hand(folder: Path, rows: int = 24) -> Path:
    """A small file of two classes."""
    fields = {"image": "bytes", "label": "int32", "file_name": "string"}
    named = [(k % 2, f"/photos/{'xy'[k % 2]}/{k}.jpg") for k in range(rows)]
    write(
        folder / "a.mindrecord",
        fields,
        [{"image": jpeg(label, k), "label": label, "file_name": name} for k, (label, name) in enumerate(named)],
    )
    return folder


def bare(records: Path) -> Path:
    """Take the manifest and the lists away from records of ours."""
    for path in (records / MANIFEST, *records.glob("*/*.gz"), *records.glob("*.jsonl")):
        path.unlink()
    return records


@pytest.mark.parametrize(
    ("fault", "error"), [("labels", "no name in"), ("image", "do not decode"), ("shard", "damaged")]
)
def test_a_forced_adoption_that_fails_leaves_everything_as_it_was(tmp_path: Path, fault: str, error: str) -> None:
    records = make_records(tmp_path, shards=1)
    val = min(records.glob("val/*.mindrecord"))
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n" if fault == "labels" else "a\nb\nc\n")
    data = bytearray(val.read_bytes())
    if fault == "image":  # in the second split: the list of the first would be written by then
        end = data.rindex(b"\xff\xd9")
        data[end - 200 : end] = bytes(200)
    elif fault == "shard":
        data[data.rindex(b"\xa9file_name") - 1] = 0xC1  # no MessagePack begins so
    val.write_bytes(data)
    before = digests(records)
    with pytest.raises((RecordsError, IntegrityError), match=error):
        take(records, force=True, label_space=str(names))
    assert digests(records) == before
    assert names_below(records) == set(before) | {"train", "val"}


def test_a_forced_adoption_that_finds_a_name_twice_keeps_the_list(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "records")
    take(folder)
    fields = {"image": "bytes", "label": "int32", "file_name": "string"}
    names = [(label, f"/{part}/{'xy'[label]}/1.jpg") for label in (0, 1) for part in ("one", "two")]
    rows = [{"image": jpeg(label, k), "label": label, "file_name": name} for k, (label, name) in enumerate(names)]
    write(tmp_path / "new" / "a.mindrecord", fields, rows)
    for path in (tmp_path / "new").iterdir():
        shutil.copy(path, folder)
    before = digests(folder)
    with pytest.raises(RecordsError, match="two records of split train have the same class and name"):
        take(folder, force=True)
    assert digests(folder) == before
    assert names_below(folder) == {*before, "train"}


@pytest.mark.parametrize("free_pages", [0, 2, *(pytest.param(pages, marks=pytest.mark.long) for pages in (1, 4))])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_full_disk_is_one_line_and_leaves_everything_as_it_was(
    tmp_path: Path, free_pages: int, indexed: bool
) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        folder = copy(by_hand(tmp_path / "records"), disk / "records")  # MindSpore wants more room than the disk has
        if not indexed:
            index_path(folder / "a.mindrecord").unlink()
        before = digests(folder)
        filler = disk / "filler"
        free = shutil.disk_usage(disk).free - 4096 * free_pages
        filler.write_bytes(bytes(free))
        done = prep("adopt", folder, "--workers", 1)
        assert done.returncode == 1, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")
        assert "No space left" in done.stderr or "disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        assert digests(folder) == before
        assert names_below(folder) == set(before)
        filler.unlink()
        prep_json("adopt", folder, "--workers", 1)
        assert verify(folder, "hash", 1, quiet).ok


def test_a_folder_that_may_not_be_written_is_one_named_error(tmp_path: Path) -> None:
    with shared_folder() as place:
        folder = by_hand(place / "records")
        (folder / "train").mkdir()
        for path in folder.glob("a.*"):
            path.chmod(0o644)
        folder.chmod(0o555)
        with unprivileged(), pytest.raises(RecordsError, match=r"cannot be written.*got Permission denied"):
            take(folder)
        folder.chmod(0o777)
        (folder / "train").chmod(0o555)
        with unprivileged(), pytest.raises(RecordsError, match="train: cannot be written"):
            take(folder)
        assert names_below(folder) == {"a.mindrecord", "a.mindrecord.db", "train"}
        (folder / "train").chmod(0o777)
        take(folder)


ODD = ("Screenshot 10.24\u202fAM.jpg", "\u3000wide.jpg", "no\xa0break.jpg", "\U0001f469\u200d\U0001f4bb.jpg")


def test_names_that_a_conversion_accepts_are_adopted(tmp_path: Path) -> None:
    def odd(source: Path) -> None:
        for number, name in enumerate(ODD):
            (source / "train" / WNIDS[0] / name).write_bytes(jpeg(0, 900 + number))

    records = make_records(tmp_path, shards=1, add=odd)
    before = list(read_records(records, load_manifest(records).splits["train"]))
    assert {line.file_name.split("/")[1] for line in before} > set(ODD)
    manifest = take(bare(records)).manifest
    assert list(read_records(records, manifest.splits["train"])) == before
    assert verify(records, "decode", 1, quiet).ok


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_class_with_subfolders_is_adopted_under_the_same_names(tmp_path: Path, everywhere: bool) -> None:
    def deep(source: Path) -> None:
        for split in ("train", "val"):
            for number, name in enumerate(WNIDS[: 3 if everywhere else 1]):
                for part in ("one", "two"):
                    (source / split / name / part).mkdir()
                    (source / split / name / part / "a.jpg").write_bytes(jpeg(number, 900 + len(part)))
                if everywhere:
                    for path in (source / split / name).glob("*.jpg"):
                        path.rename(path.parent / "one" / path.name)

    records = make_records(tmp_path, shards=1, add=deep)
    before = load_manifest(records)
    lines = {name: list(read_records(records, before.splits[name])) for name in before.splits}
    after = take(bare(records)).manifest
    assert [after.classes[label] for label in range(3)] == list(before.classes)
    assert {name: list(read_records(records, after.splits[name])) for name in after.splits} == lines
    assert verify(records, "decode", 1, quiet).ok


def test_a_test_split_may_have_labels_in_part(tmp_path: Path) -> None:
    rows = [{"image": jpeg(0, k), "label": k % 2 - 1} for k in range(4)]
    write(tmp_path / "r" / "test" / "a.mindrecord", {"image": "bytes", "label": "int32"}, rows)
    take(tmp_path / "r")
    assert load_manifest(tmp_path / "r").splits["test"].class_counts == (2,)


def test_a_control_character_in_a_name_is_refused_with_its_place(tmp_path: Path) -> None:
    fields = {"image": "bytes", "label": "int32", "file_name": "string"}
    write(tmp_path / "r" / "a.mindrecord", fields, [{"image": jpeg(), "label": 0, "file_name": "a\nb.jpg"}])
    with pytest.raises(RecordsError, match=r"row 0: no file_name: its name holds control characters"):
        take(tmp_path / "r")


@pytest.mark.parametrize("place", ["a.mindrecord", "a.mindrecord.db", f"train/{RECORDS}"])
def test_a_fifo_does_not_hang(tmp_path: Path, place: str) -> None:
    folder = by_hand(tmp_path / "records")
    (folder / "train").mkdir()
    (folder / place).unlink(missing_ok=True)
    make_fifo(folder / place)
    done = prep_process("adopt", folder, "--workers", 1, timeout_s=60)
    assert "Traceback" not in done.stderr
    if place.startswith("train"):
        assert done.returncode == 0, done.stderr
        assert verify(folder, "hash", 1, quiet).ok
    else:
        assert done.returncode == 1
        assert "regular file" in done.stderr
        assert names_below(folder) == {"a.mindrecord", "a.mindrecord.db", "train"}


def test_a_folder_in_place_of_the_list_is_refused(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "records")
    (folder / "train" / RECORDS).mkdir(parents=True)
    before = names_below(folder)
    with pytest.raises(RecordsError, match=f"{RECORDS}: is a folder"):
        take(folder)
    assert names_below(folder) == before


def test_a_second_adoption_at_the_same_time_is_told_so(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "records")
    with changing(folder), pytest.raises(RecordsError, match="another command is changing it"):
        take(folder)
    take(folder)


@pytest.mark.parametrize("interrupted", ["adopt", "repair-index"])
def test_what_was_interrupted_is_finished_and_only_an_adoption_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    records = make_records(tmp_path, shards=1)
    before = digests(records)
    index = min(records.glob("train/*.db"))
    index.unlink()
    if interrupted == "adopt":
        bare(records)

    class Killed(BaseException):
        """The process ends here."""

    def die(one: Path, other: Path, rename: Any = os.replace) -> None:
        if other == index:
            raise Killed
        rename(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            take(records) if interrupted == "adopt" else repair_index(records, quiet)
    if interrupted == "adopt":
        take(records)
        assert digests(records).keys() == before.keys() - {"rejected.jsonl"}
    else:
        with pytest.raises(RecordsError, match=r"has a manifest\.json already"):
            take(records)
        assert digests(records) == before
    assert file_digest(index) == before[index.relative_to(records).as_posix()]
