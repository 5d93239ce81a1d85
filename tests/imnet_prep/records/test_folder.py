"""A records folder opened for reading, and scans over it: every record once and in stored order."""

from __future__ import annotations

import gzip
import hashlib
from functools import partial
from pathlib import Path

import pytest

from imnet_prep.errors import RecordsError
from imnet_prep.records.folder import CHUNK_ROWS, RecordsFolder, Row, map_rows
from imnet_prep.records.mindrecord import index_path
from imnet_prep.types import Progress
from tests.imnet_prep.obstacles import make_fifo
from tests.records import copy, make_records, quiet

Seen = tuple[int, str, str, int, str, str]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    per_class = {"train": 250, "val": 7}  # more than one chunk of rows in a shard
    return make_records(tmp_path_factory.mktemp("folder"), classes=5, per_class=per_class, shards=2)


def look(prefix: str, row: Row) -> Seen:
    """What a row says of itself."""
    line = row.line()
    assert line.sha256 == hashlib.sha256(row.image).hexdigest()
    assert line.file_name == row.name == row.fields["file_name"]
    return row.position, row.split, row.file, row.row, prefix + row.name, line.sha256


def fail(row: Row) -> str:
    """What a row that cannot be read says of itself."""
    try:
        return hashlib.sha256(row.image).hexdigest()
    except RecordsError as error:
        return type(error).__name__


@pytest.mark.parametrize("workers", [1, 2])
def test_every_record_once_in_stored_order(records: Path, workers: int) -> None:
    folder = RecordsFolder.open(records)
    told: list[Progress] = []
    seen = list(map_rows(folder, partial(look, "x"), workers, told.append, lines=True))
    assert folder.records > 2 * CHUNK_ROWS
    assert [row[0] for row in seen] == list(range(folder.records))
    listed = [(split, line) for split in folder.manifest.splits for line in folder.lines(split)]
    assert [(split, f"x{line.file_name}", line.sha256) for split, line in listed] == [(s[1], *s[4:]) for s in seen]
    assert told[-1].done == told[-1].total == folder.records
    assert told[-1].bytes_done == sum(len(folder.row(place).image) for place in range(folder.records))


def test_a_position_is_a_place(records: Path) -> None:
    folder = RecordsFolder.open(records)
    span = folder.span("val")
    assert (span.start, span.stop) == (1250, 1285)
    first, last = folder.row(span.start), folder.row(folder.records - 1)
    assert (first.split, first.shard, first.row, first.file) == ("val", 0, 0, folder.shards[2][2].file)
    assert last.row == folder.shards[-1][2].rows - 1
    assert first.name.split("/")[0] == folder.manifest.classes[first.label]


def test_rows_of_a_shard_without_index_are_read_by_its_pages(records: Path, tmp_path: Path) -> None:
    damaged = copy(records, tmp_path / "records")
    index_path(damaged / RecordsFolder.open(records).shards[0][2].file).unlink()
    assert list(map_rows(RecordsFolder.open(damaged), fail, 1, quiet)) == list(
        map_rows(RecordsFolder.open(records), fail, 1, quiet)
    )


def test_a_shard_that_is_gone_costs_its_own_rows(records: Path, tmp_path: Path) -> None:
    damaged = copy(records, tmp_path / "records")
    folder = RecordsFolder.open(damaged)
    lost = folder.shards[0][2]
    (damaged / lost.file).unlink()
    found = list(map_rows(folder, fail, 1, quiet))
    assert found[: lost.rows] == ["RecordsError"] * lost.rows
    assert "RecordsError" not in found[lost.rows :]
    row = folder.row(0)
    assert (row.name, row.label, row.size_bytes) == (f"{lost.file} row 0", None, 0)


@pytest.mark.parametrize("damage", ["cut", "garbled", "short", "long", "moved", "FIFO", "gone"])
def test_a_record_list_that_is_not_the_shards_is_refused(records: Path, tmp_path: Path, damage: str) -> None:
    damaged = copy(records, tmp_path / "records")
    folder = RecordsFolder.open(damaged)
    path = folder.list_path("train")
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    data = {
        "cut": path.read_bytes()[:-100],
        "garbled": gzip.compress(b"".join([*lines[:3], b"{not json\n", *lines[4:]])),
        "short": gzip.compress(b"".join(lines[:-1])),
        "long": gzip.compress(b"".join([*lines, lines[-1]])),
        "moved": gzip.compress(b"".join([lines[1], lines[0], *lines[2:]])),
    }
    path.unlink()
    if damage == "FIFO":
        make_fifo(path)
    elif damage != "gone":
        path.write_bytes(data[damage])
    assert not folder.list_is_whole("train")
    with pytest.raises(RecordsError, match=r"records\.jsonl\.gz"):
        list(folder.lines("train"))
    assert len(list(folder.lines("val"))) == 35
    seen = list(map_rows(folder, fail, 1, quiet, lines=True))  # the rows are scanned all the same
    assert len(seen) == folder.records
    assert "RecordsError" not in seen
