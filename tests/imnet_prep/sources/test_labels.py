"""Lists of labels beside the images."""

from __future__ import annotations

import pytest

from imnet_prep.errors import SourceError
from imnet_prep.sources.labels import kaggle_labels, read_tiny_annotations


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["ILSVRC2012_val_00000001,n00000001 1 2 3 4", "ILSVRC2012_val_00000001,n00000002 1 2 3 4"], "two classes"),
        (["ILSVRC2012_val_00000001,../../x 1 2 3 4"], "no name"),
        (['ILSVRC2012_val_00000001,"' + "x" * 200_000], "damaged"),
        (["nothing,else"], "none"),
    ],
)
def test_a_damaged_list_of_labels_is_an_error(lines: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        kaggle_labels("\n".join(["ImageId,PredictionString", *lines]).encode(), "LOC_val_solution.csv")


def test_annotations_that_contradict_each_other_are_an_error() -> None:
    assert read_tiny_annotations(b"a.jpg\tn1\t1\na.jpg\tn1\t2\n", "x").by_key == {"a.jpg": "n1"}
    with pytest.raises(SourceError, match="two classes"):
        read_tiny_annotations(b"a.jpg\tn1\t1\na.jpg\tn2\t2\n", "x")
