"""Recognize the layout of each source by its content first, then by its name."""

from collections.abc import Sequence
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile
from imnet_prep.sources.archives import (
    ClassTar,
    Devkit,
    FlatTar,
    NestedTar,
    ends_in_zeros,
    peek,
)
from imnet_prep.sources.base import Source, is_image_name
from imnet_prep.sources.folder_layout import DEVKIT_ARCHIVE, devkit, folder_sources
from imnet_prep.sources.folders import FolderSource
from imnet_prep.sources.labels import KAGGLE_SOLUTION, read_kaggle_solution
from imnet_prep.sources.zip import ClassZip
from imnet_prep.types import SPLITS

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


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
                labelled = any(isinstance(source, Devkit) for source in sources)
                sources += folder_sources(path, split or "", labelled, _file)
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
    waiting = [
        source for source in sources if isinstance(source, FlatTar | FolderSource | ClassZip) and source.unlabelled()
    ]
    known = [source.labels for source in sources if isinstance(source, Devkit)]
    if waiting and not known:
        raise SourceError(
            f"{waiting[0].path}: validation images without class folders need their labels",
            expected=f"{DEVKIT_ARCHIVE}, its unpacked folder, or {KAGGLE_SOLUTION} among the sources",
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
        return devkit(path)
    if (start[:2] == b"PK" or path.suffix.lower() == ".zip") and start[257:262] != b"ustar":
        return ClassZip(path, split)
    if start[:2] in _COMPRESSED and start[257:262] != b"ustar":
        raise SourceError(
            f"{path} is compressed ({_COMPRESSED[start[:2]]})",
            expected="a folder or an uncompressed tar, whose images can be read in place",
            remedy="unpack it and give the folder",
        )
    if is_image_name(path.name):
        raise SourceError(f"{path} is one image", expected="a folder or archive of class folders")
    return _tar(path, split)


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
