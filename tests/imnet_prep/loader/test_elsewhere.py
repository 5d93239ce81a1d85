"""Batches of records behind a URL: the same as from the folder, through a cache that is smaller than the records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep import remote
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import EvalOptions, TrainOptions
from tests.imnet_prep.loader.runs import run_epoch, same
from tests.records import Entry, entries, write_folder
from tests.s3 import put, s3_server

pytest.importorskip("s3fs")
pytest.importorskip("moto")
SHARDS = 8
OPTIONS = TrainOptions(8, image_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of 8 training shards of 20 images."""
    splits: dict[str, Sequence[Entry]] = {"train": entries(20 * SHARDS, low=100, high=200), "val": entries(37, seed=1)}
    return write_folder(tmp_path_factory.mktemp("elsewhere") / "records", splits, shards=SHARDS)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The same records on an S3 server."""
    with s3_server() as address:
        files = {f"imagenet/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in folder.rglob("*.*")}
        put(address, "bucket", files)
        yield "s3://bucket/imagenet"


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_S", (0.01, 0.01))


def shard_bytes(folder: Path) -> int:
    """Return the size of the largest shard of the training split, with its index."""
    return max(path.stat().st_size + Path(f"{path}.db").stat().st_size for path in folder.glob("train/*.mindrecord"))


def kept(cache: Path) -> int:
    """Return how many bytes a cache holds."""
    found = 0
    for path in cache.rglob("*"):
        try:
            found += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return found


def test_batches_from_a_url_are_those_of_the_folder_whatever_the_cache_holds(
    folder: Path, url: str, tmp_path: Path
) -> None:
    limit = 3 * shard_bytes(folder) + 20_000  # of the record list
    for cache_bytes in (limit, None):
        how: dict[str, Any] = {"cache": tmp_path / str(cache_bytes), "cache_bytes": cache_bytes}
        for epoch in (0, 1):
            plain = run_epoch(folder, OPTIONS, epoch, order="blocks")
            assert same(plain, run_epoch(url, OPTIONS, epoch, **how))
        assert same(plain[7:], run_epoch(url, OPTIONS, 1, start_step=7, **how))
        ranks = [run_epoch(url, OPTIONS, 1, rank=rank, ranks=2, **how) for rank in (0, 1)]
        assert same(plain, [batch for pair in zip(*ranks, strict=True) for batch in pair])
        options = EvalOptions(8, image_size=32)
        assert same(run_epoch(folder, options, split="val"), run_epoch(url, options, split="val", **how))
        assert kept(tmp_path / str(cache_bytes)) <= (cache_bytes or 1 << 40)


def test_a_shard_is_brought_once_an_epoch_and_the_first_of_the_next_ahead_of_it(
    folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[str] = []
    look_up = remote.look_up

    def noted(where: str) -> remote.RemoteFile | None:
        if where.endswith(".mindrecord") and (not brought or brought[-1] != where):
            brought.append(where)
        return look_up(where)

    monkeypatch.setattr(remote, "look_up", noted)
    limit = 3 * shard_bytes(folder) + 20_000
    with open_batches(url, "train", OPTIONS, cache=tmp_path, cache_bytes=limit, prefetch=1, workers=1) as batches:
        shards = [batches._table.shard[batches.order(epoch).positions] for epoch in range(3)]
        turns = [one[np.sort(np.unique(one, return_index=True)[1])].tolist() for one in shards]
        assert len(list(batches.epoch(0))) == 20
        while len(brought) == SHARDS:
            time.sleep(0.01)
        assert len(list(batches.epoch(1))) == 20
    numbers = [int(where.split("/train-")[1][:5]) for where in brought]
    assert numbers[: SHARDS + 1] == [*turns[0], turns[1][0]]
    assert len(numbers) <= 2 * SHARDS + 1
