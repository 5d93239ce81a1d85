"""Order, membership, labels and subsets are fixed by the seed and the names, before any work."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from imnet_prep import catalog
from imnet_prep.build import plan as planning
from imnet_prep.build.options import PlanOptions, read_names
from imnet_prep.build.plan import Plan, load_plan, make_plan, shard_refs
from imnet_prep.build.shard_task import tasks_of
from imnet_prep.errors import PlanError, SourceError
from imnet_prep.images.check import ValidateOptions
from imnet_prep.types import ImageRef, Reason, Rejected
from tests.records import quiet


def refs(classes: int = 4, per_class: int = 25, split: str = "train", folder: str = "/nowhere") -> list[ImageRef]:
    return [
        ImageRef(split, f"c{c}", f"c{c}/{k}.jpg", str(Path(folder) / f"c{c}" / f"{k}.jpg"), 0, 1000 + k)
        for c in range(classes)
        for k in range(per_class)
    ]


def plan(tmp_path: Path, items: Sequence[ImageRef | Rejected], **options: object) -> Plan:
    return make_plan(items, tmp_path / "plan", PlanOptions(**options), quiet)  # type: ignore[arg-type]


def order(made: Plan, split: str = "train") -> list[list[str]]:
    part = made.splits[split]
    return [
        [ref.file_name for ref in shard_refs(made.database, part.first + first, part.first + last)]
        for first, last in zip(part.bounds, part.bounds[1:], strict=False)
    ]


def test_shards_hold_every_image_once_and_differ_by_one_at_most(tmp_path: Path) -> None:
    made = order(plan(tmp_path, refs(), shards=7))
    sizes = Counter(len(shard) for shard in made)
    assert max(sizes) - min(sizes) <= 1
    assert sorted(name for shard in made for name in shard) == sorted(ref.file_name for ref in refs())


def test_order_depends_on_seed_and_names_alone(tmp_path: Path) -> None:
    first = plan(tmp_path, refs(), shards=3)
    kept = order(first)
    moved = plan(tmp_path, list(reversed(refs(folder="/elsewhere"))), shards=3)
    assert order(moved) == kept
    assert moved.digest == first.digest
    other = plan(tmp_path, refs(), shards=3, seed=1)
    assert order(other) != kept
    assert other.digest != first.digest


def test_order_is_shuffled_over_classes(tmp_path: Path) -> None:
    shard = order(plan(tmp_path, refs(), shards=4))[0]
    assert {name.split("/")[0] for name in shard} == {"c0", "c1", "c2", "c3"}


@pytest.mark.parametrize(
    "change",
    [
        {"max_per_class": 5}, {"shards": 2}, {"store": ValidateOptions(short_side=64)},
        {"store": ValidateOptions(max_pixels=10_000)},
    ],
)  # fmt: skip
def test_what_shapes_the_bytes_shapes_the_digest(tmp_path: Path, change: dict[str, object]) -> None:
    assert plan(tmp_path, refs(), **change).digest != plan(tmp_path, refs()).digest


def test_sizes_urls_and_meta_are_part_of_the_digest(tmp_path: Path) -> None:
    found = {plan(tmp_path, refs()).digest}
    for change in ({"size_bytes": 7}, {"url": "http://a/b"}, {"status": 200}, {"meta": '{"a":1}'}):
        changed: list[ImageRef] = [replace(refs()[0], **change), *refs()[1:]]
        found.add(plan(tmp_path, changed).digest)
    assert len(found) == 5


def test_a_plan_holds_the_whole_reference(tmp_path: Path) -> None:
    whole = replace(
        refs()[0], url="http://a/b", status=200, line="{}", deflated_bytes=9, crc32=(1 << 32) - 1, meta='{"a":1}'
    )
    made = plan(tmp_path, [whole])
    assert list(shard_refs(made.database, 1, 2)) == [whole]


def test_a_plan_of_an_earlier_version_is_not_loaded(tmp_path: Path) -> None:
    made = plan(tmp_path, refs())
    with closing(sqlite3.connect(made.database)) as connection:
        connection.execute("ALTER TABLE image DROP COLUMN meta")
        connection.commit()
    assert load_plan(made.database, made.options) is None


def test_more_shards_than_images_give_one_image_a_shard(tmp_path: Path) -> None:
    made = plan(tmp_path, refs(1, 3), shards=10)
    assert [len(shard) for shard in order(made)] == [1, 1, 1]
    tasks = tasks_of(made, tmp_path, {"train": made.splits["train"].layout})
    assert [task.name for task in tasks] == [f"train/train-0000{shard}-of-00003.mindrecord" for shard in range(3)]


def test_loaded_plan_equals_the_one_made(tmp_path: Path) -> None:
    items: list[ImageRef | Rejected] = [*refs(), *refs(split="val"), Rejected("val", "x.jpg", Reason.UNLABELLED, "why")]
    made = plan(tmp_path, items, shards=3)
    assert load_plan(made.database, made.options) == made


def test_a_plan_that_is_not_whole_is_not_loaded(tmp_path: Path) -> None:
    made = plan(tmp_path, refs())
    made.database.write_bytes(made.database.read_bytes()[:9000])
    assert load_plan(made.database, made.options) is None
    assert load_plan(tmp_path / "none", made.options) is None


def test_subset_by_class_and_by_number(tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("c2\n\nc0\tcomment\n")
    made = plan(tmp_path, refs(), keep_classes=keep, max_per_class=3)
    assert made.classes == ("c0", "c2")
    assert Counter(name.split("/")[0] for shard in order(made) for name in shard) == {"c0": 3, "c2": 3}


def test_subset_by_number_is_the_head_of_the_order(tmp_path: Path) -> None:
    whole = [name for shard in order(plan(tmp_path, refs())) for name in shard if name.startswith("c1/")]
    some = [
        name for shard in order(plan(tmp_path, refs(), max_per_class=4)) for name in shard if name.startswith("c1/")
    ]
    assert some == whole[:4]


def test_unlabelled_images_are_no_class_to_be_limited(tmp_path: Path) -> None:
    test = [ImageRef("test", "", f"{k}.jpg", f"/x/{k}.jpg", 0, 10) for k in range(9)]
    made = plan(tmp_path, [*refs(), *test], max_per_class=2)
    assert made.splits["test"].images == 9


def test_class_names_that_are_not_there_are_listed(tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("c1\nzebra\nyak\n")
    with pytest.raises(PlanError, match=r"2 of 3 names.*yak, zebra"):
        plan(tmp_path, refs(), keep_classes=keep)


def test_rejections_of_classes_left_out_do_not_count(tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("c1\n")
    bad = [Rejected("train", f"{name}/x", Reason.UNREADABLE) for name in ("c0", "c1")]
    assert plan(tmp_path, [*refs(), *bad], keep_classes=keep).rejected == (bad[1],)


def test_label_spaces(tmp_path: Path) -> None:
    wnids = sorted(catalog.labels())
    items = [ImageRef("train", wnid, f"{wnid}/a.jpg", f"/x/{wnid}", 0, 10) for wnid in (wnids[7], wnids[3])]
    assert plan(tmp_path, items).classes == (wnids[3], wnids[7])
    assert plan(tmp_path, items, label_space="imagenet1k").classes == tuple(wnids)
    listed = tmp_path / "classes"
    listed.write_text(f"{wnids[7]}\nextra\n{wnids[3]}\n")
    made = plan(tmp_path, items, label_space=str(listed))
    assert made.classes == (wnids[7], "extra", wnids[3])
    assert made.label_space == "file"


def test_label_space_without_a_class_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="c0, c1"):
        plan(tmp_path, refs(), label_space="imagenet1k")
    with pytest.raises(PlanError, match="found, imagenet1k"):
        plan(tmp_path, refs(), label_space="imagenet2k")


def test_lists_of_names_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "names"
    for text in ("a\nb\na\n", "", "\n\n"):
        path.write_text(text)
        with pytest.raises(PlanError, match="each name once"):
            read_names(path)
    with pytest.raises(PlanError, match="cannot be read"):
        read_names(tmp_path / "none")
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_names(path) == ("a", "b")


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"shards": 0}, {"shards": 1001}, {"max_per_class": 0}, {"duplicates": "drop"}],
)
def test_options_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong)).replace("_", "-")):
        PlanOptions(**wrong)  # type: ignore[arg-type]


def test_nothing_found_is_an_error_and_leaves_no_second_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no images"):
        plan(tmp_path, [])
    plan(tmp_path, refs())
    assert {path.name for path in tmp_path.iterdir()} == {"plan"}


def test_duplicates_are_rejected_whatever_their_order(tmp_path: Path) -> None:
    for name, data in (("a", b"1"), ("b", b"2"), ("c", b"1"), ("d", b"1"), ("e", b"3")):
        (tmp_path / name).write_bytes(data)
    items = [
        ImageRef(split, "k", f"k/{name}", str(tmp_path / name), 0, 1)
        for split, name in (("train", "a"), ("train", "b"), ("train", "c"), ("val", "d"), ("train", "e"))
    ]
    for given in (items, items[::-1]):
        made = plan(tmp_path, given, duplicates="reject")
        assert [(item.split, item.file_name) for item in made.rejected] == [("train", "k/a"), ("train", "k/c")]
        assert all("val/k/d" in item.detail for item in made.rejected)


def test_names_and_folders_of_any_letters_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "ü 空 %20 #? '"
    folder.mkdir()
    items = [ImageRef("train", "é", "é/ü 空 %#?'.jpg", "/a/b\udcff/x.jpg", 5, 10)]
    made = make_plan(items, folder / "plan", PlanOptions(), quiet)
    assert list(shard_refs(made.database, 1, 2)) == items


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(planning, "BATCH_ROWS", 1000)

    def many(count: int) -> Iterator[ImageRef]:
        for k in range(count):
            yield ImageRef("train", f"c{k % 10}", f"c{k % 10}/{k}.jpg", "/x.tar", 512 + k, 10)

    def peak(count: int) -> int:
        tracemalloc.start()
        make_plan(many(count), tmp_path / "plan", PlanOptions(), quiet)
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(1000)  # what the first call alone needs
    assert peak(12_000) - peak(4000) < 8000 * 30  # bytes: a reference alone takes hundreds


def test_options_are_recorded_without_paths(tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("b\na\n")
    content = PlanOptions(keep_classes=keep, store=ValidateOptions(short_side=256)).content()
    assert content["keep_classes"] == ["a", "b"]
    assert str(tmp_path) not in json.dumps(content)
