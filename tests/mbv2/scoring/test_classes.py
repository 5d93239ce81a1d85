"""Which label of a checkpoint a class of the records is, and scores on records that are named otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from imnet_prep import catalog
from imnet_prep.errors import CheckpointError
from imnet_prep.types import Batch
from mbv2.network.model import ModelConfig
from mbv2.scoring.classes import SubsetTally, checkpoint_labels
from mbv2.scoring.evaluate import Evaluation, open_evaluation
from mbv2.weights.checkpoint import Checkpoint, Meta
from tests.records import run

IMAGENET = tuple(synset.wnid for synset in catalog.synsets())
WHERE = Path("x.ckpt")


def meta(classes: int, names: tuple[str, ...] = ()) -> Meta:
    return Meta(asdict(ModelConfig(classes)), names, image_size=32, eval_crop=0.875, batch_size=4)


def labels(meta: Meta, *classes: str) -> list[int]:
    return checkpoint_labels(meta, classes, WHERE)[0].tolist()


def test_names_are_found_in_any_order_and_a_few_are_enough() -> None:
    ours = meta(3, ("cat", "dog", "owl"))
    assert labels(ours, "cat", "dog", "owl") == [0, 1, 2]
    assert labels(ours, "owl", "cat") == [2, 0]
    assert labels(meta(1000, IMAGENET), "n01440764", "n15075141") == [0, 999]


def test_numbers_are_imagenet_s_labels_not_places_in_a_sorted_list() -> None:
    """Folders 0 to 999 are sorted as text: 10 comes before 2, and is label 2 of the records."""
    folders = tuple(sorted(str(number) for number in range(1000)))
    assert folders[:4] == ("0", "1", "10", "100")
    assert labels(meta(1000, IMAGENET), *folders) == [int(name) for name in folders]
    assert labels(meta(1000), *folders) == [int(name) for name in folders]
    assert labels(meta(1000, IMAGENET), "0007", "0010") == [7, 10]
    assert checkpoint_labels(meta(12), ("0", "1", "10"), WHERE)[1] == tuple(map(str, range(12)))


def test_numbers_that_are_the_checkpoint_s_own_names_are_names() -> None:
    names = ("0", "1", "10", "2")
    assert labels(meta(4, names), *names) == [0, 1, 2, 3]
    assert labels(meta(4, names), "2", "10") == [3, 2]


def test_a_checkpoint_without_names_has_the_records_order() -> None:
    assert checkpoint_labels(meta(2), ("cat", "dog"), WHERE)[1] == ("cat", "dog")
    assert labels(meta(2), "1", "2") == [0, 1]  # 2 is no label


@pytest.mark.parametrize(
    ("ours", "classes", "told"),
    [
        (meta(3, ("a", "b", "c")), ("a", "b", "c", "d"), "other classes.*checkpoint, which has 3, .*got 'd'; use"),
        (meta(3, ("a", "b", "c")), ("a", "x", "y"), "other classes.*got 'x', and 1 more"),
        (meta(3), ("a", "b"), "another class count"),
        (meta(3, ("a", "b", "c")), ("0", "1"), "other classes.*got '0'"),  # numbers mean nothing there
        (meta(1000, IMAGENET), ("999", "1000"), "other classes.*got '999'"),
        (meta(1000, IMAGENET), ("1", "01"), "other classes"),
        (meta(1000, IMAGENET), ("n01440764", "1"), "other classes.*got '1'"),
    ],
)
def test_what_the_checkpoint_does_not_know_is_refused(ours: Meta, classes: tuple[str, ...], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        checkpoint_labels(ours, classes, WHERE)


def test_scores_among_a_few_classes_leave_the_other_logits_out() -> None:
    tally = SubsetTally(np.array([4, 1], np.int32), 6)
    logits = np.array([[9, 1, 0, 0, 2, 0], [9, 3, 0, 0, 3, 0], [0, 0, 0, 0, np.nan, 0]], np.float32)
    tally(Batch(np.zeros((3, 1, 1, 3), np.uint8), np.array([4, 4, 1], np.int32), np.arange(3, dtype=np.uint64)), logits)
    # The first is right; in the second class 1 comes before 4 as both are equal; the third is broken.
    assert tally.counts.tolist() == [3, 1, 2]
    assert tally.to_json() == {"subset_classes": 2, "subset_top1": 1 / 3, "subset_top5": 2 / 3}
    assert tally.rows() == [("among the 2 classes of the records", "top-1 0.3333 (1)")]


# --- an evaluation set as people have it -----------------------------------------------------------------------------


def looking_at_red(classes: int, *, plus: int = 0) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Return a network that sees the class which :func:`grey_folders` painted, plus a constant."""

    def predict(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        told = (image[:, 16, 16, 0].astype(int) + 2) // 5 + plus
        return np.eye(classes, dtype=np.float32)[told % classes]

    return predict


def grey_folders(folder: Path, names: dict[str, int]) -> Path:
    """Write three images a class, whose grey is five times a number."""
    for name, number in names.items():
        (folder / name).mkdir(parents=True)
        for copy in range(3):
            pixels = np.full((40 + copy, 40, 3), 5 * number, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{copy}.png")
    return folder


@pytest.mark.parametrize("named", ["number", "wnid"])
def test_imagenet_v2_and_wnid_folders_are_scored_with_thousand_class_weights(named: str, tmp_path: Path) -> None:
    numbers = [0, 1, 2, 9, 10, 11, 20, 21, 40, 50]
    names = {str(number) if named == "number" else IMAGENET[number]: number for number in numbers}
    run(grey_folders(tmp_path / "images", names), tmp_path / "records", split="val")
    loaded = Checkpoint(WHERE, meta(1000, IMAGENET), {})
    found = open_evaluation(loaded, tmp_path / "records", "val")
    assert found.class_names == IMAGENET
    assert dict(zip(found.manifest.classes, found.labels.tolist(), strict=True)) == names
    scores = found.score(looking_at_red(1000))
    assert (scores.images, scores.correct1) == (30, 30)
    assert np.flatnonzero(scores.confusion.diagonal()).tolist() == numbers
    assert scores.to_json()["subset_top1"] == 1
    # One class too far: 20, 9 and 0 become 21, 10 and 1 and so on; among the records' classes ties decide.
    wrong = found.score(looking_at_red(1000, plus=1))
    assert wrong.correct1 == 0
    assert wrong.confusion[20, 21] == 3


def test_an_even_sample_is_scored_and_nothing_else_is_decoded(tmp_path: Path) -> None:
    run(grey_folders(tmp_path / "images", {str(n): n for n in range(7)}), tmp_path / "records", split="val")
    found = open_evaluation(Checkpoint(WHERE, meta(7), {}), tmp_path / "records", "val")
    whole = found.score(looking_at_red(7))
    assert (whole.images, whole.correct1, whole.tallies) == (21, 21, ())
    for most, images in ((1, 1), (5, 5), (8, 7), (20, 11), (21, 21), (500, 21)):
        some = found.score(looking_at_red(7), most=most)
        assert (some.images, some.correct1) == (images, images), most
    ids = [int(batch.record_id[0]) for batch in found.spread(5)[0]]
    assert len(set(ids)) == 5


def test_classes_of_an_evaluation_are_shown_by_the_checkpoint_s_names(tmp_path: Path) -> None:
    run(grey_folders(tmp_path / "images", {"1": 1, "0": 0}), tmp_path / "records", split="val")
    found = open_evaluation(Checkpoint(WHERE, meta(1000, IMAGENET), {}), tmp_path / "records", "val")
    assert isinstance(found, Evaluation)
    assert replace(found, split="val").class_names[:2] == ("n01440764", "n01443537")
