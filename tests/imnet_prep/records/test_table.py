"""The table of a split's records, read from indexes and the record list."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imnet_prep.errors import PipelineError, RecordsError
from imnet_prep.records.manifest import MANIFEST, load_manifest
from imnet_prep.records.record_list import RECORDS
from imnet_prep.records.table import RowReader, RowTable, load_rows
from imnet_prep.types import record_id
from tests.imnet_prep.obstacles import make_fifo, no_hang
from tests.records import Entry, rewrite_list, write_folder
from tests.synthetic import encode, picture

NAMES = ("n0/plain.JPEG", 'n1/with "quotes" and \\.JPEG', "n2/日本語 spaces.JPEG", "n0/b.JPEG", "n1/c.JPEG")


@pytest.fixture
def rows() -> list[Entry]:
    return [(name, number % 3, encode(picture(number, 0, 20, 20))) for number, name in enumerate(NAMES)]


@pytest.fixture
def records(tmp_path: Path, rows: list[Entry]) -> Path:
    return write_folder(tmp_path / "records", {"train": rows}, shards=2)


def _load(records: Path) -> RowTable:
    return load_rows(records, load_manifest(records), "train")


def test_every_record_has_its_label_id_and_bytes(records: Path, rows: list[Entry]) -> None:
    table = _load(records)
    assert table.ids.tolist() == [record_id("train", name) for name, _, _ in rows]
    assert table.label.tolist() == [label for _, label, _ in rows]
    reader = RowReader(table)
    for position, (name, _, data) in enumerate(rows):
        assert reader.image(position) == data
        assert reader.matches(position, data)
        assert not reader.matches(position, data + b"\0")
        path, row = table.files[table.shard[position]], table.row[position]
        assert reader.where(position) == f"{path}: row {row} ({name})"
    reader.close()
    assert reader.image(1) == rows[1][2]


def test_a_record_of_a_lost_shard_is_named_by_the_list(records: Path) -> None:
    reader = RowReader(_load(records))
    for path in (records / "train").glob("*.mindrecord"):
        path.unlink()
    assert [name in reader.where(position) for position, name in enumerate(NAMES)] == [True] * len(NAMES)
    (records / "train" / RECORDS).unlink()
    assert "file_name unreadable" in reader.where(0)


def test_a_list_in_another_json_layout_reads_the_same(records: Path) -> None:
    expected = _load(records)
    rewrite_list(records, lambda lines: [json.dumps(dict(reversed(json.loads(line).items()))) for line in lines])
    found = _load(records)
    assert expected.width.all()
    for name in ("ids", "digest", "shard", "row", "label", "width", "height"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_width_and_height_come_from_the_list_and_are_0_where_it_does_not_say(records: Path) -> None:
    said: list[dict[str, object]] = [
        {"width": 640, "height": 480},
        {"width": 0, "height": 0, "changes": ["greyscale", "progressive"], "meta": {"a": '},"row":9,\\', "b": 1.5}},
        {"width": 7, "height": 65500, "url": "http://here/a.jpg", "status": 200, "changes": ["cmyk"]},
        {"width": None, "height": 5},
        {"width": 30, "height": 40, "zebra": "a key of a later version", "meta": {"a": {"width": 9}, "b": [1]}},
    ]

    def change(lines: list[str]) -> list[str]:
        values = [{**json.loads(line), **new} for line, new in zip(lines, said, strict=True)]
        return [
            json.dumps(
                {key: value for key, value in one.items() if value is not None}, sort_keys=True, separators=(",", ":")
            )
            for one in values
        ]

    rewrite_list(records, change)
    table = _load(records)
    assert table.width.tolist() == [640, 0, 7, 0, 30]
    assert table.height.tolist() == [480, 0, 65500, 5, 40]
    assert table.width.dtype == table.height.dtype == np.int32


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
        (lambda lines: [*lines[:2], lines[2].replace('"width":20', '"width":20000000000')], "line 3 is damaged"),
        (lambda lines: [*lines[:2], lines[2].replace('"width":20', '"width":-1')], "line 3 is damaged"),
        (lambda lines: [*lines[:2], lines[2].replace('"label":2', '"label":4294967298')], "line 3 is damaged"),
        (lambda lines: [lines[0].replace("plain", "b"), *lines[1:]], "same name"),
        (lambda _: [], "short"),
    ],
)
def test_a_list_that_contradicts_the_shards_is_refused(
    records: Path, change: Callable[[list[str]], list[str]], named: str
) -> None:
    path = rewrite_list(records, change)
    with pytest.raises(RecordsError, match=named) as caught:
        _load(records)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("label", ["'cat'", "NULL", "1.5"])
def test_an_index_whose_labels_are_no_numbers_is_refused(records: Path, label: str) -> None:
    index = min((records / "train").glob("*.db"))
    index.chmod(0o600)
    with sqlite3.connect(index) as connection:
        column = next(row[1] for row in connection.execute("PRAGMA table_info(INDEXES)") if "label" in row[1])
        connection.execute(f"UPDATE INDEXES SET {column} = {label}")
    connection.close()
    with pytest.raises(RecordsError, match=index.name):
        _load(records)


def test_an_index_that_leads_outside_the_shard_is_refused(records: Path) -> None:
    index = min((records / "train").glob("*.db"))
    index.chmod(0o600)
    with sqlite3.connect(index) as connection:
        connection.execute("UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = 1 << 50")
    connection.close()
    with pytest.raises(RecordsError, match=index.name):
        _load(records)


def test_an_index_that_is_no_database_is_refused(records: Path) -> None:
    index = min((records / "train").glob("*.db"))
    index.chmod(0o600)
    index.write_bytes(b"no database" * 1000)
    with pytest.raises(RecordsError, match=index.name):
        _load(records)


@pytest.mark.parametrize("name", [RECORDS, "train-00001-of-00002.mindrecord", "train-00001-of-00002.mindrecord.db"])
def test_a_fifo_in_place_of_a_file_is_an_error_not_a_hang(records: Path, name: str) -> None:
    path = records / "train" / name
    path.unlink()
    make_fifo(path)
    with no_hang(60), pytest.raises(RecordsError, match=name):
        _load(records)


def test_a_fifo_in_place_of_an_opened_shard_is_an_error_not_a_hang(records: Path) -> None:
    reader = RowReader(_load(records))
    path = records / "train" / "train-00000-of-00002.mindrecord"
    path.unlink()
    make_fifo(path)
    with no_hang(60):
        reader.will_need(np.arange(len(NAMES)))
        with pytest.raises(PipelineError, match="not a regular file"):
            reader.image(0)
        assert NAMES[0] in reader.where(0)


def test_128_shards_are_read_with_80_open_files(tmp_path: Path, rows: list[Entry]) -> None:
    folder = write_folder(tmp_path / "records", {"train": rows[:1]}, shards=1)
    manifest = load_manifest(folder)
    split = manifest.splits["train"]
    path = folder / split.shards[0].file
    names = [f"train/train-{number:05d}-of-00128.mindrecord" for number in range(128)]
    for name in names:
        (folder / name).hardlink_to(path)
        (folder / f"{name}.db").hardlink_to(path.with_name(path.name + ".db"))
    shards = tuple(replace(split.shards[0], file=name) for name in names)
    many = replace(split, found=128, images=128, class_counts=(128, 0, 0), shards=shards)
    (folder / MANIFEST).write_bytes(replace(manifest, splits={"train": many}).to_bytes())

    def change(lines: list[str]) -> list[str]:
        line = json.loads(lines[0])
        return [json.dumps({**line, "shard": number, "file_name": f"n0/{number}.JPEG"}) for number in range(128)]

    rewrite_list(folder, change)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))\n"
        "import numpy as np; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "from imnet_prep.records.manifest import load_manifest; from imnet_prep.records.table import *\n"
        "table = load_rows(folder, load_manifest(folder), 'train'); reader = RowReader(table)\n"
        "reader.will_need(np.arange(128)); found = [reader.image(position) for position in range(128)]\n"
        "print(len(found), len(set(found)), len(set(table.shard.tolist())))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "128 1 128\n"), done.stderr
