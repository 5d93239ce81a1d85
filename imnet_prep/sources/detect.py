"""Recognize the layout of each source by its content first, then by its name."""

import os
from collections.abc import Sequence
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources.archives import (
    SPLIT_FOLDERS,
    ClassTar,
    Devkit,
    FlatTar,
    NestedTar,
    TarFolder,
    ends_in_zeros,
    peek,
)
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
from imnet_prep.types import SPLITS

_DEVKIT_FOLDER = "ILSVRC2012_devkit_t12"
_DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
_KAGGLE_SOLUTION = "LOC_val_solution.csv"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"PK": "zip", b"\x28\xb5": "zstd"}


def detect(paths: Sequence[Path], split: str | None = None) -> list[Source]:
    """Recognize the layout of each path.

    Args:
        paths: Folders and archives, in any order and mix.
        split: Selects one split of a source that has several, and names the split of one that does not tell it.

    Returns:
        One source per path (more for a folder of official archives), in the order of the paths.

    Raises:
        SourceError: A path is missing, empty, cut, or of no known layout; the message says which in one line.
    """
    if split is not None and split not in SPLITS:
        raise SourceError(f"no split is called {split}", expected=" or ".join(SPLITS), got=split)
    if not paths:
        raise SourceError("no source was given", expected="a folder or archive of images")
    sources: list[Source] = []
    for path in map(Path, paths):
        try:
            if path.is_dir():
                sources += _folder(path, split or "", any(isinstance(source, Devkit) for source in sources))
            elif path.is_file():
                sources.append(_file(path, split or ""))
            elif path.exists():
                raise SourceError(f"{path} is neither a folder nor a file")
            else:
                raise SourceError(f"{path} does not exist", remedy="check the path")
        except OSError as error:
            raise SourceError(f"{error.filename or path} cannot be read", got=error.strerror or str(error)) from error
    _hand_out_labels(sources)
    if not any(source.has_images for source in sources):
        given = ", ".join(map(str, paths))
        raise SourceError(f"{given} holds labels and no images", expected="the validation archive or folder beside it")
    return sources


def _hand_out_labels(sources: list[Source]) -> None:
    """Label the validation images without class folders with the labels of a devkit among the sources."""
    waiting = [source for source in sources if isinstance(source, FlatTar | FolderSource) and source.unlabelled()]
    known = [source.labels for source in sources if isinstance(source, Devkit)]
    if waiting and not known:
        raise SourceError(
            f"{waiting[0].path}: validation images without class folders need their labels",
            expected=f"{_DEVKIT_ARCHIVE}, its unpacked folder, or {_KAGGLE_SOLUTION} among the sources",
            got="none",
            remedy="add the devkit to the command",
        )
    if waiting and any(labels.by_key != known[0].by_key for labels in known):
        raise SourceError("two sources of validation labels contradict each other", remedy="give one of them")
    for source in waiting:
        for part in source.unlabelled():
            part.labels = known[0]


# --- files -----------------------------------------------------------------------------------------------------------


def _file(path: Path, split: str) -> Source:
    start = PlainFile(path).read(262, 0)
    if not start:
        raise SourceError(f"{path} is empty", expected="an archive of images", got="0 bytes")
    if path.name.endswith(".csv"):
        return Devkit(path, "kaggle-val-solution", read_kaggle_solution(path))
    if "devkit" in path.name or path.name == "meta.mat":
        return _devkit(path)
    if start[:2] in _COMPRESSED and start[257:262] != b"ustar":
        raise SourceError(
            f"{path} is compressed ({_COMPRESSED[start[:2]]})",
            expected="a folder or an uncompressed tar, whose images can be read in place",
            remedy="unpack it and give the folder",
        )
    if is_image_name(path.name):
        raise SourceError(f"{path} is one image", expected="a folder or archive of class folders")
    return _tar(path, split)


def _devkit(path: Path) -> Devkit:
    return Devkit(path, "ilsvrc2012-devkit", read_devkit(path))


def _tar(path: Path, split: str) -> Source:
    named, size = catalog.archives().get(path.name), path.stat().st_size
    if named is not None and size < (named.size_bytes or 0) and not ends_in_zeros(PlainFile(path)):
        raise SourceError(
            f"{path} is not whole: it does not end as a tar archive does",
            expected=f"{named.size_bytes} bytes",
            got=f"{size} bytes",
            remedy="download the rest",
        )
    layout, first = peek(path)
    if layout == "classes":
        return ClassTar(path, "class-tar", split)
    if layout == "nested" and named is None and first[:-4] not in catalog.labels():
        return NestedTar(path, "nested-tar", split or "train")
    has = "train" if layout == "nested" else layout
    if split not in ("", has):
        raise SourceError(f"{path} holds the {has} split", expected=f"the {split} split (--split)", got=has)
    return (NestedTar if layout == "nested" else FlatTar)(path, f"ilsvrc2012-{has}-tar", has)


# --- folders ---------------------------------------------------------------------------------------------------------


def _folder(path: Path, split: str, labelled: bool) -> list[Source]:
    """Try one layout after the other."""
    if not any(os.scandir(path)):
        raise SourceError(f"{path} is empty", expected="class folders with images", got="an empty folder")
    if (path / "journal.sqlite").is_file():
        return [DownloadFolder(path, "download", split or _split_by_name(path))]
    if path.name.startswith(_DEVKIT_FOLDER) or any((path / name).is_file() for name in ("data/meta.mat", "meta.mat")):
        return [_devkit(path)]
    if (path / "wnids.txt").is_file() and (path / "train").is_dir():
        return [_tiny(path, split)]
    return (
        _kaggle(path, split)
        or _official_archives(path, split)
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
    places = (top / _KAGGLE_SOLUTION for top in (path, *list(path.parents)[:3]))
    if solution := next(filter(Path.is_file, places), None):
        labels = read_kaggle_solution(solution)
        for part in source.unlabelled():
            part.labels = labels
    return [source]


def _official_archives(path: Path, split: str) -> list[Source]:
    known = {name: entry for name, entry in catalog.archives().items() if (path / name).is_file()}
    known.pop("ILSVRC2012_img_train_t3.tar", None)  # a part of the whole training archive
    if not any(name.endswith(".tar") for name in known):
        return []
    if "ILSVRC2012_img_test_v10102019.tar" in known:
        known.pop("ILSVRC2012_img_test.tar", None)
    return [_file(path / name, split) for name, entry in known.items() if not split or entry.split in ("", split)]


def _splits(path: Path, split: str, labelled: bool) -> list[Source]:
    parts = _split_parts(path, split)
    if not parts:
        return []
    official = any(isinstance(part, FlatFolder) for part in parts)
    tree = FolderSource(path, "ilsvrc2012-tree" if official else "imagefolder", parts)
    devkits = [path / name for name in (_DEVKIT_ARCHIVE, _DEVKIT_FOLDER) if (path / name).exists()]
    return [_devkit(devkits[0]), tree] if devkits and not labelled and tree.unlabelled() else [tree]


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
