"""Records of f361d40 open, verify, load, reshard and repair; keys that a later release may add are passed over."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep import EvalOptions, TrainOptions, open_batches
from tests.records import digests, prep_json
from tests.synthetic import WNIDS

OLD = Path(__file__).parents[1] / "fixtures" / "f361d40"
IMAGES = {"records": {"train": 21, "val": 6}, "adopted/named": {"train": 12}, "adopted/plain": {"train": 12, "val": 6}}


@pytest.fixture(params=sorted(IMAGES))
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, int]]:
    """A copy of a folder, and its images by split."""
    return Path(shutil.copytree(OLD / request.param, tmp_path / request.param)), IMAGES[request.param]


def test_old_records_verify_at_level_decode(old: tuple[Path, dict[str, int]]) -> None:
    folder, images = old
    result = prep_json("verify", folder, "--level", "decode", "--workers", 1)
    assert (result["ok"], result["problems"], result["records"]) == (True, [], sum(images.values()))


def test_old_records_are_described(old: tuple[Path, dict[str, int]]) -> None:
    folder, images = old
    assert {name: split["images"] for name, split in prep_json("info", folder)["splits"].items()} == images


def test_every_image_of_old_records_is_loaded_once(old: tuple[Path, dict[str, int]]) -> None:
    folder, images = old
    for split, count in images.items():
        with open_batches(folder, split, EvalOptions(batch_size=5, image_size=32)) as batches:
            found = list(batches)
        ids = np.concatenate([batch.record_id for batch in found])
        assert len(np.unique(ids)) == len(ids) == count
        label = np.concatenate([batch.label for batch in found])
        manifest = json.loads((folder / "manifest.json").read_bytes())
        assert np.bincount(label).tolist() == manifest["splits"][split]["class_counts"]


def test_old_records_give_the_batches_that_they_gave() -> None:
    """Order, labels and ids, as f361d40 drew them: resuming an old run relies on it."""
    expected = json.loads((OLD / "expected.json").read_bytes())["order_sha256"]
    with open_batches(OLD / "records", "train", TrainOptions(batch_size=10, image_size=32), seed=7) as batches:
        for epoch in range(2):
            drawn = [[*batch.label.tolist(), *batch.record_id.tolist()] for batch in batches]
            assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest() == expected[epoch]


def test_old_records_reshard(old: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    folder, images = old
    result = prep_json("reshard", folder, "--out", tmp_path / "new", "--shards", 3, "--workers", 1)
    assert (result["images"], result["labels_unchanged"]) == (sum(images.values()), True)
    assert prep_json("verify", tmp_path / "new", "--level", "decode", "--workers", 1)["ok"]


def test_old_indexes_are_intact(old: tuple[Path, dict[str, int]]) -> None:
    folder, images = old
    before = digests(folder)
    result = prep_json("repair-index", folder)
    assert (result["ok"], result["intact"], result["rows"]) == (True, result["shards"], sum(images.values()))
    assert digests(folder) == before


def test_an_old_rejected_list_is_read(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / "records", tmp_path / "records")
    prep_json("report", folder, "--out", tmp_path / "report.html", "--workers", 1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for wnid, reason in zip(WNIDS[:3], ("empty", "html", "truncated"), strict=True):
        assert f"{wnid}_{reason}.JPEG" in page


def canonical(document: dict[str, Any]) -> bytes:
    """Return a manifest's bytes, as docs/manifest.md has them."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def with_keys_of_a_later_release(folder: Path) -> Path:
    """Add a key to each object of the manifest and to each line of the lists; make the digests right again."""
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    for part in [document, *document["classes"], *document["sources"], *document["splits"].values()]:
        part["later"] = {"any": ["thing"]}
    files = [document["rejected"], *(split["records"] for split in document["splits"].values())]
    for entry in files:
        listed = folder / entry["file"]
        packed = listed.suffix == ".gz"
        data = gzip.decompress(listed.read_bytes()) if packed else listed.read_bytes()
        lines = [json.dumps(json.loads(line) | {"later": 1}, sort_keys=True) for line in data.splitlines()]
        data = "".join(f"{line}\n" for line in lines).encode()
        listed.write_bytes(gzip.compress(data, mtime=0) if packed else data)
        entry |= {
            "later": 1,
            "size_bytes": listed.stat().st_size,
            "sha256": hashlib.sha256(listed.read_bytes()).hexdigest(),
        }
    for shard in [shard for split in document["splits"].values() for shard in split["shards"]]:
        shard["later"] = 1
    del document["self_sha256"]
    document["self_sha256"] = hashlib.sha256(canonical(document)).hexdigest()
    path.write_bytes(canonical(document))
    return folder


def test_keys_of_a_later_release_are_passed_over(tmp_path: Path) -> None:
    folder = with_keys_of_a_later_release(Path(shutil.copytree(OLD / "records", tmp_path / "records")))
    assert prep_json("info", folder)["images"] == 27
    assert prep_json("verify", folder, "--level", "decode", "--workers", 1)["problems"] == []
    assert prep_json("reshard", folder, "--out", tmp_path / "new", "--shards", 3, "--workers", 1)["images"] == 27
    prep_json("report", folder, "--out", tmp_path / "report.html", "--workers", 1)
    with open_batches(folder, "val", EvalOptions(batch_size=6, image_size=32)) as batches:
        assert sum(len(batch) for batch in batches) == 6
