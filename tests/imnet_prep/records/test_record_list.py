"""The lines of ``records.jsonl.gz``: what a source says of an image is kept through every rewriting."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imnet_prep.build.reshard import ReshardOptions, reshard
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.record_list import RecordLine
from imnet_prep.sources import Found, folders
from imnet_prep.types import ImageRef
from tests.records import quiet, run
from tests.synthetic import make_image_folder

META = {"shard": 0, "text": 'say "shard":0, é', "words": ["a", {"shard": 0, "z": 1}], "zzz": 0}


def test_meta_is_absent_unless_there_is_one() -> None:
    line = RecordLine(0, 1, "a/1.jpg", 0, 4, 5, "0" * 64, "0" * 64)
    assert "meta" not in line.to_json()
    kept = replace(line, meta=META)
    assert RecordLine.from_json(kept.to_json()) == kept


@pytest.mark.parametrize("meta", ["[]", "1", '"x"', '{"a": "\\ud800"}'])
def test_a_meta_that_is_no_object_is_refused(meta: str) -> None:
    text = RecordLine(0, 1, "a/1.jpg", 0, 4, 5, "0" * 64, "0" * 64).to_json()
    with pytest.raises(ValueError, match=r"meta|surrogates"):
        RecordLine.from_json(text.replace('"row"', f'"meta":{meta},"row"'))


def test_meta_reaches_the_list_and_stays_when_resharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image_folder(tmp_path / "photos", 2, 5, splits=())
    walk = folders.FolderSource._walk

    def walk_with_meta(self: folders.FolderSource, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        for found in walk(self, notes, ignored):
            assert isinstance(found, ImageRef)
            yield replace(found, url="http://a/?x=,", meta=json.dumps(META, sort_keys=True, separators=(",", ":")))

    monkeypatch.setattr(folders.FolderSource, "_walk", walk_with_meta)
    run(tmp_path / "photos", tmp_path / "records", shards=4)
    reshard([tmp_path / "records"], tmp_path / "three", ReshardOptions(shards=3, workers=1), quiet)
    for name, shards in (("records", 4), ("three", 3)):
        folder = RecordsFolder.open(tmp_path / name)
        lines = list(folder.lines("train"))
        assert [line.meta for line in lines] == [META] * 10
        assert {line.shard for line in lines} == set(range(shards))
        assert len(folder.table("train").ids) == 10
