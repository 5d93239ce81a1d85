"""URL lists that pandas, ``datasets`` and img2dataset wrote (tests/fixtures/lists): lines, ids, classes and columns."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.download.ingest import take_in
from imnet_prep.download.journal import Journal
from imnet_prep.download.options import BY_NAME, Columns
from imnet_prep.errors import DownloadError

LISTS = Path(__file__).parent.parent.parent / "fixtures" / "lists"
URLS = [
    "http://a.example/1.jpg", "http://a.example/2.jpg?x=1,2&y=%20", "http://b.example/%C3%BC/3%20.jpg",
    "http://b.example/4.jpg",
]  # fmt: skip
CAPTIONS = ['a cat, "asleep"\nat home', "ein Hündchen, süß", 'it says "hi"', "one\ttab"]
NAMES, NUMBERS = ["cat", "dog", "cat", "bird"], ["1", "2", "1", "0"]
SCORES: list[dict[str, Any]] = [{"score": 1.5}, {}, {"score": 2.0}, {"score": 0.25}]
TEXT_SCORES = [{name: str(value) for name, value in one.items()} for one in SCORES]
INDEX = range(4)
TEXT_INDEX = [{"1": str(number)} for number in INDEX]
TAGS: list[dict[str, Any]] = [{"tags": ["a", "b"]}, {"tags": []}, {}, {"tags": ["c"]}]
TEXT_TAGS = [{"tags": "['a' 'b']"}, {"tags": "[]"}, {}, {"tags": "['c']"}]


def load(path: Path, folder: Path, columns: Columns = BY_NAME, wnid: str | None = None) -> Journal:
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
    folder.mkdir()
    journal = Journal(folder)
    take_in(journal, (path,), wnid, None, None, columns)
    return journal


def rows_of(journal: Journal) -> tuple[list[tuple[str, str, str]], list[dict[str, Any]]]:
    """Return (class, id, URL) of each row, and its other columns."""
    query = "SELECT wnid, name, url, json FROM urls LEFT JOIN meta_of_urls USING (row) ORDER BY row"
    found = journal.db.execute(query).fetchall()
    return [row[:3] for row in found], [json.loads(row[3]) for row in found]


@pytest.mark.parametrize(
    ("name", "classes", "more"),
    [
        ("pandas/plain.csv", NAMES, [TEXT_SCORES]),
        ("pandas/index.csv", NAMES, [TEXT_SCORES, TEXT_INDEX]),
        ("pandas/tabs.tsv", NAMES, [TEXT_SCORES]),
        ("pandas/tabs.tsv.gz", NAMES, [TEXT_SCORES]),
        ("pandas/lines.jsonl", NAMES, [SCORES]),
        ("pandas/index.parquet", NAMES, [SCORES, [{"__index_level_0__": number} for number in INDEX]]),
        ("datasets/plain.csv", NUMBERS, [TEXT_SCORES, TEXT_TAGS]),
        ("datasets/lines.jsonl", NUMBERS, [SCORES, TAGS]),
        ("datasets/plain.parquet", NUMBERS, [SCORES]),  # columns of lists are left out
    ],
)
def test_every_line_and_column_is_read(
    name: str, classes: list[str], more: list[list[dict[str, Any]]], tmp_path: Path
) -> None:
    with closing(load(LISTS / name, tmp_path / "journal")) as journal:
        rows, metas = rows_of(journal)
        totals = journal.totals()
        bad = journal.db.execute("SELECT line, kind, why FROM bad_lines ORDER BY line").fetchall()
    assert rows == [(classes[n], str(11 + n), URLS[n]) for n in range(4)]
    for number, meta in enumerate(metas):
        expected: dict[str, Any] = {"caption": CAPTIONS[number]}
        for column in more:
            expected |= column[number]
        assert meta == expected
    has_gap = name == "pandas/index.parquet"  # its fifth row was dropped
    assert (totals.requested, totals.malformed, totals.repeated) == (4, 1, 0 if has_gap else 1)
    assert [one[1:] for one in bad if one[1] == "malformed"] == [("malformed", "no URL")]


def test_what_img2dataset_writes_beside_a_shard(tmp_path: Path) -> None:
    with closing(load(LISTS / "img2dataset/00000.parquet", tmp_path / "journal")) as journal:
        rows, metas = rows_of(journal)
    by_url = {url.rpartition("/")[2]: (wnid, meta) for (wnid, _, url), meta in zip(rows, metas, strict=True)}
    assert sorted(by_url) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert [by_url[f"{n}.jpg"][0] for n in range(4)] == NAMES
    assert [by_url[f"{n}.jpg"][1]["caption"] for n in range(4)] == CAPTIONS
    assert by_url["0.jpg"][1]["status"] == "success"
    assert (by_url["0.jpg"][1]["width"], by_url["0.jpg"][1]["original_width"]) == (32, 60)
    assert by_url["3.jpg"][1]["status"] == "failed_to_download"


def test_its_keys_may_be_the_ids(tmp_path: Path) -> None:
    columns = Columns(name="key")
    with closing(load(LISTS / "img2dataset/00000.parquet", tmp_path / "journal", columns)) as journal:
        assert sorted(name for _, name, _ in rows_of(journal)[0]) == [f"{n:09}" for n in range(4)]


def test_the_note_beside_an_image_is_no_list_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"JSON object over several lines.*jq -c"):
        load(LISTS / "img2dataset/000000000.json", tmp_path / "journal").close()
    note = json.loads((LISTS / "img2dataset/000000000.json").read_text("utf-8"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(note) + "\n")
    with closing(load(lines, tmp_path / "again")) as journal:
        assert rows_of(journal)[0][0][0] == "cat"


def test_an_index_of_pandas_may_be_the_id(tmp_path: Path) -> None:
    columns = Columns(name="1")
    with closing(load(LISTS / "pandas/index.csv", tmp_path / "journal", columns)) as journal:
        assert [name for _, name, _ in rows_of(journal)[0]] == ["0", "1", "2", "3"]


def test_marks_in_a_list_without_such_rules_are_characters(tmp_path: Path) -> None:
    """A mark that opens and never closes hides no line, as in Conceptual Captions' lists."""
    lines = [
        '"open and never closed\thttp://a.example/1', 'ends with "marks"\thttp://a.example/2',
        '"Hello," he said\thttp://a.example/3', '"quoted ""twice"""\thttp://a.example/4', '"\thttp://a.example/5',
        "", '"two\nlines"\thttp://a.example/6',
    ]  # fmt: skip
    path = tmp_path / "captions.tsv"
    path.write_text("\n".join(lines) + "\n")
    with closing(load(path, tmp_path / "journal", Columns(url="2"), "cat")) as journal:
        rows, metas = rows_of(journal)
        assert journal.totals().malformed == 0
    assert [url for _, _, url in rows] == [f"http://a.example/{n}" for n in range(1, 7)]
    assert [meta["1"] for meta in metas] == [
        '"open and never closed', 'ends with "marks"', '"Hello," he said', 'quoted "twice"', '"', "two\nlines",
    ]  # fmt: skip


def test_a_column_of_bytes_is_not_kept(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"url": b"http://a.example/1", "label": "cat", "image": bytes(1000), "n": 1}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with closing(load(tmp_path / "a.parquet", tmp_path / "journal")) as journal:
        rows_there, metas = rows_of(journal)
    assert [url for _, _, url in rows_there] == ["http://a.example/1"]
    assert metas == [{"n": 1}]
