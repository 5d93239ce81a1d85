"""Batches of records behind a URL: the same as from the folder, through a cache that is smaller than the records."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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


class Served(SimpleHTTPRequestHandler):
    """A folder by HTTP, with ranges; how badly, its server says.

    Attributes of the server:
        pause_s: Before each piece of 64 KiB.
        cut: Every third answer with a body ends in its middle.
        refused: Paths that hold this are answered with 403.
        changed: Paths that hold this are answered with other bytes; how often still.
    """

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if self.server.refused and self.server.refused in self.path:
            self.send_error(403)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        span = self.headers.get("Range")
        first, last = (int(part) for part in span.removeprefix("bytes=").split("-")) if span else (0, len(data) - 1)
        part = data[first : last + 1]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hash(data)}"')
        self.end_headers()
        if body:
            self.write(part)

    def write(self, part: bytes) -> None:
        with self.server.lock:
            self.server.answers += 1
            cut = self.server.cut and self.server.answers % 3 == 0
            if self.server.changed[1] and self.server.changed[0] in self.path:
                self.server.changed = (self.server.changed[0], self.server.changed[1] - 1)
                part = part[:-1] + bytes([part[-1] ^ 1])
        if cut:
            part, self.close_connection = part[: len(part) // 2], True
        for start in range(0, len(part), 1 << 16):
            time.sleep(self.server.pause_s)
            self.wfile.write(part[start : start + (1 << 16)])


class Server(ThreadingHTTPServer):
    """See :class:`Served`."""

    def __init__(self, folder: Path, pause_s: float, cut: bool, refused: str, changed: tuple[str, int]) -> None:
        self.pause_s, self.cut, self.refused, self.changed = pause_s, cut, refused, changed
        self.answers, self.lock = 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), partial(Served, directory=str(folder)))

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that were killed."""


@contextmanager
def served(
    folder: Path, *, pause_s: float = 0, cut: bool = False, refused: str = "", changed: tuple[str, int] = ("", 0)
) -> Iterator[str]:
    """Serve a folder; yield its URL."""
    server = Server(folder, pause_s, cut, refused, changed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


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


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.timeout(1500)
def test_ranks_killed_at_any_moment_leave_no_wrong_byte_and_no_more_than_the_limit(
    folder: Path, tmp_path: Path, kills: int
) -> None:
    limit, draw, watch = 3 * shard_bytes(folder) + 20_000, random.Random(kills), Watch(tmp_path)
    wanted = [lines_of(folder, rank) for rank in (0, 1)]
    watch.start()
    with served(folder, pause_s=0.005) as address:
        for number in range(kills + 1):
            ranks = [
                subprocess.Popen(
                    [sys.executable, "-c", RANK, address, str(tmp_path), str(limit), str(rank), "2"],
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
                assert process.returncode in ((-signal.SIGKILL, 0) if rank in killed else (0,))
    watch.over.set()
    watch.join()
    assert shard_bytes(folder) < watch.most <= limit
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".part", ".pinned", ".lock"))]
