"""Untidy folders of images, drawn at random: every layout, and what people leave in and beside it."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from tests.imnet_prep.obstacles import make_fifo, make_socket
from tests.synthetic import devkit_bytes, jpeg, tar_bytes

_CLASSES = ("cat", "dog", "eel", "n01440764", "n01443537", "bus stop", "猫", "v1.0", "Cat")
_SUFFIXES = (".jpg", ".JPG", ".jpeg", ".png", ".JPEG", ".webp")


def is_visible_image(name: str) -> bool:
    """Whether documentation says that a file of this name is an image; written apart from the code under test."""
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", "_0001", ".jpg~", "size=large")
    return not name.startswith(".") and name.lower().endswith(suffixes)


class Untidy:
    """Draws one folder.

    Attributes:
        root: The folder.
        said: What was drawn, for messages.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.said, self._made = root, list[str](), 0
        self._rng = random.Random(f"untidy {seed}")
        self.outside = root.with_name(root.name + "-outside")
        for folder in (root, self.outside):
            folder.mkdir()
        self._draw((
            self._classes, self._classes, self._splits, self._splits, self._nested, self._wrapped, self._flat,
            self._tiny, self._kaggle, self._official_tree, self._class_major, self._class_tars,
        ))  # fmt: skip
        for _ in range(self._rng.choice((0, 1, 1, 2, 3, 5))):
            self._draw((
                self._loose, self._bonus, self._hidden, self._dangling, self._loop, self._lattice, self._outside_link,
                self._file_links, self._special, self._empty, self._odd_names, self._deep, self._image_named_folder,
                self._without_suffix,
                self._other_files, self._empty_class, self._inside_a_class, self._second_val,
            ))  # fmt: skip

    def images(self) -> Iterator[Path]:
        """Every visible image below the folder, by its own place: no link to a folder is followed."""
        for folder, below, files in os.walk(self.root):
            below[:] = [name for name in below if not name.startswith(".") and not os.path.islink(f"{folder}/{name}")]
            yield from (Path(folder, name) for name in files if is_visible_image(name))

    def _draw(self, choices: tuple[Callable[[], None], ...]) -> None:
        choice = self._rng.choice(choices)
        self.said.append(choice.__name__.strip("_"))
        choice()

    def _folders(self) -> list[Path]:
        return [self.root, *(path for path in sorted(self.root.rglob("*")) if path.is_dir() and not path.is_symlink())]

    def _some_folder(self) -> Path:
        return self._rng.choice(self._folders())

    def _image(self, folder: Path, name: str = "") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        self._made += 1
        path = folder / (name or f"{self._made}{self._rng.choice(_SUFFIXES)}")
        if not os.path.lexists(path):
            path.write_bytes(_jpeg(self._rng.randrange(4)) + struct.pack("<I", self._made))
        return path

    def _fill(self, folder: Path, most: int = 4) -> None:
        for _ in range(self._rng.randint(1, most)):
            self._image(folder)

    # --- layouts -----------------------------------------------------------------------------------------------------

    def _some_classes(self, least: int = 1) -> list[str]:
        return self._rng.sample(_CLASSES, self._rng.randint(least, 5))

    def _classes(self, below: Path | None = None) -> None:
        for name in self._some_classes():
            self._fill((below or self.root) / name)

    def _splits(self, below: Path | None = None) -> None:
        names = ("train", "val", "test", "Train", "validation", "valid", "training")
        for split in self._rng.sample(names, self._rng.randint(1, 3)):
            if self._rng.random() < 0.15:
                self._fill((below or self.root) / split)
            else:
                self._classes((below or self.root) / split)

    def _nested(self) -> None:
        for name in self._rng.sample((*_CLASSES, "train", "val"), self._rng.randint(1, 4)):
            for year in self._rng.sample(("2019", "2020", "indoors/b", "train"), self._rng.randint(1, 3)):
                self._fill(self.root / name / year)

    def _wrapped(self) -> None:
        wrapper = self.root / self._rng.choice(("photos", "data/all", "train"))
        self._rng.choice((self._classes, self._splits))(wrapper)

    def _flat(self) -> None:
        self._fill(self.root)

    def _tiny(self) -> None:
        for wnid in ("n01440764", "n01443537"):
            self._fill(self.root / "train" / wnid / "images")
        (self.root / "wnids.txt").write_text("n01440764\nn01443537\n")
        if self._rng.random() < 0.8:
            names = [self._image(self.root / "val" / "images", f"val_{k}.JPEG").name for k in range(4)]
            rows = "".join(f"{name}\tn01440764\t0\t0\t1\t1\n" for name in names[self._rng.randint(0, 1) :])
            (self.root / "val" / "val_annotations.txt").write_text(rows)
        if self._rng.random() < 0.5:
            self._fill(self.root / "test" / self._rng.choice(("images", "")))

    def _flat_val(self, folder: Path) -> None:
        for number in range(1, 5):
            self._image(folder, f"ILSVRC2012_val_{number:08d}.JPEG")

    def _kaggle(self) -> None:
        tree = self.root / "ILSVRC" / "Data" / "CLS-LOC"
        self._classes(tree / "train")
        self._flat_val(tree / "val")
        rows = "".join(f"ILSVRC2012_val_{number:08d},n01440764 1 2 3 4\n" for number in range(1, 5))
        (self.root / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{rows}")
        if self._rng.random() < 0.3:
            self._fill(self.root / "ILSVRC" / "Data" / "DET" / "train")

    def _official_tree(self) -> None:
        self._classes(self.root / "train")
        self._flat_val(self.root / "val")
        if self._rng.random() < 0.8:
            devkit = devkit_bytes({"n01440764": 1, "n01443537": 2}, [1, 2, 2, 1])
            (self.root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit)

    def _class_major(self) -> None:
        for name in self._some_classes():
            for split in ("train", "test"):
                self._fill(self.root / name / split)

    def _class_tars(self) -> None:
        for wnid in ("n01440764", "n01443537"):
            (self.root / f"{wnid}.tar").write_bytes(tar_bytes({f"{wnid}_1.JPEG": jpeg()}))

    # --- what lies in and beside them --------------------------------------------------------------------------------

    def _loose(self) -> None:
        self._fill(self._rng.choice([self.root, *self.root.glob("*/")]), 2)

    def _bonus(self) -> None:
        self._fill(self._some_folder() / "bonus")

    def _hidden(self) -> None:
        folder = self._some_folder()
        self._image(folder, "._1.jpg")
        self._image(folder / ".thumbnails")

    def _dangling(self) -> None:
        folder = self._some_folder()
        for name in self._rng.sample(("gone.jpg", "gone", ".gone"), 2):
            if not os.path.lexists(folder / name):
                (folder / name).symlink_to("/nowhere/at/all")
        if not os.path.lexists(folder / "self.png"):
            (folder / "self.png").symlink_to("self.png")

    def _loop(self) -> None:
        folder = self._some_folder()
        if not os.path.lexists(folder / "up"):
            (folder / "up").symlink_to(self._rng.choice([self.root, folder, self.root.parent]))

    def _lattice(self) -> None:
        folders = self._folders()[:12]
        for folder in folders:
            for number, other in enumerate(folders):
                if not os.path.lexists(folder / f"to{number}"):
                    (folder / f"to{number}").symlink_to(other)

    def _outside_link(self) -> None:
        self._image(self.outside / "pictures" / "more", "outside.jpg")
        for _ in range(self._rng.randint(1, 2)):
            link = self._some_folder() / "elsewhere"
            if not os.path.lexists(link):
                link.symlink_to(self.outside / "pictures")

    def _file_links(self) -> None:
        images = list(self.images())
        if images:
            link = self._some_folder() / "linked.jpg"
            if not os.path.lexists(link):
                link.symlink_to(self._rng.choice(images))

    def _special(self) -> None:
        folder = self._some_folder()
        if not os.path.lexists(folder / "pipe.jpg"):
            make_fifo(folder / "pipe.jpg")
        if not os.path.lexists(folder / "socket.jpg"):
            make_socket(folder / "socket.jpg")

    def _empty(self) -> None:
        folder = self._some_folder()
        (folder / "empty.jpg").write_bytes(b"")
        (folder / "text.jpg").write_bytes(b"not an image")

    def _odd_names(self) -> None:
        folder = self._some_folder()
        for name in (b"caf\xe9.jpg", b"two\nlines.jpg", b"A.jpg", b"a.JPG", b"a.jpg", "e\u0301.jpg".encode(), b" .jpg"):
            self._image(folder, os.fsdecode(name))
        self._image(folder / os.fsdecode(b"\xff\xfe"), "in a folder.jpg")

    def _without_suffix(self) -> None:
        folder = self._some_folder()
        for name in ("IMG_0001", "cat.jpg~", "cat.jpg?size=large"):
            self._image(folder, name)

    def _deep(self) -> None:
        self._image(self._some_folder() / "/".join("abcdefghijklmnopqrstuvwxy"))

    def _image_named_folder(self) -> None:
        self._image(self._some_folder() / "folder.jpg")

    def _other_files(self) -> None:
        folder = self._some_folder()
        for name in ("README", "notes.txt", "labels.csv", "Thumbs.db", "x.xml", "model.pt"):
            (folder / name).write_bytes(b"x")

    def _empty_class(self) -> None:
        (self._some_folder() / "nothing" / "here").mkdir(parents=True, exist_ok=True)

    def _inside_a_class(self) -> None:
        deepest = max(self._folders(), key=lambda path: len(path.parts))
        self._fill(deepest / self._rng.choice(("sub", "train", "images")))

    def _second_val(self) -> None:
        self._classes(self.root / self._rng.choice(("val", "valid", "validation", "Val")))


@cache
def _jpeg(label: int) -> bytes:
    return jpeg(label, 1, 16, 16)
