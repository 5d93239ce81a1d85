"""Recognize the layout of a folder: splits, class folders, flat images, Kaggle's, archives, a download."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.sources.archives import Devkit, TarFolder
from imnet_prep.sources.base import Source, printable
from imnet_prep.sources.folders import (
    ClassFolders,
    DownloadFolder,
    FlatFolder,
    FolderSource,
    Part,
    archives_note,
    data_files,
)
from imnet_prep.sources.foreign import refuse_foreign_folder
from imnet_prep.sources.labels import (
    KAGGLE_SOLUTION,
    WNID,
    official_split,
    read_devkit,
    read_kaggle_solution,
    read_tiny_annotations,
)
from imnet_prep.sources.layout import SPLIT_FOLDERS
from imnet_prep.sources.tree import first_image, has_image, listed, listing, visible_folders
from imnet_prep.sources.webdataset import WebDatasetFolder, tars_in
from imnet_prep.types import SPLITS

DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
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

    Raises:
        SourceError: It has no known layout, or could have two.
        OSError: A folder in it cannot be read.
    """
    if not any(os.scandir(path)):
        raise SourceError(f"{path} is empty", expected="class folders with images", got="an empty folder")
    if (path / "journal.sqlite").is_file():
        return [DownloadFolder(path, "download", split or _split_by_name(path))]
    if path.name.startswith(_DEVKIT_FOLDER) or any((path / name).is_file() for name in ("data/meta.mat", "meta.mat")):
        if has_image(path):
            raise SourceError(
                f"{path} is a devkit with images in it",
                expected="a folder of the devkit alone",
                remedy="move the images or the devkit into another folder, and give both",
            )
        return [devkit(path)]
    if (path / "wnids.txt").is_file() and (path / "train").is_dir():
        return [_tiny(path, split)]
    return (
        _kaggle(path, split)
        or _official_archives(path, split, file_source)
        or _splits(path, split, labelled)
        or _one_split(path, split, labelled, file_source)
    )


def _split_by_name(path: Path) -> str:
    return SPLIT_FOLDERS.get(path.resolve().name.lower(), "train")


def _folders(path: Path) -> list[Path]:
    return [path / entry.name for entry in visible_folders(path, Counter())]


def _tiny(path: Path, split: str) -> Source:
    parts: list[Part] = [ClassFolders("train", path / "train", below="images/")]
    if (path / "val" / "images").is_dir() and has_image(path / "val" / "images"):
        parts.append(_tiny_val(path / "val"))
    elif (path / "val").is_dir():
        parts.append(ClassFolders("val", path / "val"))
    if (path / "test" / "images").is_dir():
        parts.append(FlatFolder("test", path / "test" / "images"))
    return FolderSource(path, "tiny-imagenet", parts, split)


def _tiny_val(path: Path) -> FlatFolder:
    annotations = path / "val_annotations.txt"
    return FlatFolder("val", path / "images", read_tiny_annotations(annotations.read_bytes(), str(annotations)))


def _kaggle(path: Path, split: str) -> list[Source]:
    trees = [path / sub for sub in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if (path / sub).is_dir()]
    if path.parts[-2:] == ("Data", "CLS-LOC"):
        trees.append(path)
    if not trees:
        return []
    parts = _split_parts(trees[0])
    if not parts:
        raise SourceError(
            f"{path} has Kaggle's layout and no images in {trees[0]}", expected="train, val or test in it"
        )
    source = FolderSource(path, "kaggle", parts, split)
    places = (top / KAGGLE_SOLUTION for top in (path, *list(path.parents)[:3]))
    if solution := next(filter(Path.is_file, places), None):
        labels = read_kaggle_solution(solution)
        for part in source.unlabelled():
            part.labels = labels
    return [source]


def _official_archives(path: Path, split: str, file_source: FileSource) -> list[Source]:
    known = {name: entry for name, entry in catalog.archives().items() if (path / name).is_file()}
    if not any(name.endswith(".tar") for name in known):
        return []
    other = [*filter(None, [first_image(path)]), *(folder.name for folder in _folders(path) if has_image(folder))]
    if other := other + [name for name in data_files(path) if not name.startswith("ILSVRC2012_")]:
        raise SourceError(
            f"{path} holds official archives and other images or archives",
            expected="the official archives alone",
            got=listed(other),
            remedy="give what you mean one by one",
        )
    if "ILSVRC2012_img_train.tar" in known:
        known.pop("ILSVRC2012_img_train_t3.tar", None)  # a part of it
    if "ILSVRC2012_img_test_v10102019.tar" in known:
        known.pop("ILSVRC2012_img_test.tar", None)
    return [file_source(path / name, split) for name, entry in known.items() if not split or entry.split in ("", split)]


def _splits(path: Path, split: str, labelled: bool) -> list[Source]:
    parts = _split_parts(path)
    if not parts:
        return []
    official = any(isinstance(part, FlatFolder) for part in parts)
    tree = FolderSource(path, "ilsvrc2012-tree" if official else "imagefolder", parts, split)
    places = (path / name for name in (DEVKIT_ARCHIVE, _DEVKIT_FOLDER))
    devkits = [place for place in places if place.is_file() or place.is_dir()]  # a FIFO would wait
    return [devkit(devkits[0]), tree] if devkits and not labelled and tree.unlabelled() else [tree]


def _split_parts(path: Path) -> list[Part]:
    """Return the ``train``, ``val`` and ``test`` folders in a folder; nothing if its folders are classes.

    A split has class folders, or is flat with official names. A folder that is named like a split, and holds images
    directly beside other folders of images, is a class; the test split may be flat beside other splits.

    Raises:
        SourceError: The folders could be splits or classes, or some are neither.
    """
    parts, flat, others = list[Part](), list[Path](), list[Path]()
    for folder in _folders(path):
        split = SPLIT_FOLDERS.get(folder.name.lower())
        if split is None:
            others.append(folder)
        elif part := _part(split, folder):
            parts.append(part)
        elif first_image(folder):
            flat.append(folder)
    if parts:
        parts += [FlatFolder("test", folder) for folder in flat if SPLIT_FOLDERS[folder.name.lower()] == "test"]
        flat = [folder for folder in flat if SPLIT_FOLDERS[folder.name.lower()] != "test"]
    if not parts and (not flat or (len(flat) == 1 and any(map(has_image, others)))):
        return []
    if flat:
        raise SourceError(
            f"{path}: {listed([folder.name for folder in flat])} holds images and no class folders",
            expected=f"{flat[0].name}/<class>/<image>",
            got=f"{flat[0].name}/{first_image(flat[0])}",
            remedy="put the images of each class into a folder named after it",
        )
    if strange := [folder.name for folder in others if has_image(folder)]:
        names = [part.folder.name for part in parts]
        raise SourceError(
            f"{path} has folders of splits ({listed(names)}) beside other folders with images",
            expected="folders of splits alone, or class folders alone",
            got=listed(strange),
            remedy=f"give the splits alone ({' '.join(str(path / name) for name in names)}), move the others into one "
            f"or away, or rename {listed(names)} if that is a class",
        )
    for split, folders in _by_split(parts).items():
        if len(folders) > 1:
            raise SourceError(
                f"{path} has two folders for {split}: {' and '.join(folders)}", remedy="give them one by one"
            )
    return parts


def _by_split(parts: Sequence[Part]) -> dict[str, list[str]]:
    return {split: [part.folder.name for part in parts if part.split == split] for split in SPLITS}


def _part(split: str, folder: Path) -> Part | None:
    """Return a split with class folders, or a flat one of official images; None for anything else."""
    below = _folders(folder)
    if any(map(has_image, below)):
        flat_test = split == "test" and [sub.name for sub in below] in (["images"], ["test"])
        return FlatFolder(split, folder) if flat_test else ClassFolders(split, folder)
    official = official_split(first_image(folder))
    return FlatFolder(split, folder) if official == split else None


def _one_split(path: Path, split: str, labelled: bool, file_source: FileSource) -> list[Source]:
    """Recognize a folder without split folders: class folders, flat official images, or class tars."""
    if (path / "val_annotations.txt").is_file() and (path / "images").is_dir():  # Tiny-ImageNet's val by itself
        return [FolderSource(path, "tiny-imagenet", [_tiny_val(path)], split)]
    named, first, names = split or _split_by_name(path), first_image(path), [entry.name for entry in listing(path)]
    class_tars = any(name.endswith(".tar") and WNID.fullmatch(name[:-4]) for name in names)
    folders = list(islice(filter(has_image, _folders(path)), 2))
    around = not class_tars and path.resolve().name.lower() not in SPLIT_FOLDERS
    if around and len(folders) == 1 and not first_image(folders[0]):
        return _inside(path, folders[0], first, folder_sources(folders[0], split, labelled, file_source))
    if folders:
        return [FolderSource(path, "imagefolder", [ClassFolders(named, path)])]
    if class_tars:
        return [TarFolder(path, "folder-of-class-tars", named)]
    if not first and (tars := tars_in(path)):
        return [WebDatasetFolder(path, tars, split)]
    if flat := official_split(first):
        return [FolderSource(path, "ilsvrc2012-tree", [FlatFolder(flat, path)], split)]
    if first:
        raise SourceError(
            f"{path} has images and no class folders",
            expected=f"{path.name}/<class>/<image>",
            got=first,
            remedy="put the images of each class into a folder named after it",
        )
    refuse_foreign_folder(path)
    raise SourceError(
        f"{path} holds no class folders with images",
        expected=f"{path.name}/<class>/<image>.jpg (or png, webp, ...)",
        got=", ".join(names[:5]) + (", ..." if len(names) > 5 else ""),
    )


def _inside(path: Path, folder: Path, first: str, sources: list[Source]) -> list[Source]:
    """Return the sources of the only folder in a folder, which holds all images in folders of its own.

    Raises:
        SourceError: There is an image beside it.
    """
    if first:
        raise SourceError(
            f"{path} holds images beside the only folder of folders, {folder.name}",
            got=first,
            remedy=f"give {folder}, or move the images away",
        )
    for source in sources:
        if isinstance(source, FolderSource):
            name, only = printable(path.resolve().name), printable(folder.name)
            seen = f"{name}: everything is in {only}, whose folders are taken as splits or classes"
            source.remarks += (seen, *archives_note(path))
    return sources
