"""What is said of a folder that another plan made or began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from imnet_prep.build.differences import Made, begun_plan, differences, options_of
from imnet_prep.build.options import PlanOptions
from imnet_prep.build.plan import Plan, make_plan
from imnet_prep.types import ImageRef

REFS = [
    ImageRef("train", name, f"{name}/{number}.jpg", f"/in/{name}/{number}.jpg", 0, 100 + number)
    for name in ("cat", "dog")
    for number in range(3)
]


def made(folder: Path, refs: Sequence[ImageRef] = REFS, **options: object) -> Plan:
    folder.mkdir()
    return make_plan(refs, folder / "plan.sqlite", PlanOptions(**options), lambda _: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("refs", "options", "said"),
    [
        (REFS, {"seed": 4}, "--seed was 0, now 4"),
        (REFS, {"shards": 2}, "--shards was not given, now 2"),
        (REFS, {"seed": 1, "val_fraction": 0.4}, "--seed was 0, now 1, --val-fraction was not given, now 0.4"),
        (REFS[:3], {}, "1 class is gone (the first dog)"),
        ([*REFS, replace(REFS[0], class_name="owl", file_name="owl/0.jpg")], {}, "1 class is new (the first owl)"),
        ([*REFS[:2], *REFS[3:]], {}, "1 image is gone (the first cat/2.jpg)"),
        ([replace(REFS[0], size_bytes=7), *REFS[1:]], {}, "1 image is changed (the first cat/0.jpg)"),
        ([replace(REFS[0], file_name="cat/9.jpg"), *REFS[1:]], {},
         "1 image is new (the first cat/9.jpg), 1 image is gone (the first cat/0.jpg)"),
    ],
)  # fmt: skip
def test_what_differs_from_a_begun_plan_is_named(
    tmp_path: Path, refs: list[ImageRef], options: dict[str, object], said: str
) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b", refs, **options)
    assert differences(begun_plan(first.database, {"options": options_of(first)}, second), second) == said


def test_of_a_finished_folder_the_images_are_counted(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b", REFS[1:])
    before = replace(Made.of_plan(first, options_of(first)), database=None)
    assert differences(before, second) == "train had 6 images, now 5"


def test_a_note_of_an_earlier_version_does_not_say(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b", seed=1)
    assert differences(begun_plan(first.database, {"plan": first.digest}, second), second).startswith("other images")
    first.database.write_bytes(b"damaged")
    assert begun_plan(first.database, {"options": options_of(first)}, second) is None
