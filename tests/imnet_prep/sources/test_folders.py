"""Folders of every layout give the right images, splits and labels, in an order that names alone decide."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from imnet_prep.errors import SourceError
from imnet_prep.sources import Found, detect, merge, read
from imnet_prep.types import SPLITS, ImageRef, RawImage, Reason, Rejected
from tests.imnet_prep.obstacles import make_fifo
from tests.synthetic import devkit_bytes, jpeg, make_image_folder, make_imagenet, make_tiny_imagenet, meta_mat


def refs_of(*paths: Path, split: str | None = None) -> list[ImageRef]:
    """All references; there must be no rejection."""
    found = list(merge(detect(paths, split)))
    assert not [item for item in found if isinstance(item, Rejected)]
    return [item for item in found if isinstance(item, ImageRef)]


def names(refs: list[ImageRef]) -> list[tuple[str, str]]:
    return [(ref.split, ref.file_name) for ref in refs]


def in_order(found: list[Found]) -> bool:
    keys = [(SPLITS.index(f.split), f.class_name, f.file_name) for f in found if isinstance(f, ImageRef)]
    return keys == sorted(keys)


# --- class folders ---------------------------------------------------------------------------------------------------


def test_train_and_val_folders_are_splits(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "mine", ["cat", "dog"], per_class={"train": 3, "val": 2})
    refs = refs_of(root)
    assert Counter((ref.split, ref.class_name) for ref in refs) == {
        ("train", "cat"): 3, ("train", "dog"): 3, ("val", "cat"): 2, ("val", "dog"): 2,
    }  # fmt: skip
    assert in_order(list(refs))
    for ref in refs:
        raw = read(ref)
        assert isinstance(raw, RawImage)
        assert raw.data == (root / ref.split / ref.file_name).read_bytes()


@pytest.mark.parametrize("name", ["valid", "validation", "Val"])
def test_other_names_of_val_are_known(tmp_path: Path, name: str) -> None:
    make_image_folder(tmp_path, ["cat", "dog"], 2, ["train", "val"])
    (tmp_path / "val").rename(tmp_path / "v")
    (tmp_path / "v").rename(tmp_path / name)
    assert Counter(ref.split for ref in refs_of(tmp_path)) == {"train": 4, "val": 4}


def test_a_folder_without_splits_is_train_unless_told(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 2, [])
    assert {ref.split for ref in refs_of(root)} == {"train"}
    assert {ref.split for ref in refs_of(root, split="val")} == {"val"}


def test_the_name_of_the_folder_tells_its_split(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 2)
    assert names(refs_of(root / "val", root / "train")) == names(refs_of(root))


def test_one_split_can_be_picked(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 2)
    assert {ref.split for ref in refs_of(root, split="val")} == {"val"}


@pytest.mark.parametrize("class_name", ["train", "val", "test"])
def test_a_class_may_be_called_like_a_split(tmp_path: Path, class_name: str) -> None:
    root = make_image_folder(tmp_path / "vehicles", ["bus", "car", class_name], 2, [])
    assert {ref.class_name for ref in refs_of(root)} == {"bus", "car", class_name}


def test_class_names_may_be_anything_printable(tmp_path: Path) -> None:
    classes = ["a b", "猫", "#1 & 'co'", "ünï", "C++", "100%"]
    refs = refs_of(make_image_folder(tmp_path / "x", classes, 1, []))
    assert [ref.class_name for ref in refs] == sorted(classes)


def test_every_common_suffix_counts_in_any_case_and_other_files_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "cat"
    folder.mkdir(parents=True)
    for name in ("a.jpg", "b.JPG", "c.Jpeg", "d.PNG", "e.webp", "f.bmp", "g.tif", "h.TIFF", "i.gif", "j.jfif"):
        (folder / name).write_bytes(jpeg())
    for name in ("notes.txt", "b.XML", "Thumbs.db", ".hidden.jpg", "README"):
        (folder / name).write_bytes(b"x")
    (source,) = detect([tmp_path / "x"])
    assert len(list(source.refs())) == 10
    assert source.notes == ("x: 5 other files ignored (no suffix 1, .db 1, .jpg 1, .txt 1, .xml 1)",)


def test_folders_inside_a_class_belong_to_it(tmp_path: Path) -> None:
    (tmp_path / "x" / "cat" / "indoors" / "b").mkdir(parents=True)
    (tmp_path / "x" / "cat" / "indoors" / "b" / "1.jpg").write_bytes(jpeg())
    (tmp_path / "x" / "cat" / "1.jpg").write_bytes(jpeg())
    assert [ref.file_name for ref in refs_of(tmp_path / "x")] == ["cat/1.jpg", "cat/indoors/b/1.jpg"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 2, [])
    (root / "cat" / "linked.jpg").symlink_to(root / "dog" / "dog_all_0.jpg")
    (root / "cat" / "up").symlink_to(root)
    (root / "loop").symlink_to(root)
    (root / "cat" / "self.jpg").symlink_to("self.jpg")
    (root / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    found = list(detect([root])[0].refs())
    good = {item.file_name for item in found if isinstance(item, ImageRef)}
    assert good == {
        "cat/cat_all_0.jpg",
        "cat/cat_all_1.jpg",
        "cat/linked.jpg",
        "dog/dog_all_0.jpg",
        "dog/dog_all_1.jpg",
    }
    bad = {item.file_name: item.reason for item in found if isinstance(item, Rejected)}
    assert bad == {"cat/self.jpg": Reason.UNREADABLE, "cat/gone.jpg": Reason.UNREADABLE}


def test_what_is_not_a_file_is_rejected_and_does_not_hang(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat"], 1, [])
    make_fifo(root / "cat" / "pipe.jpg")
    (bad,) = (item for item in detect([root])[0].refs() if isinstance(item, Rejected))
    assert (bad.file_name, bad.reason) == ("cat/pipe.jpg", Reason.UNREADABLE)


def test_names_that_are_not_text_are_rejected_by_an_escaped_name(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat"], 2, [])
    for name in (b"caf\xe9.jpg", b"two\nlines.jpg"):
        (root / "cat" / os.fsdecode(name)).write_bytes(jpeg())
    found = list(detect([root])[0].refs())
    assert [item.file_name for item in found if isinstance(item, Rejected)] == [
        "cat/caf\\xe9.jpg",
        "cat/two\\nlines.jpg",
    ]
    assert len(found) == 4


def test_the_order_depends_on_names_alone(tmp_path: Path) -> None:
    one = make_image_folder(tmp_path / "one", ["cat", "a b", "a"], 3)
    two = tmp_path / "elsewhere" / "two"
    for path in sorted(one.rglob("*.jpg"), reverse=True):  # written in the other order
        target = two / path.relative_to(one)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    assert names(refs_of(one)) == names(refs_of(two))
    assert detect([one])[0].info() == detect([two])[0].info()


def test_the_same_name_in_two_sources_is_a_duplicate(tmp_path: Path) -> None:
    one = make_image_folder(tmp_path / "one", ["cat", "dog"], 2, [])
    two = make_image_folder(tmp_path / "two", ["cat", "eel"], 3, [])
    found = list(merge(detect([one, two])))
    bad = [item for item in found if isinstance(item, Rejected)]
    assert [(item.file_name, item.reason) for item in bad] == [
        ("cat/cat_all_0.jpg", Reason.DUPLICATE_NAME),
        ("cat/cat_all_1.jpg", Reason.DUPLICATE_NAME),
    ]
    assert len(found) == 10
    assert in_order(found)
    assert all(str(one) in str(item.path) for item in found[:2] if isinstance(item, ImageRef))


def test_the_entry_of_a_folder_counts_its_images_and_names_empty_classes(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], {"train": 3, "val": 1})
    (root / "train" / "empty class").mkdir()
    (source,) = detect([root])
    info = source.info()
    assert (info["kind"], info["name"], info["images"]) == ("imagefolder", "", 8)
    assert info["size_bytes"] == sum(path.stat().st_size for path in root.rglob("*.jpg"))
    assert "empty class" in source.notes[0]


def test_a_file_that_changed_since_it_was_listed_is_unreadable(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat"], 3, [])
    refs = refs_of(root)
    gone, shorter, longer = (Path(ref.path) for ref in refs)
    gone.unlink()
    shorter.write_bytes(b"short")
    longer.write_bytes(longer.read_bytes() + b"longer")
    assert [result.reason for ref in refs if isinstance(result := read(ref), Rejected)] == [Reason.UNREADABLE] * 3


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny", classes=3, per_class=4, val_per_class=2, test=5)
    (source,) = detect([root])
    refs = refs_of(root)
    assert source.kind == "tiny-imagenet"
    assert Counter(ref.split for ref in refs) == {"train": 12, "val": 6, "test": 5}
    labels = dict(line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").read_text().splitlines())
    for ref in refs:
        base = ref.file_name.rpartition("/")[2]
        if ref.split == "val":
            assert ref.class_name == labels[base]
        assert ref.file_name == (f"{ref.class_name}/{base}" if ref.class_name else base)
        assert (ref.class_name == "") == (ref.split == "test")


def test_tiny_imagenets_val_by_itself_is_labelled_too(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny")
    assert names(refs_of(root / "val")) == [pair for pair in names(refs_of(root)) if pair[0] == "val"]


def test_a_tiny_val_image_without_a_line_is_unlabelled_and_a_missing_one_is_named(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny")
    images = root / "val" / "images"
    (images / "val_3.JPEG").rename(images / "stranger.JPEG")
    (source,) = detect([root])
    bad = [item for item in source.refs() if isinstance(item, Rejected)]
    assert [(item.file_name, item.reason) for item in bad] == [("stranger.JPEG", Reason.UNLABELLED)]
    assert any("val_3.JPEG" in note for note in source.notes)


def _kaggle(root: Path) -> dict[int, str]:
    tree = root / "ILSVRC" / "Data" / "CLS-LOC"
    made = make_imagenet(root / "tars", classes=3, odd=False)
    make_image_folder(tree, list(made.wnids), 2, ["train"])
    (tree / "val").mkdir()
    (tree / "test").mkdir()
    for number in made.val_labels:
        (tree / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(jpeg(number))
    (tree / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(jpeg())
    shuffled = sorted(made.val_labels.items(), key=lambda pair: pair[0] * 7 % 11)
    rows = [f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for number, wnid in shuffled]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} thing\n" for wnid in made.wnids))
    shutil.rmtree(root / "tars")
    return dict(made.val_labels)


def test_kaggles_layout_from_its_top_and_from_its_tree(tmp_path: Path) -> None:
    labels = _kaggle(tmp_path / "kaggle")
    refs = refs_of(tmp_path / "kaggle")
    assert Counter(ref.split for ref in refs) == {"train": 6, "val": 9, "test": 1}
    for ref in refs:
        if ref.split == "val":
            assert ref.class_name == labels[int(ref.file_name[-13:-5])]
    assert names(refs_of(tmp_path / "kaggle" / "ILSVRC")) == names(refs)
    assert names(refs_of(tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC")) == names(refs)


def test_kaggle_without_its_solution_asks_for_labels(tmp_path: Path) -> None:
    _kaggle(tmp_path / "kaggle")
    (tmp_path / "kaggle" / "LOC_val_solution.csv").unlink()
    with pytest.raises(SourceError, match="need their labels"):
        detect([tmp_path / "kaggle"])


def test_the_extracted_tree_with_a_flat_val_and_a_devkit(tmp_path: Path) -> None:
    ids = {"n01443537": 1, "n01440764": 2}
    make_image_folder(tmp_path / "tree", sorted(ids), 2, ["train"])
    val = tmp_path / "tree" / "val"
    val.mkdir()
    for number in (1, 2, 4):
        (val / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(jpeg(number))
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(devkit_bytes(ids, [2, 1, 1, 2]))
    sources = detect([tmp_path / "tree", devkit])
    refs = [item for item in merge(sources) if isinstance(item, ImageRef) and item.split == "val"]
    wanted = {1: "n01440764", 2: "n01443537", 4: "n01440764"}
    assert {int(ref.file_name[-13:-5]): ref.class_name for ref in refs} == wanted
    assert any("ILSVRC2012_val_00000003" in note for source in sources for note in source.notes)

    inside = tmp_path / "tree" / "ILSVRC2012_devkit_t12" / "data"  # the same, unpacked, inside the tree
    inside.mkdir(parents=True)
    (inside / "meta.mat").write_bytes(meta_mat(ids))
    (inside / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n1\n2\n")
    assert names(refs_of(tmp_path / "tree")) == names(refs_of(tmp_path / "tree", devkit))
    assert [ref.class_name for ref in refs_of(val, devkit)] == [ref.class_name for ref in refs]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_bad_folders_are_one_line_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "cat.jpg").write_bytes(jpeg())
    (tmp_path / "words" / "a").mkdir(parents=True)
    (tmp_path / "words" / "a" / "x.txt").write_text("x")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg())
    make_image_folder(tmp_path / "only train", ["cat"], 1, ["train"])
    cases = [
        ("missing", None, "does not exist"),
        ("empty", None, "is empty"),
        ("flat", None, "no class folders"),
        ("words", None, "no class folders with images"),
        ("val", None, "need their labels"),
        ("flat/cat.jpg", None, "is one image"),
        ("only train", "val", "no val split"),
        ("only train", "nonsense", "no split is called"),
    ]
    for name, split, words in cases:
        with pytest.raises(SourceError, match=words) as caught:
            detect([tmp_path / name], split)
        assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="no source"):
        detect([])
