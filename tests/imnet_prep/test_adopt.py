"""Adoption: files of ImageNetToMR and of hand-written scripts get a manifest; all else then works on them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep.adopt import AdoptOptions, AdoptResult, adopt
from imnet_prep.augment import EvalOptions, TrainOptions
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import file_digest
from imnet_prep.pipeline import open_batches
from imnet_prep.records.manifest import MANIFEST, load_manifest
from imnet_prep.records.mindrecord import Shard, index_path
from imnet_prep.repair import repair_index
from imnet_prep.reshard import ReshardOptions, reshard
from imnet_prep.verify import verify
from tests.imnet_prep.records_folder import copy, quiet, read_records
from tests.synthetic import WNIDS, encode, jpeg, make_image_folder, picture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ImageNetToMR writes: several files, some perhaps without a row, and absolute paths."""
    from mindspore.mindrecord import ImageNetToMR

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
    from mindspore.mindrecord import FileWriter

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
    assert result.proof.records == 24
    assert result.manifest.classes == ("zebra", "ant", "n01440764")
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
    assert any("made again" in note for note in take(folder).notes)
    assert verify(folder, "hash", 1, quiet).ok
    fields = {"data": "bytes", "label": "int32"}
    rows = [{"data": jpeg(0, k), "label": 0} for k in range(9)]
    write(tmp_path / "parts" / "p.mindrecord", fields, rows, shards=3)
    for path in tmp_path.glob("parts/p.mindrecord1*"):
        path.unlink()
    with pytest.raises(RecordsError, match=r"not there.*p.mindrecord1"):
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
    for place, text in ((tmp_path / "empty", "no MindRecord file"), (tmp_path / "none", "no such folder")):
        with pytest.raises(RecordsError, match=text):
            take(place)


def test_worker_count_changes_nothing(made: Path, tmp_path: Path) -> None:
    folders = [copy(made, tmp_path / name) for name in ("one", "two")]
    take(folders[0])
    adopt(folders[1], AdoptOptions(workers=2), quiet)
    texts = [(folder / MANIFEST).read_bytes() for folder in folders]
    assert texts[0] == texts[1]
    assert not [name for name in os.listdir(folders[1]) if name.startswith(".adopt")]
