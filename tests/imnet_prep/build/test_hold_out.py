"""``--val-fraction`` divides each class by the seed and the names alone, and images stay in their split."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from imnet_prep.build.options import PlanOptions
from imnet_prep.build.plan import Plan, make_plan, shard_refs
from imnet_prep.errors import PlanError
from imnet_prep.types import ImageRef
from tests.records import digests, quiet, run
from tests.synthetic import make_image_folder


def refs(per_class: Mapping[str, int], split: str = "train", start: int = 0) -> list[ImageRef]:
    return [
        ImageRef(split, name, f"{name}/{k}.jpg", f"/x/{name}/{k}.jpg", 0, 100)
        for name, count in per_class.items()
        for k in range(start, start + count)
    ]


def plan(tmp_path: Path, items: list[ImageRef], fraction: float, **options: object) -> Plan:
    return make_plan(items, tmp_path / "plan", PlanOptions(val_fraction=fraction, **options), quiet)  # type: ignore[arg-type]


def members(made: Plan) -> dict[str, set[str]]:
    return {
        split: {ref.file_name for ref in shard_refs(made.database, part.first, part.first + part.images)}
        for split, part in made.splits.items()
    }


def by_class(names: set[str]) -> Counter[str]:
    return Counter(name.split("/")[0] for name in names)


def test_each_class_of_numbered_images_gives_the_fraction(tmp_path: Path) -> None:
    sizes = {"a": 1000, "b": 500, "c": 300, "d": 50, "e": 10, "n01440764": 24}
    for seed, fraction in enumerate((0.05, 0.1, 0.2, 0.25, 0.5)):
        got = members(plan(tmp_path, refs(sizes, start=seed * 100), fraction, seed=seed))
        held = by_class(got["val"])
        assert not got["val"] & got["train"]
        assert len(got["val"]) + len(got["train"]) == sum(sizes.values())
        assert all(abs(held[name] - images * fraction) <= 3 for name, images in sizes.items())


def test_each_class_of_other_names_gives_about_the_fraction(tmp_path: Path) -> None:
    words = [hashlib.sha256(f"{k}".encode()).hexdigest() for k in range(4000)]
    for k, names in enumerate((words, ["".join(c for c in word if c.isalpha()) for word in words])):
        items = [ImageRef("train", "a", f"a/{name}.jpg", f"/x/{name}", 0, 100) for name in names]
        got = members(plan(tmp_path, items, 0.2, seed=k))
        assert abs(len(got["val"]) - 800) < 4 * (4000 * 0.16) ** 0.5  # four standard deviations


def test_names_of_every_kind_can_be_divided(tmp_path: Path) -> None:
    names = [
        "9" * 5000,
        "0",
        "٣",
        "a.b/c.1.jpg",
        "no suffix",
        ".1",
        "x.jp2",
        "x1.jp2",
        "猫 12.jpg",
        "-1.jpg",
        "1\u0085.jpg",
    ]
    items = [ImageRef("train", "a", f"a/{name}", f"/x/{k}", 0, 100) for k, name in enumerate(names)]
    got = members(plan(tmp_path, items, 0.5))
    assert got["val"] | got["train"] == {item.file_name for item in items}
    first = {plan(tmp_path, items, 0.5, seed=seed).splits["val"].images for seed in range(20)}
    assert len(first) > 3


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.99])
def test_a_class_keeps_an_image_in_train_and_gives_one_where_its_share_is_one(tmp_path: Path, fraction: float) -> None:
    sizes = {f"c{images:02d}-{k}": images for images in range(1, 12) for k in range(4)} | {"large": 400}
    got = members(plan(tmp_path, refs(sizes), fraction))
    held, kept = by_class(got["val"]), by_class(got["train"])
    for name, images in sizes.items():
        assert kept[name] >= 1
        assert held[name] + kept[name] == images
        assert held[name] >= 1 or images * fraction < 1 or images == 1


def test_images_stay_where_they_are_when_others_are_added(tmp_path: Path) -> None:
    sizes = {"a": 60, "b": 25, "c": 200}
    before = members(plan(tmp_path, refs(sizes), 0.15, seed=5))
    more = [*refs(sizes), *refs({"a": 500, "b": 3, "d": 40}, start=1000)]
    after = members(plan(tmp_path, more, 0.15, seed=5))
    assert before["val"] <= after["val"]
    assert before["train"] <= after["train"]
    assert len(after["val"]) > len(before["val"])


def test_a_larger_fraction_takes_more_of_the_same_images(tmp_path: Path) -> None:
    first = members(plan(tmp_path, refs({"a": 300}), 0.1))
    assert first["val"] < members(plan(tmp_path, refs({"a": 300}), 0.2))["val"]


def test_seed_and_names_alone_decide(tmp_path: Path) -> None:
    items = refs({"a": 50, "b": 50})
    first = plan(tmp_path, items, 0.2)
    digest, got = first.digest, members(first)
    again = plan(tmp_path, items[::-1], 0.2)
    assert (again.digest, members(again)) == (digest, got)
    other = plan(tmp_path, items, 0.2, seed=1)
    assert members(other)["val"] != got["val"]
    assert plan(tmp_path, items, 0.25).digest != digest


def test_it_is_independent_of_the_order_of_the_shards(tmp_path: Path) -> None:
    items = refs({"a": 2000})
    made = make_plan(items, tmp_path / "plan", PlanOptions(), quiet)
    order = [ref.file_name for ref in shard_refs(made.database, 1, 2001)]
    held = members(plan(tmp_path, items, 0.2))["val"]
    assert 150 < sum(name in held for name in order[:1000]) < 250
    assert 150 < sum(int(name[2:-4]) % 2 for name in held) < 250


def test_other_subsets_come_after_it(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.write_text("a\nb\n")
    made = plan(tmp_path, refs({"a": 100, "b": 100, "c": 100}), 0.2, keep_classes=keep, max_per_class=5)
    assert {split: by_class(names) for split, names in members(made).items()} == {
        "train": {"a": 5, "b": 5}, "val": {"a": 5, "b": 5},
    }  # fmt: skip
    test = [ImageRef("test", "", f"{k}.jpg", f"/x/{k}.jpg", 0, 10) for k in range(9)]
    assert plan(tmp_path, [*refs({"a": 30}), *test], 0.2).splits["test"].images == 9


def test_it_is_refused_where_it_can_divide_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"have a validation split.*got 3 validation images"):
        plan(tmp_path, [*refs({"a": 9}), *refs({"a": 3}, "val")], 0.2)
    for items in (refs({"a": 1, "b": 1}), refs({"a": 9}, "test")):
        with pytest.raises(PlanError, match="leaves no image for validation"):
            plan(tmp_path, items, 0.2)
    for fraction in (0.0, 1.0, -1.0, 2.0, float("nan")):
        with pytest.raises(PlanError, match="--val-fraction"):
            PlanOptions(val_fraction=fraction)


def test_the_records_are_those_of_a_folder_with_the_files_moved(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "photos", ["cat", "dog"], 12, [])
    run(root, tmp_path / "held", val_fraction=0.25, seed=3)
    manifest = json.loads((tmp_path / "held" / "manifest.json").read_bytes())
    assert manifest["options"]["val_fraction"] == 0.25
    assert set(manifest["splits"]) == {"train", "val"}
    made = make_plan(_found(root), tmp_path / "plan", PlanOptions(val_fraction=0.25, seed=3), quiet)
    for split, names in members(made).items():
        for name in names:
            place = tmp_path / "moved" / split / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, place)
    run(tmp_path / "moved", tmp_path / "out", seed=3)
    moved = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert "val_fraction" not in moved["options"]
    assert moved["splits"] == manifest["splits"]
    one, two = digests(tmp_path / "held"), digests(tmp_path / "out")
    assert {name for name in one if one[name] != two[name]} == {"manifest.json"}


def _found(root: Path) -> list[ImageRef]:
    from imnet_prep.sources import detect

    return [item for item in detect([root])[0].refs() if isinstance(item, ImageRef)]
