"""The lists of the browser against the obvious way, and what they read at 50,000 and at a million records."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep.errors import PipelineError
from imnet_prep.records.folder import RecordsFolder, Row
from imnet_prep.records.line_index import ListIndex
from imnet_prep.records.manifest import load_manifest
from imnet_prep.records.record_list import RecordLine
from imnet_prep.show import browse_lists
from imnet_prep.show.browse import create_app
from imnet_prep.show.browse_data import Library
from imnet_prep.show.browse_lists import SHAPES, SORTS, Query
from imnet_prep.types import Change
from tests.imnet_prep.show.test_browse import places
from tests.records import Entry, make_records, read_records, rewrite_list, write_folder
from tests.synthetic import WNIDS, encode, jpeg, picture

pytest.importorskip("flask")
COPIES = 3


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes in three classes; some are PNG, cut off, or copies in another class or split."""

    def add(source: Path) -> None:
        folders = [source / split / wnid for split in ("train", "val") for wnid in WNIDS[:3]]
        for number, folder in enumerate(folders):
            (folder / "wide Ü.JPEG").write_bytes(jpeg(number, 50 + number, 120, 30 + number))
            (folder / "tall_É.JPEG").write_bytes(jpeg(number, 60 + number, 40, 90 - number))
            (folder / "drawn.PNG").write_bytes(encode(picture(number, 70 + number), "PNG"))
            (folder / "cut.JPEG").write_bytes(jpeg(number, 80 + number)[:-90])
            if number < COPIES:
                (folder / "copy.JPEG").write_bytes(jpeg(9, 9))
        (folders[5] / "twin.JPEG").write_bytes((folders[2] / "wide Ü.JPEG").read_bytes())

    return make_records(tmp_path_factory.mktemp("lists"), per_class=5, add=add)


@pytest.fixture(scope="module")
def library(records: Path) -> Library:
    return Library(records)


@pytest.fixture(scope="module")
def client(records: Path) -> Any:
    return create_app(records).test_client()


Listed = tuple[str, int, RecordLine, int]
"""Split, position, line, stored bytes."""


@pytest.fixture(scope="module")
def listed(records: Path) -> list[Listed]:
    folder = RecordsFolder.open(records)
    lines = [(name, line) for name, split in folder.manifest.splits.items() for line in read_records(records, split)]
    return [(name, place, line, folder.row(place).size_bytes) for place, (name, line) in enumerate(lines)]


SHAPE: dict[str, Callable[[int, int], bool]] = {
    "landscape": lambda w, h: w > h,
    "portrait": lambda w, h: w < h,
    "square": lambda w, h: w == h,
    "long": lambda w, h: max(w, h) > 2 * min(w, h),
}
SORT: dict[str, Callable[[Listed], Any]] = {
    "name": lambda one: one[2].file_name.encode(),
    "small": lambda one: min(one[2].width, one[2].height),
    "large": lambda one: -min(one[2].width, one[2].height),
    "narrow": lambda one: one[2].width / one[2].height,
    "wide": lambda one: -one[2].width / one[2].height,
    "light": lambda one: one[3],
    "heavy": lambda one: -one[3],
}


def obvious(query: Query, listed: list[Listed]) -> list[Listed]:
    """Filter by a loop."""
    return [
        one
        for one in listed
        for split, _, line, _ in [one]
        if query.split in ("", split)
        and query.label in (None, line.label)
        and all(word.lower() in line.file_name.lower() for word in query.name.split())
        and (not query.change or query.change in line.changes or (query.change == "none" and not line.changes))
        and (not query.shape or SHAPE[query.shape](line.width, line.height))
        and query.least <= min(line.width, line.height) <= query.most
    ]


QUERIES = [
    Query(),
    Query(split="val"),
    Query(label=2),
    Query(name="wide"),
    Query(name="N01 .jpeg"),
    Query(name="1"),
    Query(name="11"),
    Query(name="nothing of this name"),
    Query(name="\n"),
    Query(name="Ü"),
    Query(change="format"),
    Query(change="none"),
    *(Query(shape=shape) for shape in SHAPES),
    Query(least=35, most=60),
    Query(split="train", label=1, name="n", change="none", shape="landscape", least=20),
]


@pytest.mark.parametrize("few", [0, 10_000])
@pytest.mark.parametrize("query", QUERIES, ids=lambda query: str(query.values()))
def test_a_filter_keeps_what_a_loop_keeps(
    query: Query, few: int, library: Library, listed: list[Listed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each word is searched as one of many names."""
    monkeypatch.setattr(browse_lists, "FEW", few)
    library.columns.find.cache_clear()
    assert library.find(query).tolist() == [place for _, place, _, _ in obvious(query, listed)]


@pytest.mark.parametrize("sort", list(filter(None, SORTS)))
def test_a_list_is_sorted_and_complete(sort: str, library: Library, listed: list[Listed]) -> None:
    query = Query(sort=sort, name="n")
    found = library.find(query).tolist()
    keys = [SORT[sort](listed[place]) for place in found]
    assert keys == sorted(keys)
    assert sorted(found) == [place for _, place, _, _ in obvious(query, listed)]


def test_names_and_lines_are_those_of_the_list(library: Library, listed: list[Listed]) -> None:
    for _, place, line, _ in listed:
        assert library.columns.name(place) == line.file_name
        assert library.line(place) == line


def test_a_list_in_another_layout_is_indexed_alike(records: Path, tmp_path: Path) -> None:
    """A line with blanks and escapes is parsed as JSON, and several gzip members are one list."""
    import gzip
    import json
    import shutil

    other = Path(shutil.copytree(records, tmp_path / "records"))
    path = other / "train" / "records.jsonl.gz"
    texts = [json.dumps(json.loads(text)) for text in gzip.decompress(path.read_bytes()).decode().splitlines()]
    path.write_bytes(
        b"".join(gzip.compress(f"{text}\n".encode()) for text in texts[:-1]) + gzip.compress(texts[-1].encode())
    )
    plain, spaced = (RecordsFolder.open(folder).index("train") for folder in (records, other))
    assert plain.names == spaced.names
    assert plain.changes.tolist() == spaced.changes.tolist()
    assert [json.loads(spaced.line(number)) for number in range(len(texts))] == [json.loads(text) for text in texts]


def test_next_and_previous_walk_the_list_that_one_came_from(client: Any, library: Library) -> None:
    query = "change=format&sort=heavy"
    page = client.get(f"/images?{query}").text
    here, walked = places(page)[0], []
    while here:
        walked.append(here)
        page = client.get(f"/record/{here}?{query}").text
        link = re.search(r'href="/record/(\w+/\d+)\?change=format&amp;sort=heavy" rel="next">Next<', page)
        here = link[1] if link else ""
    assert walked == list(dict.fromkeys(places(client.get(f"/images?{query}").text)))
    assert f"{len(walked)} of {len(walked)}" in page
    assert ">Previous</a>" in page


def test_a_record_outside_the_named_list_is_shown_among_its_class(client: Any) -> None:
    page = client.get("/record/train/0?name=nothing").text
    assert "split train, class" in page


def test_views_keep_the_list_and_the_list_keeps_its_page(client: Any) -> None:
    page = client.get("/record/train/0?split=&crop=0.5").text
    assert '<input type="hidden" name="split" value="">' in page
    assert 'href="/images">all images</a>' in page


def test_duplicates_are_grouped_and_said_to_cross(client: Any, library: Library, listed: list[Listed]) -> None:
    by_digest: dict[str, list[int]] = {}
    for _, place, line, _ in listed:
        by_digest.setdefault(line.sha256, []).append(place)
    expected = [group for group in by_digest.values() if len(group) > 1]
    columns = library.columns
    groups = np.split(columns.same, columns.groups[1:-1])
    assert [group.tolist() for group in groups] == expected
    for across, count in (("", 2), ("classes", 1), ("splits", 1)):
        page = client.get("/duplicates", query_string={"across": across}).text
        assert page.count('<section class="group"') == count
    assert f"{COPIES} records" in client.get("/duplicates?across=classes").text


def test_rejected_images_are_listed_by_reason_with_what_was_kept(client: Any, records: Path) -> None:
    page = client.get("/rejected").text
    assert page.count("<li>\n") == sum(sum(s.rejected.values()) for s in load_manifest(records).splits.values()) == 6
    assert client.get("/rejected?split=val").text.count("cut.JPEG</div>") == 3
    assert "0 images" in client.get("/rejected?reason=empty").text
    kept = re.findall(r'src="(/kept/\d+)"', page)
    assert kept
    assert {client.get(f"/kept/{number}").status_code for number in range(7)} == {200, 404}
    answer = client.get(kept[0])
    assert (answer.status_code, answer.mimetype, answer.data[:2]) == (200, "image/jpeg", b"\xff\xd8")


@pytest.mark.parametrize(
    "query", ["split=x", "change=x", "shape=x", "sort=x", "label=3", "least=-1", "most=x", "page=-1"]
)
def test_an_impossible_filter_is_refused_and_named(client: Any, query: str) -> None:
    answer = client.get(f"/images?{query}")
    assert answer.status_code == 422
    assert query.partition("=")[0] in answer.text
    assert "expected" in answer.text


def test_a_query_survives_its_url() -> None:
    for query in QUERIES:
        values = {name: str(value) for name, value in query.values().items()}
        if query.name.strip() == query.name:
            assert Query.parse(values, ("train", "val"), 3) == query
    with pytest.raises(PipelineError, match="one of train, val"):
        Query.parse({"split": "x"}, ("train", "val"), 3)


# --- many records ----------------------------------------------------------------------------------------------------


class _Rows(Sequence[Entry]):
    """Small pictures of 64 kinds in 1,000 classes, told apart by a number after their end; one in 1,000 is a copy."""

    def __init__(self, count: int, prefix: str) -> None:
        self._prefix = prefix
        sizes = np.random.default_rng(1).integers(8, 65, (64, 2)).tolist()
        self._jpegs = [jpeg(kind, kind, *size) for kind, size in enumerate(sizes)]
        self._order = np.random.default_rng(2).permutation(count).tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return (self[one] for one in range(*place.indices(len(self))))
        number = self._order[place]
        label, copied = number % 1000, number - (number % 1000 == 1)
        name = f"n{label:08d}/{self._prefix}{label:08d}_{number}.JPEG"
        return name, label, self._jpegs[copied % 64] + b"%d" % copied

    def __iter__(self) -> Iterator[Entry]:
        return (self[place] for place in range(len(self)))


def many_records(folder: Path, count: int) -> Path:
    """Write a folder of so many records, half of which have a change."""
    names = [name for name, _ in zip(Change, range(5), strict=False)]
    splits: dict[str, Sequence[Entry]] = {
        "train": _Rows(count - count // 20, "n"),
        "val": _Rows(count // 20, "ILSVRC2012_val_"),
    }
    write_folder(folder, splits, shards=max(2, count // 16_000), classes=1000)
    rewrite_list(
        folder,
        lambda lines: [
            line.replace("{", f'{{"changes":["{names[number % 5]}"],', 1) if number % 10 < 5 else line
            for number, line in enumerate(lines)
        ],
    )
    return folder


LISTS = [
    "/", "/classes", "/classes?q=77", "/class/500", "/class/500?sort=heavy&split=train", "/images", "/images?page=300",
    "/images?sort=name", "/images?change=cmyk&shape=portrait&least=20&sort=wide", "/images?name=0", "/images?name=jpeg",
    "/images?name=ilsvrc+_499", "/duplicates", "/rejected",
]  # fmt: skip


def check_what_pages_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list reads no record, a record's page that one alone, and a bounded part of the record list."""
    read: list[int] = []
    real = RecordsFolder.row

    def counted(self: RecordsFolder, position: int) -> Row:
        read.append(position)
        return real(self, position)

    monkeypatch.setattr(RecordsFolder, "row", counted)
    indexes: list[ListIndex] = []
    real_index = RecordsFolder.index

    def kept(self: RecordsFolder, split: str) -> ListIndex:
        indexes.append(real_index(self, split))
        return indexes[-1]

    monkeypatch.setattr(RecordsFolder, "index", kept)
    client = create_app(folder).test_client()
    for path in LISTS:
        assert client.get(path).status_code == 200, path
    assert read == []
    assert sum(index.inflated_bytes for index in indexes) == 0
    train = load_manifest(folder).splits["train"].images
    for number in (0, train // 3, train - 1):
        read.clear()
        before = indexes[0].inflated_bytes
        assert client.get(f"/record/train/{number}?change=cmyk").status_code == 200
        assert set(read) == {number}
        assert indexes[0].inflated_bytes - before < 2 << 20


@pytest.mark.slow
def test_pages_read_a_bounded_part_of_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_what_pages_read(many_records(tmp_path / "records", 20_000), monkeypatch)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_pages_read_a_bounded_part_of_a_million_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = many_records(tmp_path / "records", 1_000_000)
    check_what_pages_read(folder, monkeypatch)
    code = """
import resource, sys
from pathlib import Path
from imnet_prep.show import browse_lists
from imnet_prep.show.browse import create_app
client = create_app(Path(sys.argv[1])).test_client()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    assert client.get(path).status_code == 200
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *LISTS], capture_output=True, text=True, check=True, timeout=1800
    )
    opened_kb, peak_kb = map(int, done.stdout.split())
    assert opened_kb < 600_000
    assert peak_kb < 800_000
