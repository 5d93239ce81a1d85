"""Real photographs through the command, and read by a stock MindDataset."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from imnet_prep.records.manifest import load_manifest
from tests.records import digests, prep, prep_json

pytestmark = [pytest.mark.slow, pytest.mark.real_data]


@pytest.fixture(scope="module")
def tiny(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    with tarfile.open(shared_data / "tiny-imagenet-10.tar") as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir()) if len(list(folder.iterdir())) == 1 else folder


def test_tiny_imagenet_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    import mindspore.dataset as ds

    result = prep_json("to-mindrecord", tiny, "--out", tmp_path / "records", "--workers", 2)
    assert (result["images"], result["rejected"]) == (5500, {})
    manifest = load_manifest(tmp_path / "records")
    assert {name: split.images for name, split in manifest.splits.items()} == {"train": 5000, "val": 500}
    assert len(manifest.classes) == 10
    assert prep("verify", tmp_path / "records").returncode == 0
    files = [str(tmp_path / "records" / shard.file) for shard in manifest.splits["train"].shards]
    dataset = ds.MindDataset(files, shuffle=False)
    assert set(dataset.get_col_names()) == {"image", "label", "file_name"}
    assert sum(1 for _ in dataset.create_tuple_iterator(num_epochs=1, output_numpy=True)) == 5000
    prep_json("to-mindrecord", tiny, "--out", tmp_path / "again", "--workers", 1)
    assert digests(tmp_path / "again") == digests(tmp_path / "records")


def test_photographs_under_imagenets_labels_and_stored_small(shared_data: Path, tmp_path: Path) -> None:
    archive = shared_data / "imagenet-samples-250.tar"
    result = prep_json("to-mindrecord", archive, "--out", tmp_path / "whole", "--label-space", "imagenet1k")
    assert result["images"] + sum(result["rejected"].values()) == 250
    assert result["images"] == 250
    assert len(load_manifest(tmp_path / "whole").classes) == 1000
    small = prep_json("to-mindrecord", archive, "--out", tmp_path / "small", "--short-side", 256)
    assert small["bytes"] < 0.4 * result["bytes"]
