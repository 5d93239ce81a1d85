"""Tell what the user gave: one function a layout, tried in a fixed order, each by content before name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.sources.archives import (
    END_BYTES,
    SPLIT_FOLDERS,
    ClassTar,
    Devkit,
    FlatTar,
    LabelFile,
    NestedTar,
    TarFolder,
    peek,
)
from imnet_prep.sources.base import Source, is_image_name
from imnet_prep.sources.folders import ClassFolders, FlatFolder, FolderSource, folders_in, has_image
from imnet_prep.sources.labels import (
    TEST_NAME,
    VAL_NAME,
    WNID,
    Labels,
    read_devkit,
    read_kaggle_solution,
    read_tiny_annotations,
)
from imnet_prep.types import SPLITS

_DEVKIT_FOLDER = "ILSVRC2012_devkit_t12"
_DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
_KAGGLE_SOLUTION = "LOC_val_solution.csv"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"PK": "zip", b"\x28\xb5": "zstd"}


@dataclass(slots=True)
class _Found:
    """Sources found, and the flat validation sources that still need labels."""

    split: str | None
    sources: list[Source] = field(default_factory=list)
    labels: list[Labels] = field(default_factory=list)
    waiting: list[FlatTar | FolderSource] = field(default_factory=list)


def detect(paths: Sequence[Path], split: str | None = None) -> list[Source]:
    """Tell the layout of each path.

    Args:
        paths: Folders and archives, in any order and mix.
        split: Keeps one split of a source that has several, and names the split of one that has none.

    Returns:
        A source a path (more for a folder of official archives), in the order of the paths.

    Raises:
        SourceError: Something is missing, empty, cut, or of no layout known here; one line says what.
    """
    if split is not None and split not in SPLITS:
        raise SourceError(f"no split is called {split}", expected=" or ".join(SPLITS), got=split)
    if not paths:
        raise SourceError("no source was given", expected="a folder or archive of images")
    found = _Found(split)
    for path in paths:
        _detect_one(Path(path), found)
    if found.waiting:
        _give_labels(found)
    if not any(not isinstance(source, Devkit) for source in found.sources):
        given = ", ".join(str(path) for path in paths)
        raise SourceError(f"{given} holds labels and no images", expected="the validation archive or folder beside it")
    return found.sources


def _detect_one(path: Path, found: _Found) -> None:
    try:
        if path.is_dir():
            _folder(path, found)
        elif path.is_file():
            _file(path, found)
        elif path.exists():
            raise SourceError(f"{path} is neither a folder nor a file")
        else:
            raise SourceError(f"{path} does not exist", remedy="check the path")
    except OSError as exc:
        raise SourceError(f"{path} cannot be read", got=exc.strerror or str(exc)) from exc


def _give_labels(found: _Found) -> None:
    if not found.labels:
        raise SourceError(
            f"{found.waiting[0].path}: validation images without class folders need their labels",
            expected=f"{_DEVKIT_ARCHIVE}, its unpacked folder, or {_KAGGLE_SOLUTION} among the sources",
            got="none",
            remedy="add the devkit to the command",
        )
    if any(dict(labels.by_key) != dict(found.labels[0].by_key) for labels in found.labels[1:]):
        raise SourceError("two sources of validation labels contradict each other", remedy="give one of them")
    for source in found.waiting:
        if isinstance(source, FlatTar):
            source.labels = found.labels[0]
        else:
            source.parts = [
                FlatFolder(part.split, part.folder, found.labels[0])
                if isinstance(part, FlatFolder) and part.split == "val" and part.labels is None
                else part
                for part in source.parts
            ]


# --- files -----------------------------------------------------------------------------------------------------------


def _file(path: Path, found: _Found) -> None:
    with path.open("rb") as file:
        start = file.read(262)
    if not start:
        raise SourceError(f"{path} is empty", expected="an archive of images", got="0 bytes")
    if path.name.endswith(".csv"):
        labels = read_kaggle_solution(path)
        found.labels.append(labels)
        found.sources.append(LabelFile(path, labels))
    elif "devkit" in path.name or path.name == "meta.mat":
        labels = read_devkit(path)
        found.labels.append(labels)
        found.sources.append(Devkit(path, labels))
    elif start[:2] in _COMPRESSED and start[257:262] != b"ustar":
        raise SourceError(
            f"{path} is compressed ({_COMPRESSED[start[:2]]})",
            expected="a folder or an uncompressed tar, whose images can be read where they lie",
            remedy="unpack it and give the folder",
        )
    elif is_image_name(path.name):
        raise SourceError(f"{path} is one image", expected="a folder or archive of class folders")
    else:
        _tar(path, found)


def _tar(path: Path, found: _Found) -> None:
    _refuse_cut(path)
    layout, first = peek(path)
    named = catalog.archives().get(path.name)
    if layout == "nested":
        kind = "ilsvrc2012-train-tar" if named is not None or first[:-4] in catalog.labels() else "nested-tar"
        _add_whole(NestedTar(path, kind, found.split or "train"), "train", found)
    elif layout == "val":
        tar = FlatTar(path, "ilsvrc2012-val-tar", "val", None)
        if _add_whole(tar, "val", found):
            found.waiting.append(tar)
    elif layout == "test":
        _add_whole(FlatTar(path, "ilsvrc2012-test-tar", "test", None), "test", found)
    else:
        found.sources.append(ClassTar(path, found.split))


def _add_whole(source: Source, split: str, found: _Found) -> bool:
    """Add a source of one split, unless another split was asked for; that is an error only for the official sets."""
    if found.split is not None and found.split != split and source.kind != "nested-tar":
        raise SourceError(
            f"{source.path} holds the {split} split", expected=f"the {found.split} split (--split)", got=split
        )
    found.sources.append(source)
    return True


def _refuse_cut(path: Path) -> None:
    """Refuse an official archive that is shorter than published and does not end as a tar does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - END_BYTES))
        ends_well = not any(file.read())
    named = catalog.archives().get(path.name)
    if named is not None and named.size_bytes is not None and size < named.size_bytes and not ends_well:
        raise SourceError(
            f"{path} is not whole: it does not end as a tar archive does",
            expected=f"{named.size_bytes} bytes",
            got=f"{size} bytes",
            remedy="download the rest",
        )


# --- folders ---------------------------------------------------------------------------------------------------------


def _folder(path: Path, found: _Found) -> None:
    if not any(os.scandir(path)):
        raise SourceError(f"{path} is empty", expected="class folders with images", got="an empty folder")
    layouts = (_download, _devkit, _tiny, _kaggle, _official_archives, _splits, _one_split)
    for layout in layouts:
        if layout(path, found):
            return
    raise AssertionError("the last layout either fits or raises")


def _download(path: Path, found: _Found) -> bool:
    if not (path / "journal.sqlite").is_file():
        return False
    from imnet_prep.sources.downloads import DownloadFolder

    split = found.split or SPLIT_FOLDERS.get(path.resolve().name.lower(), "train")
    found.sources.append(DownloadFolder(path, split))
    return True


def _devkit(path: Path, found: _Found) -> bool:
    if not ((path / "data" / "meta.mat").is_file() or (path / "meta.mat").is_file()):
        if path.name.startswith(_DEVKIT_FOLDER):
            read_devkit(path)  # raises, saying what is missing
        return False
    labels = read_devkit(path)
    found.labels.append(labels)
    found.sources.append(Devkit(path, labels))
    return True


def _tiny(path: Path, found: _Found) -> bool:
    if not (path / "wnids.txt").is_file() or not (path / "train").is_dir():
        return False
    parts: list[ClassFolders | FlatFolder] = [ClassFolders("train", path / "train", below="images")]
    if (path / "val" / "images").is_dir():
        annotations = path / "val" / "val_annotations.txt"
        parts.append(FlatFolder("val", path / "val" / "images", read_tiny_annotations(annotations)))
    elif (path / "val").is_dir():
        parts.append(ClassFolders("val", path / "val"))
    if (path / "test" / "images").is_dir():
        parts.append(FlatFolder("test", path / "test" / "images", None))
    _add_folder(path, "tiny-imagenet", parts, found)
    return True


def _kaggle(path: Path, found: _Found) -> bool:
    tree = next((path / sub for sub in ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC") if (path / sub).is_dir()), None)
    if tree is None:
        if not (path.name == "CLS-LOC" and path.parent.name == "Data"):
            return False
        tree = path
    parts = _split_parts(tree, found.split)
    if not parts:
        raise SourceError(f"{path} has Kaggle's layout and no images in {tree}", expected="train, val or test in it")
    tops = (path, path.parent, path.parent.parent, path.parent.parent.parent)
    solution = next((top / _KAGGLE_SOLUTION for top in tops if (top / _KAGGLE_SOLUTION).is_file()), None)
    if solution is not None:
        labels = read_kaggle_solution(solution)
        parts = [
            FlatFolder("val", part.folder, labels) if isinstance(part, FlatFolder) and part.split == "val" else part
            for part in parts
        ]
    _add_folder(path, "kaggle", parts, found)
    return True


def _official_archives(path: Path, found: _Found) -> bool:
    names = [name for name in catalog.archives() if (path / name).is_file() and name != "ILSVRC2012_img_train_t3.tar"]
    if not any(name.endswith(".tar") for name in names):
        return False
    newest = "ILSVRC2012_img_test_v10102019.tar"
    for name in names:
        if name == "ILSVRC2012_img_test.tar" and newest in names:
            continue
        if found.split is None or catalog.archives()[name].split in ("", found.split):
            _file(path / name, found)
    return True


def _splits(path: Path, found: _Found) -> bool:
    parts = _split_parts(path, found.split)
    if not parts:
        return False
    if any(isinstance(part, FlatFolder) and part.split == "val" for part in parts):
        kit = next((path / name for name in (_DEVKIT_ARCHIVE, _DEVKIT_FOLDER) if (path / name).exists()), None)
        if kit is not None and not found.labels:
            labels = read_devkit(kit)
            found.labels.append(labels)
            found.sources.append(Devkit(kit, labels))
    official = any(isinstance(part, FlatFolder) for part in parts)
    _add_folder(path, "ilsvrc2012-tree" if official else "imagefolder", parts, found)
    return True


def _split_parts(path: Path, wanted: str | None) -> list[ClassFolders | FlatFolder]:
    """Find ``train``, ``val`` and ``test`` in a folder; each is class folders, or flat where that can be labelled."""
    parts: dict[str, ClassFolders | FlatFolder] = {}
    for folder in folders_in(path):
        split = SPLIT_FOLDERS.get(folder.name.lower())
        if split is None:
            continue
        part = _part(split, folder)
        if part is None:
            continue
        if split in parts:
            raise SourceError(f"{path} has two folders for {split}: {parts[split].folder.name} and {folder.name}")
        parts[split] = part
    if list(parts) == ["test"] and not TEST_NAME.fullmatch(_first_image(parts["test"].folder)):
        return []  # alone it is a class that is called test
    if wanted is not None and parts and wanted not in parts:
        raise SourceError(
            f"{path} has no {wanted} split", expected=f"a folder {wanted}", got=" and ".join(sorted(parts))
        )
    return [part for split, part in parts.items() if wanted in (None, split)]


def _part(split: str, folder: Path) -> ClassFolders | FlatFolder | None:
    if any(has_image(sub) for sub in folders_in(folder)):
        flat_test = split == "test" and [sub.name for sub in folders_in(folder)] in (["images"], ["test"])
        return FlatFolder(split, folder, None) if flat_test else ClassFolders(split, folder)
    first = _first_image(folder)
    if split == "test" and first:
        return FlatFolder(split, folder, None)
    if split == "val" and VAL_NAME.fullmatch(first):
        return FlatFolder(split, folder, None)
    return None


def _first_image(folder: Path) -> str:
    with os.scandir(folder) as entries:
        return min((entry.name for entry in entries if is_image_name(entry.name)), default="")


def _one_split(path: Path, found: _Found) -> bool:
    """A folder without split folders: class folders, or flat official images."""
    if (path / "val_annotations.txt").is_file() and (path / "images").is_dir():  # Tiny-ImageNet's val by itself
        labels = read_tiny_annotations(path / "val_annotations.txt")
        _add_folder(path, "tiny-imagenet", [FlatFolder("val", path / "images", labels)], found)
        return True
    split = found.split or SPLIT_FOLDERS.get(path.resolve().name.lower(), "train")
    if any(has_image(sub) for sub in folders_in(path)):
        _add_folder(path, "imagefolder", [ClassFolders(split, path)], found)
        return True
    first = _first_image(path)
    if VAL_NAME.fullmatch(first) or TEST_NAME.fullmatch(first):
        is_val = bool(VAL_NAME.fullmatch(first))
        _add_folder(path, "ilsvrc2012-tree", [FlatFolder("val" if is_val else "test", path, None)], found)
        return True
    if first:
        raise SourceError(
            f"{path} has images and no class folders",
            expected=f"{path.name}/<class>/<image>",
            got=first,
            remedy="put the images of each class into a folder named after it",
        )
    names = sorted(entry.name for entry in os.scandir(path))
    if any(name.endswith(".tar") and WNID.fullmatch(name[:-4]) for name in names):
        found.sources.append(TarFolder(path, split))
        return True
    raise SourceError(
        f"{path} holds no class folders with images",
        expected=f"{path.name}/<class>/<image>.jpg (or png, webp, ...)",
        got=", ".join(names[:5]) + (", ..." if len(names) > 5 else ""),
    )


def _add_folder(path: Path, kind: str, parts: list[ClassFolders | FlatFolder], found: _Found) -> None:
    kept = [part for part in parts if found.split in (None, part.split)]
    if not kept:
        have = " and ".join(part.split for part in parts)
        raise SourceError(f"{path} has no {found.split} split", expected=str(found.split), got=have)
    source = FolderSource(path, kind, kept)
    found.sources.append(source)
    if any(isinstance(part, FlatFolder) and part.split == "val" and part.labels is None for part in kept):
        found.waiting.append(source)
