"""Several right labels an image: which are read, and what counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from imnet_prep import catalog
from imnet_prep.errors import TrainError
from imnet_prep.types import Batch, record_id
from mbv2.scoring.score import score_batches
from mbv2.scoring.several_labels import RealTally, read_real_labels

NAMES = ("cat", "dog", "owl")
FILES = ["cat/ILSVRC2012_val_00000002.JPEG", "dog/ILSVRC2012_val_00000001.JPEG", "owl/ILSVRC2012_val_00000003.JPEG"]


def written(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_a_list_goes_by_the_number_in_the_name(tmp_path: Path) -> None:
    found = read_real_labels(written(tmp_path / "real.json", [[1], [0, 2], []]), "val", FILES, NAMES)
    assert found == {record_id("val", FILES[0]): {0, 2}, record_id("val", FILES[1]): {1}}


def test_a_map_goes_by_whole_or_base_names_and_takes_class_names(tmp_path: Path) -> None:
    document = {FILES[0]: ["owl", 0], "ILSVRC2012_val_00000001.JPEG": ["dog"], "elsewhere.JPEG": [1]}
    found = read_real_labels(written(tmp_path / "real.json", document), "val", FILES, NAMES)
    assert found == {record_id("val", FILES[0]): {0, 2}, record_id("val", FILES[1]): {1}}


def test_images_without_a_label_are_left_out_and_counted() -> None:
    logits = np.array([[0, 0, 1], [0, 0, 1], [9, 0, 0], [np.nan, 0, 0]], np.float32)
    ids = np.arange(4, dtype=np.uint64)
    batch = Batch(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32), ids)
    real = {0: frozenset({0, 2}), 1: frozenset({1}), 3: frozenset({0, 1, 2})}
    tally = RealTally(real)
    scores = score_batches(lambda _: logits, [batch], classes=3, batch_size=4, total=4, observers=[tally])
    assert tally.to_json() == {"real_top1": 1 / 3, "real_correct1": 1, "real_images": 3, "real_left_out": 1}
    assert scores.correct1 == 1


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("text", "list of lists"),
        ([[3]], "number up to 2.*got 3"),
        ([["lion"]], "class name of the checkpoint.*got 'lion'"),
        ([[True]], "got True"),
        ([[1.0]], r"got 1\.0"),
        ([1], "a list of labels"),
        ({"absent.JPEG": [1]}, "names no image of the split 'val'"),
        ([], "has no entry for dog/ILSVRC2012_val_00000001.JPEG.*got 0"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, document: object, told: str) -> None:
    with pytest.raises(TrainError, match=told):
        read_real_labels(written(tmp_path / "real.json", document), "val", FILES[1:2], NAMES)
    with pytest.raises(TrainError, match=r"absent\.json"):
        read_real_labels(tmp_path / "absent.json", "val", FILES, NAMES)


def test_a_list_holds_imagenet_s_numbers_whichever_classes_the_checkpoint_has(tmp_path: Path) -> None:
    wnids = tuple(synset.wnid for synset in catalog.synsets())
    path = written(tmp_path / "real.json", [[7], [999, 3], [], [5]])
    files = [f"{wnids[7]}/ILSVRC2012_val_{number:08d}{end}" for number, end in ((1, ".JPEG"), (2, "_n1.JPEG"))]
    files += [f"{wnids[5]}/ILSVRC2012_val_00000004.JPEG"]
    ids = [record_id("val", name) for name in files]
    assert read_real_labels(path, "val", files, wnids) == {ids[0]: {7}, ids[1]: {3, 999}, ids[2]: {5}}
    # A checkpoint of three classes: it lacks 3 and 5.
    assert read_real_labels(path, "val", files, (wnids[999], wnids[0], wnids[7])) == {ids[0]: {2}, ids[1]: {0}}
    with pytest.raises(TrainError, match="records of the ImageNet validation set"):
        read_real_labels(path, "val", ["n01440764/photo.jpg"], wnids)
    with pytest.raises(TrainError, match="number up to 999; got 1000"):
        read_real_labels(written(tmp_path / "bad.json", [[1000]]), "val", files[:1], wnids)
