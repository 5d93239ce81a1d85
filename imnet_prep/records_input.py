"""Records folders as sources: each record's line and the place of its image, checked against the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from imnet_prep.errors import IntegrityError, PlanError, RecordsError
from imnet_prep.records.manifest import REJECTED, Manifest, RecordLine, SplitInfo, read_records
from imnet_prep.records.mindrecord import LENGTH, Shard
from imnet_prep.types import ImageRef, Rejected
from imnet_prep.verify import check_shard
from imnet_prep.verify_rows import IMAGE_FIELDS


@dataclass(frozen=True, slots=True)
class Input:
    """A records folder and its manifest."""

    folder: Path
    manifest: Manifest


def read_renames(path: Path | None) -> dict[str, str]:
    """Read lines of ``old<TAB>new`` class names; nothing where there is no file.

    Raises:
        PlanError: It cannot be read, or is not such a list.
    """
    if path is None:
        return {}
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read as a list of renamed classes", got=str(error)) from error
    pairs = [tuple(part.strip() for part in line.split("\t")) for line in lines]
    wrong = next((line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2 or not all(pair)), None)
    if wrong is not None or len({pair[0] for pair in pairs}) != len(pairs) or not pairs:
        raise PlanError(f"{path}: not a list of renamed classes", expected="lines of old<TAB>new", got=wrong or "twice")
    return {pair[0]: pair[1] for pair in pairs}


def records_of(item: Input, renames: dict[str, str]) -> Iterator[tuple[RecordLine, ImageRef]]:
    """Give the records of a folder with the place of each image in its shard.

    Raises:
        IntegrityError: The folder is not what its manifest says.
    """
    for name, split in item.manifest.splits.items():
        for number, lines in _by_shard(item, name, split):
            path = item.folder / split.shards[number].file
            with Shard(path) as shard:
                field = next((field for field in IMAGE_FIELDS if field in shard.header.blob_fields), "")
                for line in lines:
                    start, size = _image_place(shard, line.row, field)
                    yield line, _ref(item, name, line, path, start, size, renames)


def _by_shard(item: Input, name: str, split: SplitInfo) -> Iterator[tuple[int, Iterator[RecordLine]]]:
    """Give the lines of each shard, to be read to their end; every shard is whole by its manifest.

    Raises:
        IntegrityError: It is not so.
    """
    records = read_records(item.folder, split)
    for number, shard in enumerate(split.shards):
        problems = check_shard(item.folder, item.manifest, split, shard)
        if problems:
            raise _damaged(item, problems[0].to_line())
        yield number, _rows_of(item, split, records, number)
    if next(records, None) is not None:
        raise _damaged(item, f"{split.records['file']}: lists more rows than split {name} has")


def _rows_of(item: Input, split: SplitInfo, records: Iterator[RecordLine], number: int) -> Iterator[RecordLine]:
    row = 0
    for row, line in enumerate(islice(records, split.shards[number].rows), 1):
        if (line.shard, line.row) != (number, row - 1):
            break
        yield line
    else:
        if row == split.shards[number].rows:
            return
    raise _damaged(item, f"{split.records['file']}: does not list the rows of {split.shards[number].file}")


def _damaged(item: Input, got: str) -> IntegrityError:
    remedy = "`imnet-prep verify` lists what is damaged, `imnet-prep repair-index` mends what can be"
    return IntegrityError(f"{item.folder}: is not what its manifest says", got=got, remedy=remedy)


def _image_place(shard: Shard, row: int, field: str) -> tuple[int, int]:
    """First byte and size of a row's image in its file; of several blobs, the lengths of those before are read."""
    start, end = int(shard.index.blob_start[row]), int(shard.index.blob_end[row])
    fields = shard.header.blob_fields
    if len(fields) == 1:
        return start + LENGTH.size, end - start - LENGTH.size
    blobs = shard.blobs(row)
    for name in fields:
        if name == field:
            return start + LENGTH.size, len(blobs[name])
        start += LENGTH.size + len(blobs[name])
    raise RecordsError(f"{shard.path}: no column with images", expected=" or ".join(IMAGE_FIELDS), got=str(fields))


def _ref(
    item: Input, split: str, line: RecordLine, path: Path, start: int, size: int, renames: dict[str, str]
) -> ImageRef:
    class_name, slash, base = line.file_name.rpartition("/")
    if (line.label >= 0 and item.manifest.classes[line.label] != class_name) or bool(slash) != (line.label >= 0):
        raise _damaged(item, f"{path.name} row {line.row} ({line.file_name}): label {line.label} is another class")
    renamed = renames.get(class_name, class_name)
    return ImageRef(split, renamed, f"{renamed}{slash}{base}", str(path), start, size, line.url, line.status)


def rejected_of(item: Input, renames: dict[str, str]) -> Iterator[Rejected]:
    """Give what was rejected when the folder was made."""
    path = item.folder / REJECTED
    if not item.manifest.rejected or not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            values = json.loads(line)
            class_name, slash, base = values["file_name"].rpartition("/")
            values["file_name"] = f"{renames.get(class_name, class_name)}{slash}{base}"
            yield Rejected.from_json(values)
