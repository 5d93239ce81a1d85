"""Recognize the layout of a folder: splits, class folders, flat images, Kaggle's, archives, a download."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.sources.archives import SPLIT_FOLDERS, Devkit, TarFolder
from imnet_prep.sources.base import Source, is_image_name
from imnet_prep.sources.folders import (
    ClassFolders,
    DownloadFolder,
    FlatFolder,
    FolderSource,
    Part,
    folders_in,
    has_image,
)
from imnet_prep.sources.labels import WNID, official_split, read_devkit, read_kaggle_solution, read_tiny_annotations

DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
KAGGLE_SOLUTION = "LOC_val_solution.csv"
_DEVKIT_FOLDER = "ILSVRC2012_devkit_t12"
FileSource = Callable[[Path, str], Source]


def devkit(path: Path) -> Devkit:
    """Read the labels of a devkit, a ``.tar.gz`` or a folder."""
    return Devkit(path, "ilsvrc2012-devkit", read_devkit(path))


def folder_sources(path: Path, split: str, labelled: bool, file_source: FileSource) -> list[Source]:
    """Try one layout after the other.

    Args:
        path: The folder.
        split: The split to select or to name, or empty.
        labelled: The validation labels are given by another source.
        file_source: Returns the source for an archive.
    """
    if not any(os.scandir(path)):
        raise SourceError(f"{path} is empty", expected="class folders with images", got="an empty folder")
    if (path / "journal.sqlite").is_file():
        return [DownloadFolder(path, "download", split or _split_by_name(path))]
    if path.name.startswith(_DEVKIT_FOLDER) or any((path / name).is_file() for name in ("data/meta.mat", "meta.mat")):
        return [devkit(path)]
    if (path / "wnids.txt").is_file() and (path / "train").is_dir():
        return [_tiny(path, split)]
    return (
        _kaggle(path, split)
        or _official_archives(path, split, file_source)
        or _splits(path, split, labelled)
        or [_one_split(path, split)]
    )


def _split_by_name(path: Path) -> str:
    return SPLIT_FOLDERS.get(path.resolve().name.lower(), "train")


def _tiny(path: Path, split: str) -> Source:
    parts: list[Part] = [ClassFolders("train", path / "train", below="images/")]
    if (path / "val" / "images").is_dir():
        parts.append(_tiny_val(path / "val"))
    elif (path / "val").is_dir():
        parts.append(ClassFolders("val", path / "val"))
    if (path / "test" / "images").is_dir():
        parts.append(FlatFolder("test", path / "test" / "images"))
    return FolderSource(path, "tiny-imagenet", _wanted(path, parts, split))


def _tiny_val(path: Path) -> FlatFolder:
    annotations = path / "val_annotations.txt"
    return FlatFolder("val", path / "images", read_tiny_annotations(annotations.read_bytes(), str(annotations)))


def _kaggle(path: Path, split: str) -> list[Source]:
    trees = [path / sub for sub in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if (path / sub).is_dir()]
    if path.parts[-2:] == ("Data", "CLS-LOC"):
        trees.append(path)
    if not trees:
        return []
    parts = _split_parts(trees[0], split)
    if not parts:
        raise SourceError(
            f"{path} has Kaggle's layout and no images in {trees[0]}", expected="train, val or test in it"
        )
    source = FolderSource(path, "kaggle", parts)
    places = (top / KAGGLE_SOLUTION for top in (path, *list(path.parents)[:3]))
    if solution := next(filter(Path.is_file, places), None):
        labels = read_kaggle_solution(solution)
        for part in source.unlabelled():
            part.labels = labels
    return [source]


def _official_archives(path: Path, split: str, file_source: FileSource) -> list[Source]:
    known = {name: entry for name, entry in catalog.archives().items() if (path / name).is_file()}
    known.pop("ILSVRC2012_img_train_t3.tar", None)  # a part of the whole training archive
    if not any(name.endswith(".tar") for name in known):
        return []
    if "ILSVRC2012_img_test_v10102019.tar" in known:
        known.pop("ILSVRC2012_img_test.tar", None)
    return [file_source(path / name, split) for name, entry in known.items() if not split or entry.split in ("", split)]


def _splits(path: Path, split: str, labelled: bool) -> list[Source]:
    parts = _split_parts(path, split)
    if not parts:
        return []
    official = any(isinstance(part, FlatFolder) for part in parts)
    tree = FolderSource(path, "ilsvrc2012-tree" if official else "imagefolder", parts)
    devkits = [path / name for name in (DEVKIT_ARCHIVE, _DEVKIT_FOLDER) if (path / name).exists()]
    return [devkit(devkits[0]), tree] if devkits and not labelled and tree.unlabelled() else [tree]


def _split_parts(path: Path, wanted: str) -> list[Part]:
    """Return the ``train``, ``val`` and ``test`` folders in a folder: class folders, or flat ones of known labels."""
    parts: dict[str, Part] = {}
    for folder in folders_in(path):
        split = SPLIT_FOLDERS.get(folder.name.lower())
        part = _part(split, folder) if split else None
        if part is None:
            continue
        if part.split in parts:
            names = f"{parts[part.split].folder.name} and {folder.name}"
            raise SourceError(f"{path} has two folders for {part.split}: {names}")
        parts[part.split] = part
    if list(parts) == ["test"] and official_split(_first_image(parts["test"].folder)) != "test":
        return []  # alone it is a class that is called test
    return _wanted(path, list(parts.values()), wanted) if parts else []


def _part(split: str, folder: Path) -> Part | None:
    below = folders_in(folder)
    if any(map(has_image, below)):
        flat_test = split == "test" and [sub.name for sub in below] in (["images"], ["test"])
        return FlatFolder(split, folder) if flat_test else ClassFolders(split, folder)
    first = _first_image(folder)
    is_flat = bool(first) if split == "test" else split == "val" == official_split(first)
    return FlatFolder(split, folder) if is_flat else None


def _first_image(folder: Path) -> str:
    with os.scandir(folder) as entries:
        return min((entry.name for entry in entries if is_image_name(entry.name)), default="")


def _one_split(path: Path, split: str) -> Source:
    """Recognize a folder without split folders: class folders, flat official images, or class tars."""
    if (path / "val_annotations.txt").is_file() and (path / "images").is_dir():  # Tiny-ImageNet's val by itself
        return FolderSource(path, "tiny-imagenet", _wanted(path, [_tiny_val(path)], split))
    named = split or _split_by_name(path)
    if any(map(has_image, folders_in(path))):
        return FolderSource(path, "imagefolder", [ClassFolders(named, path)])
    first = _first_image(path)
    if flat := official_split(first):
        return FolderSource(path, "ilsvrc2012-tree", _wanted(path, [FlatFolder(flat, path)], split))
    if first:
        raise SourceError(
            f"{path} has images and no class folders",
            expected=f"{path.name}/<class>/<image>",
            got=first,
            remedy="put the images of each class into a folder named after it",
        )
    names = sorted(os.listdir(path))
    if any(name.endswith(".tar") and WNID.fullmatch(name[:-4]) for name in names):
        return TarFolder(path, "folder-of-class-tars", named)
    raise SourceError(
        f"{path} holds no class folders with images",
        expected=f"{path.name}/<class>/<image>.jpg (or png, webp, ...)",
        got=", ".join(names[:5]) + (", ..." if len(names) > 5 else ""),
    )


def _wanted(path: Path, parts: Sequence[Part], split: str) -> list[Part]:
    """Return the parts of the requested split, or all."""
    wanted = [part for part in parts if split in ("", part.split)]
    if not wanted:
        have = " and ".join(sorted(part.split for part in parts))
        raise SourceError(f"{path} has no {split} split", expected=f"a folder {split}", got=have)
    return wanted
