"""Find the MindRecord files of a folder without a manifest, and check that they belong together."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from imnet_prep.errors import RecordsError
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import Manifest, SplitInfo
from imnet_prep.records.mindrecord import Header, Shard, index_from_data, index_path, read_header
from imnet_prep.types import SPLITS, ShardInfo

_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z._-]*")  # manifests/records.schema.json
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test|testing)(?![a-z])", re.IGNORECASE)
_OTHERS = frozenset({".db", ".json", ".jsonl", ".gz", ".txt", ".md", ".csv", ".html", ".png"})


class _File(NamedTuple):
    split: str
    path: Path
    header: Header
    info: ShardInfo


def find_records(folder: Path, split: str) -> tuple[RecordsFolder, list[Path], list[str]]:
    """Find the data files in a folder and in its ``train``, ``val`` and ``test`` folders.

    Args:
        folder: The folder.
        split: The split of files for which neither the folder nor a name tells it.

    Returns:
        A records folder with a draft manifest, which holds what is known before the records are read; the data files
        without an index; and notes on what was left out or is missing.

    Raises:
        RecordsError: There are no data files, a part is missing or damaged, or MindSpore cannot read them together.
    """
    bare: list[Path] = []
    found: list[_File] = []
    notes: list[str] = []
    for place in (folder, *(folder / name for name in SPLITS)):
        for path in sorted(place.iterdir() if place.is_dir() else [], key=_natural):
            if path.is_dir() or path.suffix in _OTHERS or path.name.startswith("."):
                continue
            try:
                header = read_header(path)
            except RecordsError:
                if os.path.lexists(index_path(path)) or ".mindrecord" in path.name:
                    raise
                continue
            _check_name(path, header)
            if not header.pages:
                notes.append(f"{path.name}: has no rows, left out")
                continue
            if not (indexed := os.path.lexists(index_path(path))):
                notes.append(f"{path.name}: has no index, a new one is written")
                bare.append(path)
            rows = len(Shard(path) if indexed else index_from_data(path, header))
            info = ShardInfo(path.relative_to(folder).as_posix(), rows, path.stat().st_size, "", 0, "")
            mine = place.name if place != folder else _split_of(path, folder) or split
            found.append(_File(mine, path, header, info))
    if not found:
        raise RecordsError(f"{folder}: has no MindRecord files", expected="files written by MindSpore's FileWriter")
    columns = _check_together(found)
    splits = {name: _draft(files) for name in SPLITS if (files := [file for file in found if file.split == name])}
    return RecordsFolder(folder, Manifest((), (), "", "", 0, {}, (), {}, "", splits, columns)), bare, notes


def _draft(files: Sequence[_File]) -> SplitInfo:
    rows, header = sum(file.info.rows for file in files), files[0].header
    shards = tuple(file.info for file in files)
    return SplitInfo(rows, rows, {}, {}, 0, (), header.header_size, header.page_size, {}, shards)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts ``x.mindrecord10`` after ``x.mindrecord9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _split_of(path: Path, folder: Path) -> str:
    for name in (path.name, folder.resolve().name):
        words = {word.lower()[:3] for word in _SPLIT_WORD.findall(name)}
        if len(words) == 1:
            return {"tra": "train", "val": "val", "tes": "test"}[words.pop()]
    return ""


def _check_name(path: Path, header: Header) -> None:
    if not _NAME.fullmatch(path.name):
        raise RecordsError(
            f"{path}: has a name that a manifest cannot list", expected="letters, digits, '.', '_' and '-'"
        )
    if path.name not in header.addresses:
        raise RecordsError(
            f"{path}: was renamed, and MindSpore cannot open it",
            expected=f"the name {next(iter(header.addresses), '')}",
        )


def _check_together(found: Sequence[_File]) -> dict[str, str]:
    """Check that MindSpore can read the files together and that they have images and labels; return the columns."""
    first = found[0]
    columns = first.header.fields
    for split, path, header, _ in found:
        if missing := [name for name in header.addresses if not (path.parent / name).is_file()]:
            raise RecordsError(f"{path}: belongs to files that are missing", expected=", ".join(missing[:5]))
        if (header.fields, header.blob_fields) != (columns, first.header.blob_fields):
            raise RecordsError(
                f"{path}: has other columns than {first.path.name}", expected=str(columns), got=str(header.fields)
            )
        same_split = next(other.header for other in found if other.split == split)
        wanted, got = ((other.header_size, other.page_size) for other in (same_split, header))
        if wanted != got:
            raise RecordsError(f"{path}: has other page sizes", expected=str(wanted), got=str(got))
    if not first.header.blob_fields:
        raise RecordsError(f"{first.path}: no column of images", expected="a bytes column", got=str(columns))
    if not columns.get("label", "").startswith("int"):
        raise RecordsError(f"{first.path}: no column of labels", expected="an int column `label`", got=str(columns))
    return columns
