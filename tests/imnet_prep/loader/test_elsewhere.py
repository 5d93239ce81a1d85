"""Batches of records behind a URL: the same as from the folder, through a cache that is smaller than the records."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imnet_prep import remote
from imnet_prep.errors import ImnetError, IntegrityError, PipelineError, RecordsError, RemoteError
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.records.record_list import RECORDS
from tests.imnet_prep.loader.runs import run_epoch, same
from tests.imnet_prep.obstacles import small_disk
from tests.needs import needs
from tests.records import Entry, copy, entries, flip, write_folder
from tests.s3 import put, s3_server
from tests.served import served

needs("s3fs")
SHARDS = 8
OPTIONS = TrainOptions(8, image_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of 8 training shards of 20 images."""
    splits: dict[str, Sequence[Entry]] = {"train": entries(20 * SHARDS, low=100, high=200), "val": entries(37, seed=1)}
    return write_folder(tmp_path_factory.mktemp("elsewhere") / "records", splits, shards=SHARDS)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The same records on a web server."""
    with served(folder) as server:
        yield server.url


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[str]:
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


@pytest.mark.slow
def test_batches_from_a_url_are_those_of_the_folder_whatever_the_cache_holds(
    folder: Path, url: str, tmp_path: Path
) -> None:
    plain, limit = run_epoch(folder, OPTIONS, 1, order="blocks"), 3 * shard_bytes(folder) + 20_000  # of the record list
    for cache_bytes in (limit, None):
        how: dict[str, Any] = {"cache": tmp_path / str(cache_bytes), "cache_bytes": cache_bytes}
        assert same(plain, run_epoch(url, OPTIONS, 1, **how))
        assert same(plain[7:], run_epoch(url, OPTIONS, 1, start_step=7, **how))
        ranks = [run_epoch(url, OPTIONS, 1, rank=rank, ranks=2, **how) for rank in (0, 1)]
        assert same(plain, [batch for pair in zip(*ranks, strict=True) for batch in pair])
        options = EvalOptions(8, image_size=32)
        assert same(run_epoch(folder, options, split="val"), run_epoch(url, options, split="val", **how))
        assert kept(tmp_path / str(cache_bytes)) <= (cache_bytes or 1 << 40)
    assert same(run_epoch(folder, OPTIONS, 1), run_epoch(url, OPTIONS, 1, order="global", **how))


def test_batches_from_s3_are_those_of_the_folder(folder: Path, bucket: str, tmp_path: Path) -> None:
    found = run_epoch(bucket, OPTIONS, cache=tmp_path, cache_bytes=3 * shard_bytes(folder) + 20_000)
    assert same(found, run_epoch(folder, OPTIONS, order="blocks"))


def test_a_shard_is_brought_once_an_epoch_and_the_first_of_the_next_ahead_of_it(
    folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[str] = []
    look_up = remote.look_up

    def noted(where: str, *how: Any) -> remote.RemoteFile | None:
        if where.endswith(".mindrecord") and (not brought or brought[-1] != where):
            brought.append(where)
        return look_up(where, *how)

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


def turns_of(folder: Path) -> list[str]:
    """Return the names of the training shards in the order of epoch 0."""
    with open_batches(folder, "train", OPTIONS, 5, order="blocks") as batches:
        shards = batches._table.shard[batches.order(0).positions]
        return [batches._table.files[shard].name for shard in dict.fromkeys(shards.tolist())]


def test_the_first_batch_needs_one_shard_alone(folder: Path, tmp_path: Path) -> None:
    first, *others = turns_of(folder)
    with (
        served(folder) as server,
        open_batches(server.url, "train", OPTIONS, 5, cache=tmp_path, prefetch=1, workers=1) as batches,
    ):
        server.held.update(others)
        stream = batches.epoch(0)
        one = next(stream)
        server.held.clear()
        assert same([one, *stream], run_epoch(folder, OPTIONS, order="blocks"))
    assert first not in others


def test_closing_does_not_wait_for_a_shard(folder: Path, tmp_path: Path) -> None:
    with served(folder) as server:
        batches = open_batches(server.url, "train", OPTIONS, 5, cache=tmp_path, prefetch=1)
        server.pause_s = 1  # a minute for what is wanted
        stream = batches.epoch(0)
        while not list(tmp_path.glob("imnet-prep-cache/*/train/.*.part")):
            time.sleep(0.01)
        server.pause_s = 0
        batches.close()
        with pytest.raises(PipelineError, match="closed"):
            next(stream)
    assert kept(tmp_path) <= (folder / "train" / RECORDS).stat().st_size + 3 * shard_bytes(folder)


def test_closing_does_not_wait_for_another_attempt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "WAITS_S", (1000.0,))
    with served(folder) as server, open_batches(server.url, "train", OPTIONS, 5, cache=tmp_path) as batches:
        server.cut = True
        batches.epoch(0)
        while "another attempt" not in caplog.text:
            time.sleep(0.01)


# --- what can go wrong -----------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[ImnetError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_server_that_cuts_every_third_answer_is_asked_again(folder: Path, tmp_path: Path) -> None:
    with served(folder) as server:
        server.cut = True
        found = run_epoch(server.url, OPTIONS, cache=tmp_path)
        assert server.answers > 3 * SHARDS
    assert same(found, run_epoch(folder, OPTIONS, order="blocks"))


def test_wrong_bytes_are_fetched_once_more(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = turns_of(folder)[2]
    with served(folder) as server:
        server.changed[f"/train/{name}"] = 1
        assert same(run_epoch(server.url, OPTIONS, cache=tmp_path), run_epoch(folder, OPTIONS, order="blocks"))
    (line,) = [record.getMessage() for record in caplog.records if "expected" in record.getMessage()]
    assert f"{server.url}/train/{name}: expected" in line


@pytest.mark.parametrize("kind", ["bytes", "index", "size"])
@pytest.mark.parametrize("skip", ["raise", "skip"])
def test_a_manifest_that_lies_is_named_and_no_row_of_the_shard_is_used(
    folder: Path, tmp_path: Path, kind: str, skip: str
) -> None:
    name = turns_of(folder)[1] + (".db" if kind == "index" else "")
    records = copy(folder, tmp_path / "records")
    path = records / "train" / name
    if kind == "size":
        path.write_bytes(path.read_bytes() + b"more")
    else:
        flip(path, 8 * (path.stat().st_size - 100))
    with served(records) as server, pytest.raises(IntegrityError) as error:
        run_epoch(server.url, OPTIONS, cache=tmp_path / "cache", on_error=skip)
    text = one_line(error)
    assert text.startswith(f"{server.url}/train/{name}: is not what its manifest says; expected ")
    assert text.endswith("2 times; upload the file again, or all the records with manifest.json last")
    assert not list((tmp_path / "cache").rglob(f"*{name}*"))


def test_no_bucket_no_file_and_no_right_are_named(folder: Path, bucket: str, tmp_path: Path) -> None:
    for wrong in ("s3://no-such-bucket/imagenet", f"{bucket}/train"):
        with pytest.raises(RemoteError) as error:
            run_epoch(wrong, OPTIONS, cache=tmp_path)
        assert one_line(error).startswith(f"{wrong}/manifest.json does not exist or may not be read")
    name = turns_of(folder)[1]
    for refused in ("manifest.json", RECORDS, name):
        with served(folder) as server:
            server.refused.add(refused)
            with pytest.raises(RemoteError) as error:
                run_epoch(server.url, OPTIONS, cache=tmp_path / refused, on_error="skip")
        assert f"/{refused}" in one_line(error)
        assert "403" in one_line(error)


def test_a_full_disk_is_named(folder: Path, url: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 * shard_bytes(folder)) as disk:
        with pytest.raises(RecordsError) as error:
            run_epoch(url, OPTIONS, cache=disk, cache_bytes=1 << 40)
        assert "No space left on device; make room on that disk" in one_line(error)
        assert not [path for path in disk.rglob("*.part") if path.name.startswith(".train")]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "name one with --cache DIR"),
        ({"cache_bytes": 0, "cache": "cache"}, "more than 0 bytes"),
        ({"cache_bytes": 200_000, "cache": "cache"}, "room for 3 shards"),
        ({"cache_bytes": 500_000, "cache": "cache", "order": "global"}, "all shards, which are read in random order"),
        ({"cache": "file/below"}, "cannot be used as a cache"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(url: str, tmp_path: Path, how: dict[str, Any], message: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    where = {"cache": tmp_path / how["cache"]} if "cache" in how else {}
    with pytest.raises(RecordsError, match=message) as error:
        open_batches(url, "train", OPTIONS, **{**how, **where})
    one_line(error)


def test_a_cache_for_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="a cache is for records behind a URL"):
        open_batches(folder, "train", OPTIONS, cache=tmp_path)


def test_other_files_in_the_folder_of_the_cache_stay_and_do_not_count(folder: Path, url: str, tmp_path: Path) -> None:
    mine = tmp_path / "train" / "mine.mindrecord"
    mine.parent.mkdir()
    mine.write_bytes(bytes(1 << 20))
    limit = 3 * shard_bytes(folder) + 20_000
    assert run_epoch(url, OPTIONS, cache=tmp_path, cache_bytes=limit)
    assert mine.stat().st_size == 1 << 20


def test_damage_in_the_cache_is_found_before_use_and_mended(
    folder: Path, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run_epoch(url, OPTIONS, cache=tmp_path, check="never")
    first, second, *_ = sorted(tmp_path.rglob("*.mindrecord"))
    flip(first, 8 * (first.stat().st_size - 100))
    second.with_name(f"{second.name}.db").unlink()
    (listed,) = tmp_path.rglob(RECORDS)
    flip(listed, 800)
    assert same(run_epoch(url, OPTIONS, cache=tmp_path, check="never"), plain)
    assert len([record for record in caplog.records if "is damaged; it is fetched again" in record.getMessage()]) == 2


# --- kills -----------------------------------------------------------------------------------------------------------

RANK = """
import hashlib, sys
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import TrainOptions
url, cache, limit, rank, epochs = sys.argv[1:]
how = dict(cache=cache, cache_bytes=int(limit), rank=int(rank), ranks=2, workers=1)
with open_batches(url, "train", TrainOptions(8, image_size=32), 5, **how) as batches:
    for epoch in range(int(epochs)):
        for step, batch in enumerate(batches.epoch(epoch)):
            print(epoch, step, hashlib.sha256(batch.image.tobytes() + batch.label.tobytes()).hexdigest(), flush=True)
"""


def lines_of(folder: Path, rank: int) -> list[str]:
    """Return what :data:`RANK` prints for two epochs, from the folder itself."""
    lines = []
    for epoch in (0, 1):
        for step, batch in enumerate(run_epoch(folder, OPTIONS, epoch, order="blocks", rank=rank, ranks=2)):
            digest = hashlib.sha256(batch.image.tobytes() + batch.label.tobytes()).hexdigest()
            lines.append(f"{epoch} {step} {digest}")
    return lines


class Watch(threading.Thread):
    """Note how many bytes a cache holds at most, until :attr:`over`."""

    def __init__(self, cache: Path) -> None:
        super().__init__(daemon=True)
        self.cache, self.most, self.over = cache, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, kept(self.cache))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.timeout(1500)
def test_ranks_killed_at_any_moment_leave_no_wrong_byte_and_no_more_than_the_limit(
    folder: Path, tmp_path: Path, kills: int
) -> None:
    limit, draw, watch = 3 * shard_bytes(folder) + 20_000, random.Random(kills), Watch(tmp_path)
    wanted = [lines_of(folder, rank) for rank in (0, 1)]
    watch.start()
    with served(folder, pause_s=0.005) as server:
        for number in range(kills + 1):
            ranks = [
                subprocess.Popen(
                    [sys.executable, "-c", RANK, server.url, str(tmp_path), str(limit), str(rank), "2"],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for rank in (0, 1)
            ]
            killed = draw.sample((0, 1), draw.randint(1, 2)) if number < kills else []
            if killed:
                while not list(tmp_path.glob("imnet-prep-cache/*/train/*mindrecord*")):
                    time.sleep(0.01)
            for rank in killed:
                time.sleep(draw.uniform(0, 1.5))
                ranks[rank].kill()
            for rank, process in enumerate(ranks):
                lines = process.communicate(timeout=300)[0].split("\n")
                assert set(lines[:-1]) <= set(wanted[rank])
                assert rank in killed or lines[:-1] == wanted[rank]
                assert process.returncode in ((-9, 0) if rank in killed else (0,))
    watch.over.set()
    watch.join()
    assert shard_bytes(folder) < watch.most <= limit
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".pinned", ".lock"))]
