"""The table of a split's records, read from indexes and the record list."""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imnet_prep.errors import RecordsError
from imnet_prep.records.manifest import RECORDS, load_manifest, write_records
from imnet_prep.records.table import RowReader, RowTable, load_rows
from imnet_prep.types import record_id
from tests.imnet_prep.pipeline_records import Entry, jpeg, picture, write_folder

NAMES = ("n0/plain.JPEG", 'n1/with "quotes" and \\.JPEG', "n2/日本語 spaces.JPEG", "n0/b.JPEG", "n1/c.JPEG")


@pytest.fixture
def rows() -> list[Entry]:
    return [(name, number % 3, jpeg(picture(number, 20, 20))) for number, name in enumerate(NAMES)]


@pytest.fixture
def records(tmp_path: Path, rows: list[Entry]) -> Path:
    return write_folder(tmp_path / "records", {"train": rows}, shards=2)


def _load(records: Path) -> RowTable:
    return load_rows(records, load_manifest(records), "train")


def _rewrite(records: Path, change: Callable[[list[str]], list[str]]) -> Path:
    path = records / "train" / RECORDS
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    write_records(path, change(lines))
    return path


def test_every_record_has_its_label_id_and_bytes(records: Path, rows: list[Entry]) -> None:
    table = _load(records)
    assert table.ids.tolist() == [record_id("train", name) for name, _, _ in rows]
    assert table.label.tolist() == [label for _, label, _ in rows]
    reader = RowReader(table)
    for position, (name, _, data) in enumerate(rows):
        assert reader.image(position) == data
        assert reader.matches(position, data)
        assert not reader.matches(position, data + b"\0")
        assert reader.file_name(position) == name
    reader.close()
    reader.close()


def test_a_list_in_another_json_layout_reads_the_same(records: Path) -> None:
    expected = _load(records)
    _rewrite(records, lambda lines: [json.dumps(dict(reversed(json.loads(line).items()))) for line in lines])
    found = _load(records)
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.digest, expected.digest)


def test_a_label_that_the_index_lacks_comes_from_the_list(records: Path, rows: list[Entry]) -> None:
    for index in (records / "train").glob("*.db"):
        index.chmod(0o600)
        with sqlite3.connect(index) as connection:
            column = next(row[1] for row in connection.execute("PRAGMA table_info(INDEXES)") if "label" in row[1])
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE ?", (f"%{column}%",)
            ).fetchall():
                connection.execute(f'DROP INDEX "{name}"')
            connection.execute(f"ALTER TABLE INDEXES RENAME COLUMN {column} TO other_0")
        connection.close()
    assert _load(records).label.tolist() == [label for _, label, _ in rows]


def _other_label(lines: list[str]) -> list[str]:
    return [lines[0].replace('"label":0', '"label":1'), *lines[1:]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda lines: lines[:-1], "short"),
        (lambda lines: [*lines, lines[-1]], "other records"),
        (lambda lines: lines[::-1], "other records"),
        (_other_label, "other records"),
        (lambda lines: [*lines[:2], "{}", *lines[3:]], "line 3 is damaged"),
        (lambda lines: [*lines[:2], "not json", *lines[3:]], "line 3 is damaged"),
        (lambda lines: [lines[0].replace("plain", "b"), *lines[1:]], "same name"),
        (lambda _: [], "short"),
    ],
)
def test_a_list_that_contradicts_the_shards_is_refused(
    records: Path, change: Callable[[list[str]], list[str]], named: str
) -> None:
    path = _rewrite(records, change)
    with pytest.raises(RecordsError, match=named) as caught:
        _load(records)
    assert path.name in str(caught.value)


def test_an_index_that_leads_outside_the_shard_is_refused(records: Path) -> None:
    index = next((records / "train").glob("*.db"))
    index.chmod(0o600)
    with sqlite3.connect(index) as connection:
        connection.execute("UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = 1 << 50")
    connection.close()
    with pytest.raises(RecordsError, match=index.name):
        _load(records)


def test_an_index_that_is_no_database_is_refused(records: Path) -> None:
    index = next((records / "train").glob("*.db"))
    index.chmod(0o600)
    index.write_bytes(b"no database" * 1000)
    with pytest.raises(RecordsError, match=index.name):
        _load(records)
