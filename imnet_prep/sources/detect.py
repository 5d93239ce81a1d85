"""Recognize the layout of each source by its content first, then by its name."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile, is_disk_full
from imnet_prep.remote import RemoteFile, base_name, is_url, list_files, look_up, shown
from imnet_prep.sources.archives import (
    ClassTar,
    Devkit,
    FlatTar,
    NestedTar,
    ends_in_zeros,
    peek,
)
from imnet_prep.sources.base import Source, is_hidden, is_image_name, printable
from imnet_prep.sources.folder_layout import DEVKIT_ARCHIVE, devkit, folder_sources
from imnet_prep.sources.folders import FolderSource
from imnet_prep.sources.foreign import START_BYTES, refuse_foreign
from imnet_prep.sources.labels import KAGGLE_SOLUTION, read_kaggle_solution
from imnet_prep.sources.parquet import ParquetSource, find_files, shards_of
from imnet_prep.sources.staging import COMPRESSED, Staging
from imnet_prep.sources.zip import ClassZip
from imnet_prep.types import SPLITS

_ZSTD = b"\x28\xb5\x2f\xfd"
_REMOTE_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
_REMOTE_ENDINGS = (*_REMOTE_ARCHIVES, ".csv", ".txt", ".json", ".parquet")


def detect(
    paths: Sequence[Path | str],
    split: str | None = None,
    staging: Staging | None = None,
    classes: Sequence[str] = (),
    *,
    salvage: bool = False,
) -> list[Source]:
    """Recognize the layout of each path.

    Args:
        paths: Folders, archives and URLs of archives, in any order and mix.
        split: Selects one split of a source that has several, and names the split of one that does not tell it.
        staging: Where to bring what cannot be read in place; None refuses it.
        classes: Names in label order for the classes of sources that number them, or none.
        salvage: Leave out the damaged stretches of archives; else they are errors.

    Returns:
        One source per path (more for a folder of official archives), in the order of the paths.

    Raises:
        SourceError: A path is missing, empty, cut, or of no known layout; the message says which in one line.
        RemoteError: A URL cannot be read.
    """
    if split is not None and split not in SPLITS:
        raise SourceError(f"no split is called {split}", expected=" or ".join(SPLITS), got=split)
    if not paths:
        raise SourceError("no source was given", expected="a folder or archive of images")
    sources: list[Source] = []
    for given in paths:
        path, labelled = Path(given), any(isinstance(source, Devkit) for source in sources)
        try:
            if isinstance(given, str) and is_url(given):
                sources += _remote(given, split or "", labelled, _needed(staging, given))
            elif path.is_dir():
                sources += _folder(path, split or "", labelled, staging)
            elif path.is_file():
                sources.append(_file(path, split or "", staging))
            elif path.exists():
                raise SourceError(f"{path} is neither a folder nor a file")
            else:
                raise SourceError(f"{path} does not exist", remedy="check the path")
        except OSError as error:
            if is_disk_full(error):
                raise
            raise SourceError(f"{error.filename or path} cannot be read", got=error.strerror or str(error)) from error
    for source in sources:
        source.classes, source.salvage = classes, salvage
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


def _needed(staging: Staging | None, path: Path | str) -> Staging:
    if staging is None:
        raise SourceError(
            f"{path} cannot be read in place", expected="a folder or an uncompressed archive", remedy="unpack it"
        )
    return staging


def _staged(place: Path | RemoteFile, split: str, staging: Staging) -> Source:
    """Bring a file and recognize its content."""
    staged = staging.bring(place)
    with staged.named():
        source = _file(staged.path, split, None)
    source.staged, source.name = staged, printable(staged.name)
    return source


# --- URLs ------------------------------------------------------------------------------------------------------------


def _remote(url: str, split: str, labelled: bool, staging: Staging) -> list[Source]:
    """Recognize what is behind a URL: a file, or a folder of Parquet files or of archives."""
    file = look_up(url)
    if file is not None and not file.name.lower().endswith(".parquet"):
        return [_staged(file, split, staging)]
    files = {file.name: file} if file is not None else list_files(url)
    files = {name: place for name, place in files.items() if not any(map(is_hidden, name.split("/")))}
    given = shown(url)
    parquet = [(name, place) for name, place in files.items() if name.lower().endswith(".parquet")]
    if parquet and not any("/" not in name and name.endswith(".tar") for name in files):  # else they describe the tars
        shards = shards_of(parquet, given, split, one=file is not None)
        staging.folder.mkdir(parents=True, exist_ok=True)
        source = ParquetSource(staging.folder, given, shards, split, staging)
        source.beside = sorted(name for name in files if name.lower().endswith(_REMOTE_ARCHIVES))
        return [source]
    archives = {
        name: place for name, place in files.items() if "/" not in name and name.lower().endswith(_REMOTE_ENDINGS)
    }
    if not archives or any(map(is_image_name, files)):
        raise SourceError(
            f"{given} is a folder without Parquet files or archives",
            expected="these; single images are not read from a URL",
            got=", ".join(sorted(files)[:5]) or "nothing",
            remedy="pack them into a tar, or copy the folder and give that",
        )
    if further := sorted(name for name in files if "/" in name and name.lower().endswith(_REMOTE_ARCHIVES)):
        raise SourceError(
            f"{given} is a folder of archives, and others further down",
            expected="all of them in the folder itself",
            got=", ".join(further[:5]),
            remedy="give each folder as a source of its own",
        )
    folder = staging.bring_all(base_name(url) or "source", archives)
    return folder_sources(folder, split, labelled, partial(_file, staging=staging))


# --- files and folders ------------------------------------------------------------------------------------------


def _file(path: Path, split: str, staging: Staging | None) -> Source:
    start = PlainFile(path).read(START_BYTES, 0)
    if not start:
        raise SourceError(f"{path} is empty", expected="an archive of images", got="0 bytes")
    if path.name.endswith(".csv") and b"ILSVRC2012_val_" in start:
        return Devkit(path, "kaggle-val-solution", read_kaggle_solution(path))
    if "devkit" in path.name or path.name == "meta.mat":
        return devkit(path)
    refuse_foreign(path, start)
    if (start[:2] == b"PK" or path.suffix.lower() == ".zip") and start[257:262] != b"ustar":
        return ClassZip(path, split)
    if start.startswith(tuple(COMPRESSED)) and start[257:262] != b"ustar":
        return _staged(path, split, _needed(staging, path))
    if start.startswith(_ZSTD) and start[257:262] != b"ustar":
        raise SourceError(
            f"{path} is compressed (zstd)", expected="a tar, or one in gzip, bzip2 or xz", remedy="unzstd it"
        )
    if start.startswith(b"PAR1"):
        shards = shards_of([(path.name, path)], str(path), split, one=True)
        return ParquetSource(path, str(path), shards, split, _needed(staging, path))
    if is_image_name(path.name):
        raise SourceError(f"{path} is one image", expected="a folder or archive of class folders")
    return _tar(path, split)


def _folder(path: Path, split: str, labelled: bool, staging: Staging | None) -> list[Source]:
    if files := find_files(path):
        return [ParquetSource(path, str(path), shards_of(files, str(path), split), split, _needed(staging, path))]
    return folder_sources(path, split, labelled, partial(_file, staging=staging))


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
