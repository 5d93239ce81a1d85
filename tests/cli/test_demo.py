"""The demo's way from URL list to score, on a few images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imnet_prep.build.workdir import Workdir
from imnet_prep.cli import demo, small_set
from imnet_prep.errors import Interrupted
from imnet_prep.records.manifest import load_manifest
from imnet_prep.types import ProgressCallback
from tests.records import read_records


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_the_demo_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PER_CLASS", {"train": 4, "val": 1})
    stages: list[str] = []

    @contextmanager
    def stage(name: str) -> Iterator[ProgressCallback]:
        stages.append(name)
        yield lambda state: None

    result = demo.run_demo(tmp_path, 1, stage)
    assert result.to_json() == {"top1": result.top1, "images": 50, "records": 50}
    assert 0 <= result.top1 <= 1
    assert stages == ["draw", "download train", "download val", "to-mindrecord", "verify", "train", "eval"]
    failures = (tmp_path / "download" / "train" / "failures.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["reason"] for line in failures) == ["gone", "not_an_image", "truncated"]
    manifest = load_manifest(tmp_path / "records")
    assert {name: split.images for name, split in manifest.splits.items()} == {"train": 40, "val": 10}
    line = next(read_records(tmp_path / "records", manifest.splits["train"]))
    assert (line.url.startswith("http://127.0.0.1"), line.status) == (True, 200)
    stages.clear()
    assert demo.run_demo(tmp_path, 1, stage).top1 == result.top1  # what is there is not made again
    assert stages == ["verify", "train", "eval"]


@pytest.mark.slow
def test_an_interrupted_demo_says_what_goes_on_and_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PER_CLASS", {"train": 4, "val": 1})
    monkeypatch.setattr(demo, "verify_records", lambda *_: pytest.fail("it went on"))
    current = ""

    @contextmanager
    def stage(name: str) -> Iterator[ProgressCallback]:
        nonlocal current
        current = name
        yield lambda state: None

    command = f"`imnet-prep demo --out {tmp_path} --epochs 1`"
    begun = Workdir(tmp_path / "records").note
    for stop in (lambda: current == "download val", begun.exists):
        with pytest.raises(Interrupted, match=re.escape(f"{command} starts over")):
            demo.run_demo(tmp_path, 1, stage, stop)
    assert begun.exists()
    small_set.make_records(tmp_path, {"train": 4, "val": 1}, stage)  # though a conversion of other URLs was begun

    def stopped(*_: object) -> None:
        raise Interrupted("stopped after step 3 of 5, saved", remedy="continue with --resume")

    monkeypatch.setattr(demo, "verify_records", stopped)
    with pytest.raises(Interrupted, match=re.escape(f"saved; {command} continues from there")):
        demo.run_demo(tmp_path, 1, stage)
