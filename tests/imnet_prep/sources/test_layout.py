"""What the folders of an archive mean is decided from all of its images; loose ones are rejected by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from imnet_prep.errors import SourceError
from imnet_prep.sources import Found
from imnet_prep.sources.labels import Labels
from imnet_prep.sources.layout import Index
from imnet_prep.types import ImageRef, Reason, Rejected


def found(*names: str, split: str = "", labels: Labels | None = None) -> list[Found]:
    index = Index(Path("x.tar"))
    for place, name in enumerate(names):
        *folders, base = name.split("/")
        index.add(folders, base, 512 * (place + 1), 1)
    rows = list(index.found("x.tar", split, labels))
    assert split or len(rows) == len(names)  # none is lost
    return rows


def classes(rows: list[Found]) -> Counter[tuple[str, str]]:
    return Counter((row.split, row.class_name) for row in rows if isinstance(row, ImageRef))


def loose(rows: list[Found]) -> list[str]:
    rejected = [row for row in rows if isinstance(row, Rejected)]
    assert all(row.reason is Reason.UNLABELLED for row in rejected)
    return [row.file_name for row in rejected]


SPLITS = [f"{split}/{name}/{k}.jpg" for split in ("train", "val") for name in ("cat", "dog") for k in (1, 2)]
BOTH = {(split, name): 2 for split in ("train", "val") for name in ("cat", "dog")}


@pytest.mark.parametrize("top", ["", "ds/", "a/b/"])
@pytest.mark.parametrize("stray", ["preview.png", "{top}preview.png", "{top}train/preview.png"])
def test_a_loose_image_changes_no_class_and_no_split(top: str, stray: str) -> None:
    name = stray.format(top=top)
    rows = found(name, *(top + path for path in SPLITS))
    assert (classes(rows), loose(rows)) == (BOTH, [name])


@pytest.mark.parametrize("top", ["", "ds/"])
def test_a_loose_image_beside_classes_is_rejected(top: str) -> None:
    rows = found(f"{top}logo.png", *(f"{top}{name}/{k}.jpg" for name in ("cat", "dog") for k in (1, 2)))
    assert (classes(rows), loose(rows)) == ({("train", "cat"): 2, ("train", "dog"): 2}, [f"{top}logo.png"])


def test_loose_images_are_rejected_whichever_split_is_chosen() -> None:
    rows = found("preview.png", *SPLITS, split="val")
    assert (classes(rows), loose(rows)) == ({("val", "cat"): 2, ("val", "dog"): 2}, ["preview.png"])


def test_folders_in_classes_belong_to_names() -> None:
    rows = found("cat/2019/1.jpg", "cat/1.jpg", "dog/2019/1.jpg", "emu/2019/1.jpg")
    assert [row.file_name for row in rows] == ["cat/1.jpg", "cat/2019/1.jpg", "dog/2019/1.jpg", "emu/2019/1.jpg"]


def test_names_of_splits_in_any_case() -> None:
    assert classes(found("Train/cat/1.jpg", "Validation/cat/1.jpg")) == {("train", "cat"): 1, ("val", "cat"): 1}


def test_a_flat_class_may_be_called_as_a_split() -> None:
    assert classes(found("test/1.jpg", "cat/1.jpg")) == {("train", "test"): 1, ("train", "cat"): 1}


def test_validation_images_are_labelled_by_name() -> None:
    labels = Labels("the list", {"1.jpg": "cat", "2.jpg": "dog"}, numbered=False)
    for folder in ("val", "val/images"):
        rows = found("train/cat/images/a.jpg", *(f"{folder}/{k}.jpg" for k in (1, 2, 3)), labels=labels)
        assert classes(rows) == {("train", "cat"): 1, ("val", "cat"): 1, ("val", "dog"): 1}
        assert loose(rows) == [f"{folder}/3.jpg"]
    rows = found("set/val/1.jpg", labels=labels)
    assert classes(rows) == {("val", "cat"): 1}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat/2019/1.jpg", "dog/2019/1.jpg", "train/2019/1.jpg"], "train in it can be splits or, with cat, dog"),
        ([*SPLITS, "bonus/1.jpg"], "train, val in it can be splits or, with bonus"),
        (["ds/train/cat/1.jpg", "ds/val/cat/1.jpg", "extra/1.jpg"], "ds can be a class, or hold the splits train, val"),
        (["ds/cat/1.jpg", "ds/dog/1.jpg", "docs/logo.png"], "ds can be a class, or hold 2 classes; beside it are docs"),
        (["cat/1.jpg", "cat/2.jpg", "cat/more/3.jpg"], "2 images are directly in cat"),
        (["train/1.jpg", "val/2.jpg"], "train, val in it hold images and no class folders"),
        (["val/cat/1.jpg", "validation/cat/2.jpg"], "two folders for val"),
    ],
)
def test_what_can_mean_two_things_is_refused(names: list[str], words: str) -> None:
    with pytest.raises(SourceError, match=words) as caught:
        found(*names)
    assert "x.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
