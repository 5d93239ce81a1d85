"""Our shards are MindSpore's: byte for byte its FileWriter's, and read by its readers."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep.errors import RecordsError
from imnet_prep.records.mindrecord import Shard, index_from_data, index_path, read_header, read_index
from imnet_prep.records.shards import Layout, ShardWriter, read_back

os.environ.setdefault("GLOG_v", "3")
Row = dict[str, Any]


def rows(count: int, low: int, high: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.bytes(int(rng.integers(low, high))),
            "label": int(rng.integers(0, 1000)),
            "file_name": f"n{k % 7:08d}/é {k}.JPEG",
        }
        for k in range(count)
    ]


def write(path: Path, data: list[Row], layout: Layout) -> Path:
    writer = ShardWriter(path, layout)
    for row in data:
        writer.add(row["image"], row["label"], row["file_name"])
    read_back(path, f"train/{path.name}", writer.finish())
    return path


def write_by_mindspore(path: Path, data: list[Row], layout: Layout) -> Path:
    FileWriter = pytest.importorskip("mindspore.mindrecord").FileWriter

    writer = FileWriter(str(path), 1)
    writer.set_header_size(layout.header_size)
    writer.set_page_size(layout.page_size)
    schema = {"image": {"type": "bytes"}, "label": {"type": "int32"}, "file_name": {"type": "string"}}
    writer.add_schema(schema, "imagenet")
    writer.add_index(["label"])
    writer.write_raw_data(data)
    writer.commit()
    return path


@pytest.mark.parametrize(
    ("count", "low", "high", "page"),
    [
        (1, 1, 2, 1 << 15),
        (3000, 1, 20, 1 << 15),  # several raw pages
        (500, 100, 2000, 1 << 15),
        (200, 1000, 20_000, 1 << 18),
        (40, 32_000, 32_760, 1 << 15),  # a page a row
        (1, (1 << 15) - 8, (1 << 15) - 7, 1 << 15),  # a row that fills its page
    ],
)
def test_data_file_is_what_filewriter_makes(tmp_path: Path, count: int, low: int, high: int, page: int) -> None:
    layout, data = Layout(1 << 16, page), rows(count, low, high)
    (tmp_path / "a").mkdir()
    ours = write(tmp_path / "a" / "x.mindrecord", data, layout)
    theirs = write_by_mindspore(tmp_path / "x.mindrecord", data, layout)
    assert ours.read_bytes() == theirs.read_bytes()
    query = "SELECT * FROM INDEXES ORDER BY ROW_ID"
    found = []
    for path in (ours, theirs):
        connection = sqlite3.connect(index_path(path))
        found.append(connection.execute(query).fetchall())
        connection.close()
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Row]]:
    """Three shards in a folder with an awkward name, and all their rows."""
    folder = tmp_path_factory.mktemp("ü 空 100%#?'")
    parts = [rows(60, 10, 3000, seed) for seed in range(3)]
    for number, part in enumerate(parts):
        for row in part:
            row["file_name"] = f"{number}/{row['file_name']}"
    paths = [write(folder / f"s-{k}.mindrecord", part, Layout(1 << 14, 1 << 15)) for k, part in enumerate(parts)]
    return paths, [row for part in parts for row in part]


def as_tuple(row: Row) -> tuple[bytes, int, str]:
    return np.asarray(row["image"]).tobytes(), int(row["label"]), str(row["file_name"])


def test_mindspore_reads_all_shards(shards: tuple[list[Path], list[Row]]) -> None:
    ds = pytest.importorskip("mindspore.dataset")

    paths, data = shards
    dataset = ds.MindDataset([str(path) for path in paths], shuffle=False)
    read = [as_tuple(row) for row in dataset.create_dict_iterator(output_numpy=True, num_epochs=1)]
    assert read == [(row["image"], row["label"], row["file_name"]) for row in data]


def test_mindspore_deals_shards_to_ranks(shards: tuple[list[Path], list[Row]]) -> None:
    ds = pytest.importorskip("mindspore.dataset")

    paths, data = shards
    seen = []
    for rank in range(2):
        part = ds.MindDataset([str(path) for path in paths], num_shards=2, shard_id=rank, shuffle=False)
        seen += [str(row["file_name"]) for row in part.create_dict_iterator(output_numpy=True, num_epochs=1)]
    assert sorted(seen) == sorted(row["file_name"] for row in data)


def test_mindspore_samples_by_label_as_from_its_own_files(tmp_path: Path) -> None:
    ds = pytest.importorskip("mindspore.dataset")

    data, layout = rows(60, 10, 3000), Layout(1 << 14, 1 << 15)
    found = []
    for path in (write(tmp_path / "a", data, layout), write_by_mindspore(tmp_path / "b", data, layout)):
        dataset = ds.MindDataset([str(path)], sampler=ds.PKSampler(1, class_column="label"))
        found.append([as_tuple(row) for row in dataset.create_dict_iterator(output_numpy=True, num_epochs=1)])
    assert found[0] == found[1]
    assert len(found[0]) == len({row["label"] for row in data})


def test_mindspore_filereader_reads_a_shard(shards: tuple[list[Path], list[Row]]) -> None:
    FileReader = pytest.importorskip("mindspore.mindrecord").FileReader

    paths, data = shards
    reader = FileReader(str(paths[0]))
    read = {as_tuple(row) for row in reader.get_next()}
    reader.close()
    assert read == {(row["image"], row["label"], row["file_name"]) for row in data[:60]}


def test_reader_gives_rows_by_number_with_and_without_the_index(shards: tuple[list[Path], list[Row]]) -> None:
    paths, data = shards
    header = read_header(paths[1])
    for index in (read_index(paths[1], header), index_from_data(paths[1], header)):
        with Shard(paths[1], index=index) as shard:
            got = [(shard.image(row), shard.fields(row)) for row in range(len(shard))]
        assert got == [(r["image"], {"file_name": r["file_name"], "label": r["label"]}) for r in data[60:120]]


@pytest.mark.parametrize("damage", ["missing", "empty", "not one", "long header", "cut header"])
def test_damaged_header_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.mindrecord"
    write(path, rows(3, 10, 20), Layout(1 << 14, 1 << 15))
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "not one": b"x" * 99, "long header": b"\xff" * 8 + whole[8:], "cut header": whole[:40]}[
                damage
            ]
        )
    with pytest.raises(RecordsError, match=r"x\.mindrecord"):
        read_header(path)


def test_reader_finds_the_digest_of_what_was_added(tmp_path: Path) -> None:
    data = rows(100, 1, 400, seed=9)
    path = write(tmp_path / "x.mindrecord", data, Layout(1 << 14, 1 << 15))
    with Shard(path) as shard:
        stored = [hashlib.sha256(shard.image(row)).digest() for row in range(len(shard))]
    assert stored == [hashlib.sha256(row["image"]).digest() for row in data]


def test_an_index_that_is_no_table_is_refused(tmp_path: Path) -> None:
    """A view may go on for ever."""
    path = write(tmp_path / "a.mindrecord", rows(3, 10, 20), Layout(1 << 14, 1 << 15))
    with sqlite3.connect(index_path(path)) as connection:
        connection.execute("ALTER TABLE INDEXES RENAME TO other")
        endless = "WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n) SELECT other.* FROM other, n"
        connection.execute(f"CREATE VIEW INDEXES AS {endless}")
    connection.close()
    with pytest.raises(RecordsError, match="the index is damaged; got expected a table"):
        read_index(path, read_header(path))
