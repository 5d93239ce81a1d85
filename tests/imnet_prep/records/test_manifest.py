"""The manifest: what is written is what is read, and an edit shows."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.check.verify import verify
from imnet_prep.errors import ImnetError, IntegrityError, RecordsError
from imnet_prep.records.manifest import MANIFEST, load_manifest
from imnet_prep.records.record_list import RecordLine, write_lines
from imnet_prep.show.info import describe
from tests.records import read_records, reseal, run
from tests.synthetic import make_image_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    run(make_image_folder(folder / "in", 2, 3), folder / "records")
    return folder / "records"


@pytest.fixture
def records(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "records"))


def test_bytes_are_canonical(records: Path) -> None:
    assert load_manifest(records).to_bytes() == (records / MANIFEST).read_bytes()


def test_nothing_in_it_names_a_time_a_host_or_a_path(records: Path) -> None:
    import socket

    text = (records / MANIFEST).read_text()
    assert str(records.parent) not in text
    assert socket.gethostname() not in text
    assert "workers" not in text


@pytest.mark.parametrize(
    ("old", "new"),
    [('"seed": 0', '"seed": 1'), ('"images": 6', '"images": 7'), ("{", " {"), ('"format_version": 1,', "")],
)
def test_an_edit_shows(records: Path, old: str, new: str) -> None:
    path = records / MANIFEST
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ImnetError, match=r"manifest\.json"):
        load_manifest(records)


def test_half_a_manifest_is_named(records: Path) -> None:
    path = records / MANIFEST
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(IntegrityError, match="not JSON"):
        load_manifest(records)


def test_other_versions_are_refused(records: Path) -> None:
    path = records / MANIFEST
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "format_version": 2}))
    with pytest.raises(RecordsError, match="version 2"):
        load_manifest(records)


def test_what_a_later_release_adds_is_passed_over(records: Path) -> None:
    """Additions that old readers may ignore keep the version, so they must be ignored at every level."""
    before = load_manifest(records)

    def add(document: dict[str, Any]) -> None:
        split = document["splits"]["train"]
        places = (split["shards"][0], split["records"], document["classes"][0], document["sources"][0])
        for entry in (document, split, *places):
            entry["added_later"] = {"any": ["thing"]}

    reseal(records, add)
    after = load_manifest(records)
    assert after.splits["train"].shards == before.splits["train"].shards
    assert after.classes == before.classes
    assert verify(records, "quick", 1, lambda _: None).ok


def test_folders_without_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="no such folder"):
        load_manifest(tmp_path / "none")
    with pytest.raises(RecordsError, match="adopt"):
        load_manifest(tmp_path)
    (tmp_path / "x.partial").mkdir()
    with pytest.raises(RecordsError, match="unfinished"):
        load_manifest(tmp_path / "x.partial")


def test_a_split_that_is_not_there_lists_those_that_are(records: Path) -> None:
    with pytest.raises(RecordsError, match=r"train \(6 images\), val \(6 images\)"):
        load_manifest(records).split(records, "test")


def test_equal_lines_give_equal_bytes_and_come_back(records: Path, tmp_path: Path) -> None:
    lines = [RecordLine(0, k, f"é/{k}.jpg", 1, 2, 3, "a" * 64, "b" * 64, ("cmyk",), "http://x", 200) for k in range(50)]
    for name in ("a", "b"):
        write_lines(tmp_path / name, (line.to_json() for line in lines))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    split = replace(load_manifest(records).splits["train"], records={"file": "a"})
    assert list(read_records(tmp_path, split)) == lines
    text = f'{{"added_later":1,{lines[0].to_json()[1:]}\n'
    (tmp_path / "a").write_bytes(gzip.compress(text.encode()))
    assert list(read_records(tmp_path, split)) == lines[:1]
    (tmp_path / "a").write_bytes(gzip.compress(b'{"shard": 0}\n'))
    with pytest.raises(RecordsError, match="line 1"):
        list(read_records(tmp_path, split))


def test_info_says_what_is_there(records: Path) -> None:
    told = describe(records)
    assert told["images"] == 12
    assert told["classes"] == 2
    assert told["splits"]["train"]["images_per_class"] == "3 to 3"
    assert told["manifest_sha256"] == load_manifest(records).digest
