"""The decodes of a download hold so many pixels at a time, over all threads and processes."""

import gzip
import io
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imnet_prep.download import (
    JOURNAL_NAME,
    DownloadOptions,
    FailReason,
    FetchOptions,
    PoliteOptions,
    download,
    fetch,
)
from imnet_prep.download.addresses import Resolver
from imnet_prep.download.fetch import Body, Failure, Fetcher, unpack
from imnet_prep.download.folder import INCOMING
from imnet_prep.download.memory import NoRoom, Patience, PixelBudget, Room, Stopped, pixels_held, pixels_of
from imnet_prep.images.native import decoder_status
from tests import synthetic
from tests.imnet_prep.download.servers import Exchange, Server, images, picture, write_list

LARGE = 30_000_000


def test_small_images_share_the_budget_and_wait_for_it(tmp_path: Path) -> None:
    budget, lock, held, most = PixelBudget(tmp_path), threading.Lock(), 0, 0

    def decode() -> None:
        nonlocal held, most
        with budget.hold(5_000_000):
            with lock:
                held += 5_000_000
                most = max(most, held)
            time.sleep(0.02)
            with lock:
                held -= 5_000_000

    threads = [threading.Thread(target=decode) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 20_000_000  # four at a time


def test_a_large_image_is_alone_over_all_processes_and_a_dead_one_frees_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from imnet_prep.download.memory import PixelBudget\n"
        f"with PixelBudget(Path(sys.argv[1])).hold({LARGE}): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        entered = threading.Event()

        def wait() -> None:
            with PixelBudget(tmp_path).hold(LARGE):
                entered.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.3)
        other.kill()
        assert entered.wait(10)
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_room_is_sent_home_when_the_run_stops(tmp_path: Path) -> None:
    stopped = threading.Event()
    patience = Patience(stop=stopped.is_set)
    budget, other, room = PixelBudget(tmp_path, patience), PixelBudget(tmp_path, patience), Room(10, patience)
    waits = [(budget, LARGE), (other, LARGE), (budget, 9_000_000), (room, 1), (room, 2)]
    ends: list[str] = []

    def wait(place: PixelBudget | Room, count: int) -> None:
        try:
            with place.hold(count):
                ends.append("held")
        except Stopped:
            ends.append("stopped")

    threads = [threading.Thread(target=wait, args=one) for one in waits]
    with budget.hold(LARGE), budget.hold(20_000_000), room.hold(12):
        for thread in threads:
            thread.start()
        assert ends == []
        stopped.set()
        for thread in threads:
            thread.join(30)
    assert ends == ["stopped"] * 5


def test_who_waits_too_long_is_told_so(tmp_path: Path) -> None:
    patience = Patience(0.1)
    budget, other, room = PixelBudget(tmp_path, patience), PixelBudget(tmp_path, patience), Room(10, patience)
    with budget.hold(LARGE), budget.hold(20_000_000), room.hold(12):
        waits: list[tuple[PixelBudget | Room, int]] = [(budget, LARGE), (other, LARGE), (budget, 9_000_000), (room, 1)]
        for place, count in waits:
            with pytest.raises(NoRoom, match="no memory was free"), place.hold(count):
                pass
    with budget.hold(LARGE), other.hold(9_000_000), room.hold(1):
        pass


def drawn(kind: str, **options: object) -> bytes:
    """Draw 26 million pixels, more than a process decodes at a time."""
    ramp, out = np.arange(5100) // 20, io.BytesIO()
    Image.fromarray((ramp[:, None] ^ ramp).astype(np.uint8)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.slow
def test_a_large_image_that_waits_too_long_is_asked_for_again_and_costs_no_attempt(tmp_path: Path) -> None:
    large, out, ends = drawn("PNG", compress_level=1), tmp_path / "out", []
    (out / INCOMING).mkdir(parents=True)
    with Server(lambda x: x.answer(200, large) if "large" in x.path else images(x)) as server:
        lists = write_list(tmp_path / "list", [server.url("/large"), *(server.url(f"/{n}") for n in range(8))])
        options = DownloadOptions(
            (lists,), out, fetch=FetchOptions(allow_private=True, timeout_s=1), polite=PoliteOptions(retries=0)
        )
        thread = threading.Thread(target=lambda: ends.append(download(options)))
        with PixelBudget(out / INCOMING).hold(LARGE):
            thread.start()
            while server.hits["/large"] < 2 or sum(server.hits.values()) < 10:
                assert thread.is_alive()
                time.sleep(0.02)
        thread.join()
    assert (ends[0].totals.ok, ends[0].totals.failed) == (9, {})
    with closing(sqlite3.connect(out / JOURNAL_NAME)) as journal:
        assert journal.execute("SELECT DISTINCT attempts FROM urls").fetchall() == [(1,)]


def test_pixels_are_counted_by_the_header() -> None:
    out = io.BytesIO()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(out, "WEBP")
    assert pixels_of(out.getvalue()) == 1200
    assert pixels_of(synthetic.png_header_bomb()) == 0  # Pillow refuses it
    assert pixels_of(synthetic.many_scans(640, 48, 1)) == 640 * 48
    assert pixels_of(b"<html>") == pixels_of(b"") == pixels_of(b"\xff\xd8\xff") == 0


@pytest.mark.slow
def test_a_large_jpeg_that_is_read_as_a_stream_waits_for_no_other() -> None:
    if not decoder_status()[0]:
        pytest.skip("no C++ library")
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = drawn("JPEG")
    assert pixels_held(plain, None) < 1_000_000
    assert pixels_held(plain, 256) < 1_000_000
    assert pixels_held(plain, 2000) == 5100**2
    for data in (drawn("JPEG", progressive=True), drawn("JPEG", exif=turned), plain[:-9], drawn("PNG")):
        assert pixels_held(data, None) == 5100**2
    assert pixels_held(plain.replace(b"\x13\xec\x13\xec", b"\xff\x00\xff\x00", 1), None) == 0  # a bomb, refused
    assert pixels_held(picture(1), None) == 96 * 72


def _large(x: Exchange) -> None:
    if "chunked" in x.path:
        x.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"100000\r\n%s\r\n" % bytes(1 << 20) * 3)
        x.raw(b"0\r\n\r\n")
    else:
        x.answer(200, bytes(3 << 20))


@pytest.mark.parametrize("path", ["/declared", "/chunked"])
def test_a_large_answer_waits_for_room_and_its_time_does_not_run(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_LARGE_BYTES", 5 << 20)
    found: list[object] = []
    with Server(_large) as server:
        fetcher = Fetcher(FetchOptions(allow_private=True, timeout_s=10), 4, Resolver())

        def second() -> None:
            found.append(fetcher.fetch(server.url(path), 9))

        with ExitStack() as held:
            first = fetcher.fetch(server.url(path), 0, held)
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(1.5)
            assert found == []
        thread.join(30)
    for one in (first, *found):
        assert isinstance(one, Body)
        assert len(one.data) == 3 << 20
    assert len(found) == 1


def test_a_large_answer_that_waits_too_long_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_LARGE_BYTES", 5 << 20)
    with Server(_large) as server, ExitStack() as held:
        fetcher = Fetcher(FetchOptions(allow_private=True, timeout_s=0.5), 4, Resolver())
        assert isinstance(fetcher.fetch(server.url("/declared"), 0, held), Body)
        with pytest.raises(NoRoom):
            fetcher.fetch(server.url("/declared"), 0)
        held.close()
        assert isinstance(fetcher.fetch(server.url("/declared"), 0), Body)


def test_a_million_gzip_members_are_refused_soon() -> None:
    found = unpack(gzip.compress(b"") * 1_000_000, "gzip", 20 << 20)
    assert isinstance(found, Failure)
    assert found.reason is FailReason.TOO_LARGE
    parts = [bytes([part]) * 100_000 for part in range(40)]
    assert unpack(b"".join(map(gzip.compress, parts)) + bytes(8), "gzip", 20 << 20) == b"".join(parts)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_keep_no_large_buffers() -> None:
    code = (
        "import re, threading; from pathlib import Path\n"
        "from imnet_prep.process_pool import return_large_buffers; return_large_buffers()\n"
        "def use(ready):\n"
        "    for _ in range(3): b'x' * (20 << 20)\n"
        "    ready.wait()\n"
        "ready = threading.Barrier(13); lock = threading.Lock()\n"
        "for _ in range(12): threading.Thread(target=use, args=(ready,), daemon=True).start()\n"
        "ready.wait(); print(re.search(r'VmRSS:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(found.stdout) < 150_000  # KiB; 12 times 20 MiB without it
