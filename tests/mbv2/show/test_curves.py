"""Pictures hold what they are made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imnet_prep.errors import TrainError
from mbv2.show.curves import draw_confusion, draw_curves
from mbv2.training.logs import EpochRow


def test_curves_are_drawn_for_any_number_of_epochs(tmp_path: Path) -> None:
    rows = [EpochRow(n, n * 10, 0.1, 2.0 / n, 2.5 / n, 0.1 * n, 0.2 * n, 10.0, 0.0) for n in range(1, 4)]
    rows.append(EpochRow(4, 40, 0.1, float("nan"), None, None, None, 10.0, 0.0))
    inks = []
    for count in (0, 1, 4):
        draw_curves(tmp_path / "curves.png", rows[:count], "a title", classes=6)
        with Image.open(tmp_path / "curves.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        inks.append(int((pixels == (0x2A, 0x8A, 0x4A)).all(1).sum()))  # the colour of top-1
    assert inks[0] < inks[1] < inks[2]
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_show_top_5_where_there_are_more_classes_than_five(tmp_path: Path) -> None:
    rows = [EpochRow(n, n * 10, 0.1, 2.0 / n, 2.5 / n, 0.1 * n, 0.2 * n, 10.0, 0.0) for n in range(1, 4)]
    seen = []
    for classes in (5, 6):
        draw_curves(tmp_path / "curves.png", rows, "a title", classes)
        with Image.open(tmp_path / "curves.png") as picture:
            seen.append(bool((np.asarray(picture.convert("RGB")) == (0xB0, 0x7C, 0x1C)).all(-1).any()))
    assert seen == [False, True]


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_confusion_matrix_is_dark_where_the_guesses_are(tmp_path: Path, classes: int) -> None:
    draw_confusion(tmp_path / "m.png", np.eye(classes, dtype=np.int64) * 5, tuple(f"class {n}" for n in range(classes)))
    with Image.open(tmp_path / "m.png") as picture:
        pixels = np.asarray(picture.convert("L")).astype(int)
    left = 230 if classes <= 83 else 30
    cell = max(1, min(40, 1000 // classes))
    inside = pixels[40 : 40 + cell * classes, left : left + cell * classes]
    assert inside[2 if cell > 4 else 0, 2 if cell > 4 else 0] < 150
    assert inside[2 if cell > 4 else 0, cell * classes - 1] == 255


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="absent"):
        draw_confusion(tmp_path / "absent" / "m.png", np.eye(2, dtype=np.int64), ("a", "b"))
