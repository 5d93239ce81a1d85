"""Found means found: each image below a folder is converted or rejected by name, or the layout is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.cli.prep import main
from imnet_prep.errors import SourceError
from imnet_prep.sources import detect, merge
from imnet_prep.types import ImageRef, Progress, Reason, Rejected
from tests.imnet_prep.obstacles import make_fifo, make_socket, no_hang, shared_folder, unprivileged
from tests.synthetic import jpeg, make_image_folder, make_imagenet, make_tiny_imagenet, tar_bytes


def image(path: Path) -> Path:
    """Write a picture, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(len(path.name), sum(os.fsencode(path))))
    return path


def found(*paths: Path, split: str | None = None) -> tuple[list[str], dict[str, Reason]]:
    """The names of the images that are found, and the reason of each that is rejected, with their splits."""
    items = list(merge(detect(paths, split)))
    good = [f"{item.split}:{item.file_name}" for item in items if isinstance(item, ImageRef)]
    return good, {f"{item.split}:{item.file_name}": item.reason for item in items if isinstance(item, Rejected)}


def notes(path: Path) -> str:
    (source,) = detect([path])
    list(source.refs())
    return " / ".join(source.notes)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["to-mindrecord", *map(str, arguments), "--workers", "1"])


# --- which folders are splits, which are classes ---------------------------------------------------------------------


def test_a_class_called_train_whose_images_are_deeper_is_not_taken_as_the_split(tmp_path: Path) -> None:
    for name in ("cat", "dog", "train"):
        for k in range(3):
            image(tmp_path / "m1" / name / "2019" / f"{k}.jpg")
    result = command(tmp_path / "m1", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert all(part in result.stderr for part in ("splits (train)", "got cat, dog", f"{tmp_path}/m1/train"))
    assert result.stderr.count("\n") == 1
    (tmp_path / "m1" / "train").rename(tmp_path / "m1" / "trains")
    assert len(found(tmp_path / "m1")[0]) == 9
    assert "classes are cat, dog, trains; their images are in folders inside these" in notes(tmp_path / "m1")


def test_a_folder_of_images_beside_the_splits_is_refused_and_the_splits_can_be_given_alone(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "m2", ["cat", "dog"], 2)
    image(root / "bonus" / "x.jpg")
    result = command(root, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert all(part in result.stderr for part in ("train, val", "got bonus", f"give the splits alone ({root}/train"))
    assert len(found(root / "train", root / "val")[0]) == 8
    with pytest.raises(SourceError, match="got bonus"):
        detect([root], "val")


@pytest.mark.parametrize("name", ["train/loose.jpg", "loose.jpg", "val/loose.png"])
def test_images_beside_class_or_split_folders_are_rejected_by_name(tmp_path: Path, name: str) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 2)
    image(root / name)
    good, bad = found(root)
    split, base = ("val" if name.startswith("val") else "train"), os.path.basename(name)
    assert (len(good), bad) == (8, {f"{split}:{base}": Reason.UNLABELLED})
    result = command(root, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert f"unlabelled 1); the first: {base}" in result.stderr
    assert command(root, "--out", tmp_path / "out", "--max-rejected", "1").exit_code == 0
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["file_name"] == base


def test_a_split_of_loose_images_is_refused(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 2, ["val"])
    image(root / "train" / "1.jpg")
    with pytest.raises(SourceError, match=r"train holds images and no class folders.*got train/1.jpg"):
        detect([root])
    shutil.rmtree(root / "val")
    with pytest.raises(SourceError, match="train holds images and no class folders"):
        detect([root])


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat"], 1, ["val", "validation"])
    with pytest.raises(SourceError, match="two folders for val: val and validation"):
        detect([root])


def test_splits_below_classes_are_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            image(tmp_path / "x" / name / split / "1.jpg")
    with pytest.raises(SourceError, match="splits above classes"):
        found(tmp_path / "x")


def test_a_folder_around_everything_is_no_class(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "x" / "photos", ["cat", "dog"], 2)
    (tmp_path / "x" / "photos.zip").write_bytes(b"PK")
    assert found(tmp_path / "x") == found(tmp_path / "x" / "photos")
    assert "everything is in photos" in notes(tmp_path / "x")
    assert "photos.zip" in notes(tmp_path / "x")
    make_image_folder(tmp_path / "y" / "deep" / "photos", ["cat", "dog"], 2, [])
    assert found(tmp_path / "y")[0] == found(tmp_path / "y" / "deep" / "photos")[0]
    image(tmp_path / "y" / "loose.jpg")
    with pytest.raises(SourceError, match=r"beside the only folder of folders, deep.*give .*/y/deep"):
        detect([tmp_path / "y"])
    image(tmp_path / "y" / "extra" / "1.jpg")
    (tmp_path / "y" / "deep" / "photos").rename(tmp_path / "y" / "photos")
    with pytest.raises(SourceError, match="photos can be a class, or hold 2 classes"):
        found(tmp_path / "y")


def test_the_working_folder_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 2)
    image(root / "loose.jpg")
    (root / "x.zip").write_bytes(b"PK")
    monkeypatch.chdir(root)
    assert found(Path()) == found(root)
    assert notes(Path()) == notes(root)
    monkeypatch.chdir(root / "train")
    assert found(Path("..")) == found(root)
    image(root / "bonus" / "1.jpg")
    with pytest.raises(SourceError, match="got bonus"):
        detect([Path("..")])
    (root / "bonus").rename(root / "val" / "cat" / "bonus")
    make_image_folder(tmp_path / "outer" / "photos", ["cat", "dog"], 1)
    monkeypatch.chdir(tmp_path / "outer")
    assert notes(Path()).startswith("outer: everything is in photos")


def test_a_split_given_alone_may_have_one_deep_class(tmp_path: Path) -> None:
    image(tmp_path / "train" / "cat" / "2019" / "1.jpg")
    image(tmp_path / "train" / "cat" / "2020" / "1.jpg")
    assert found(tmp_path / "train")[0] == ["train:cat/2019/1.jpg", "train:cat/2020/1.jpg"]


def test_a_class_that_was_not_unpacked_is_an_error(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", 2, 2, [])
    (root / "n01484850.tar").write_bytes(tar_bytes({"a.jpg": jpeg()}))
    with pytest.raises(SourceError, match=r"tars of other classes.*got n01484850.tar"):
        found(root)
    (root / "n01484850.tar").rename(root / "n01440764.tar")  # and is unpacked beside it
    assert len(found(root)[0]) == 4
    assert "not read (n01440764.tar)" in notes(root)


def test_images_whose_names_do_not_say_so_are_rejected_by_name(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 2)
    for name in ("IMG_0001", "kitten.jpg~", "photo.jpg?size=large"):
        image(root / "train" / "cat" / name)
    image(root / "train" / "IMG_0002")
    image(root / "IMG_0003")
    (root / "train" / "cat" / "README").write_bytes(b"BMs are images")
    (root / "train" / "cat" / "notes.txt").write_bytes(jpeg())  # a text by its name
    good, bad = found(root)
    assert len(good) == 8
    assert bad == {
        **{f"train:cat/{name}": Reason.UNREADABLE for name in ("IMG_0001", "kitten.jpg~", "photo.jpg?size=large")},
        "train:IMG_0002": Reason.UNLABELLED, "train:IMG_0003": Reason.UNLABELLED,
    }  # fmt: skip


# --- strays in layouts of others -------------------------------------------------------------------------------------


def test_strays_in_tiny_imagenet(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny")
    strays = ["top.jpg", "val/beside.jpg", "train/no class.jpg", "val/images/deep/val_1.JPEG"]
    for name in strays:
        image(root / name)
    image(root / "train" / "n01440764" / "beside images.jpg")
    good, bad = found(root)
    assert "train:n01440764/beside images.jpg" in good
    assert sorted(bad) == ["train:no class.jpg", "train:top.jpg", "train:val/beside.jpg", "val:deep/val_1.JPEG"]
    image(root / "val" / "extra" / "1.jpg")
    with pytest.raises(SourceError, match="val/extra holds images that are outside of train, val/images"):
        found(root)


def test_tiny_imagenet_with_class_folders_in_val(tmp_path: Path) -> None:
    root = make_tiny_imagenet(tmp_path / "tiny", val_per_class=2)
    wanted = len(found(root)[0])
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        (root / "val" / wnid).mkdir(exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / wnid / name)
    good, bad = found(root)
    assert (len(good), bad) == (wanted, {})


def test_strays_in_a_flat_validation_folder(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "tars", classes=2, odd=False)
    for number in made.val_labels:
        image(tmp_path / "x" / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    image(tmp_path / "x" / "val" / "preview.png")
    good, bad = found(tmp_path / "x", made.devkit)
    assert (len(good), bad) == (len(made.val_labels), {"val:preview.png": Reason.UNLABELLED})
    image(tmp_path / "x" / "bonus" / "1.jpg")
    with pytest.raises(SourceError, match="got bonus"):
        found(tmp_path / "x", made.devkit)


def test_strays_beside_official_archives(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "x", odd=False)
    assert len(detect([made.folder])) == 4
    image(made.folder / "more" / "cat" / "1.jpg")
    with pytest.raises(SourceError, match=r"official archives and other images.*got more"):
        detect([made.folder])
    shutil.rmtree(made.folder / "more")
    (made.folder / "photos.zip").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"got photos.zip"):
        detect([made.folder])
    (made.folder / "photos.zip").unlink()
    made.train.rename(
        made.folder / "ILSVRC2012_img_train_t3.tar"
    )  # is a part of the other, and so is left out beside it
    assert len(detect([made.folder])) == 4


def test_strays_beside_class_tars(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for wnid in ("n01440764", "n01443537"):
        (folder / f"{wnid}.tar").write_bytes(tar_bytes({f"{wnid}_1.JPEG": jpeg()}))
    image(folder / "preview.png")
    good, bad = found(folder)
    assert (len(good), bad) == (2, {"train:preview.png": Reason.UNLABELLED})
    (folder / "cats.tar").write_bytes(tar_bytes({"1.jpg": jpeg()}))
    with pytest.raises(SourceError, match=r"cats.tar is no tar of a class"):
        found(folder)
    (folder / "cats.tar").unlink()
    image(folder / "bonus" / "1.jpg")
    with pytest.raises(SourceError, match="tars of other classes"):
        found(folder)


# --- links -----------------------------------------------------------------------------------------------------------


def test_class_folders_linked_to_one_another_give_each_image_once(tmp_path: Path) -> None:
    classes = [f"c{k:02d}" for k in range(12)]
    root = make_image_folder(tmp_path / "x", classes, 2, [])
    for name in classes:
        for other in classes:
            (root / name / f"to {other}").symlink_to(root / other)
    with no_hang(30):
        good, bad = found(root)
    assert (Counter(name.split("/")[0] for name in good), bad) == (
        Counter({f"train:{name}": 2 for name in classes}),
        {},
    )
    assert "links to folders that are read elsewhere 144" in notes(root)


def test_folders_outside_are_followed_once_and_belong_to_one_class(tmp_path: Path) -> None:
    store, root = tmp_path / "store", make_image_folder(tmp_path / "x", ["cat"], 1, [])
    for k in range(8):
        image(store / f"{k}" / "picture.jpg")
        for other in range(8):
            (store / f"{k}" / f"to {other}").symlink_to(store / f"{other}")
    image(store / "own.jpg")
    (root / "dog").symlink_to(store)
    (root / "cat" / "again").symlink_to(root)
    with no_hang(30):
        good, _ = found(root)
    assert good == ["train:cat/cat_all_0.jpg", *(f"train:dog/{k}/picture.jpg" for k in range(8)), "train:dog/own.jpg"]
    (root / "cat" / "more").symlink_to(store / "3")
    with no_hang(30), pytest.raises(SourceError, match="leads to images of another class"):
        found(root)


@pytest.mark.parametrize("target", ["x/dog", "x/dog/puppies", "store"])
def test_two_classes_of_the_same_images_are_an_error(tmp_path: Path, target: str) -> None:
    root = make_image_folder(tmp_path / "x", ["dog"], 1, [])
    image(root / "dog" / "puppies" / "1.jpg")
    image(tmp_path / "store" / "1.jpg")
    (root / "wolf").symlink_to(tmp_path / "store")
    (root / "bird").symlink_to(tmp_path / target)
    with pytest.raises(SourceError, match=r"leads to images of another class.*remove the link"):
        found(root)


def test_two_splits_of_the_same_images_are_an_error(tmp_path: Path) -> None:
    image(tmp_path / "store" / "1.jpg")
    root = make_image_folder(tmp_path / "x", ["dog"], 1)
    for split in ("train", "val"):
        (root / split / "cat").symlink_to(tmp_path / "store")
    with pytest.raises(SourceError, match=r"val/cat leads to images of another class \(train/cat\)"):
        found(root)
    assert found(root, split="train")[0] == ["train:cat/1.jpg", "train:dog/dog_train_0.jpg"]


def test_classes_may_be_links_into_a_hidden_store(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / "x" / ".store" / name / "sub" / "1.jpg")
        (tmp_path / "x" / name).symlink_to(f".store/{name}")
    assert found(tmp_path / "x") == (["train:cat/sub/1.jpg", "train:dog/sub/1.jpg"], {})


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 1)
    (root / "train" / "cat" / "gone.jpg").symlink_to("/nowhere/1.jpg")
    (root / "train" / "cat" / "notes").symlink_to("/nowhere/notes")
    good, bad = found(root)
    assert (len(good), bad) == (4, {"train:cat/gone.jpg": Reason.UNREADABLE})
    assert "links that lead nowhere 1" in notes(root)
    for place in ("train/bird", "test"):  # a class or split that is not mounted would change all labels
        (root / place).symlink_to("/nowhere/folder")
        with pytest.raises(SourceError, match=f"{place} is a link that leads nowhere"):
            found(root)
        (root / place).unlink()


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["train/cat", "train/cat/indoors", "train", "bonus"])
def test_a_folder_that_may_not_be_read_is_an_error_that_names_it(place: str) -> None:
    with shared_folder() as folder:
        root = make_image_folder(folder / "x", ["cat", "dog"], 2)
        image(root / "train" / "cat" / "indoors" / "1.jpg")
        (root / place).mkdir(exist_ok=True)
        (root / place).chmod(0)
        try:
            with unprivileged(), pytest.raises(SourceError, match=f"{place} cannot be read; got Permission denied"):
                found(root)
        finally:
            (root / place).chmod(0o755)


def test_a_disk_error_in_a_class_folder_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scan = make_image_folder(tmp_path / "x", ["cat", "dog"], 2, []), os.scandir

    def failing(path: Any = ".") -> Any:
        if not isinstance(path, int) and os.path.basename(path) == "dog":
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)
    result = command(root, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{root}/dog cannot be read; got {os.strerror(errno.EIO)}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    root = make_image_folder(tmp_path / "x", ["cat"], 1, [])
    here = os.getcwd()
    try:
        os.chdir(root / "cat")
        for _ in range(25):
            os.mkdir("a" * 200)
            os.chdir("a" * 200)
        Path("1.jpg").write_bytes(jpeg())
    finally:
        os.chdir(here)
    with pytest.raises(SourceError, match="cannot be read"):
        found(root)


def test_many_folders_in_one_another_are_read_to_the_end(tmp_path: Path) -> None:
    deep = image(tmp_path / "x" / "cat" / "/".join(["d"] * 300) / "1.jpg")
    image(tmp_path / "x" / "dog" / "1.jpg")
    assert deep.relative_to(tmp_path / "x").as_posix() in found(tmp_path / "x")[0][0]


def _replacements() -> Iterator[Any]:
    yield pytest.param(make_fifo, id="fifo")
    yield pytest.param(make_socket, id="socket")
    yield pytest.param(lambda path: path.symlink_to("/dev/zero"), id="device")
    yield pytest.param(lambda path: path.mkdir(), id="folder")
    yield pytest.param(lambda path: path.symlink_to("/nowhere"), id="nowhere")
    yield pytest.param(lambda path: path.symlink_to(path.name), id="itself")
    yield pytest.param(lambda path: path.write_bytes(b""), id="empty")


@pytest.mark.parametrize("replace", _replacements())
def test_files_replaced_after_they_were_listed_are_rejected_and_never_waited_for(tmp_path: Path, replace: Any) -> None:
    root = make_image_folder(tmp_path / "x", ["cat", "dog"], 10, [])
    gone = [root / "cat" / f"cat_all_{k}.jpg" for k in range(5)]

    def listed(state: Progress) -> None:
        if state.unit == "found" and gone[0].is_file() and gone[0].stat().st_size:
            for path in gone:
                path.unlink()
                replace(path)

    options = ConvertOptions(workers=1, max_rejected="50%")
    with no_hang(60):
        result = convert([root], tmp_path / "out", None, PlanOptions(), options, listed, lambda: False)
    split = result.manifest.splits["train"]
    assert (split.images, split.rejected) == (15, {"unreadable": 5})


def test_a_parquet_file_beside_images_hides_none_of_them(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = make_image_folder(tmp_path / "x" / "photos", ["cat", "dog"], 1)
    for table in ({"label": [1, 2]}, {"image": [jpeg(), jpeg(1)], "label": ["a", "b"]}):
        parquet.write_table(pyarrow.table(table), tmp_path / "x" / "data.parquet")
        if "image" in table:
            with pytest.raises(SourceError, match="holds Parquet files and images"):
                detect([tmp_path / "x"])
        else:
            assert found(tmp_path / "x") == found(root)
            assert "not read (data.parquet)" in notes(tmp_path / "x")
