"""A run against a well-behaved server: politeness, resume, crashes, interruption."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import certifi
import pytest
from PIL import Image

from imnet_prep.download import (
    ContentOptions,
    DownloadOptions,
    DownloadResult,
    FetchOptions,
    PoliteOptions,
    download,
    read_finished,
)
from imnet_prep.errors import BudgetError, DownloadError, Interrupted
from tests.imnet_prep.download.servers import Exchange, Server, images, picture, write_list
from tests.imnet_prep.obstacles import kill

LOCAL = FetchOptions(allow_private=True, timeout_s=20)


def _download(lists: Path, out: Path, **options: object) -> DownloadResult:
    polite = PoliteOptions(per_host=4, backoff_s=0.05, retries=2)
    settings = {"fetch": LOCAL, "polite": polite, "processes": 1} | options  # to start a second one takes long
    return download(DownloadOptions(urls=(lists,), out=out, **settings))  # type: ignore[arg-type]


def _tree(out: Path) -> dict[str, str]:
    """Return the images under their final names, with their digests."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("n*/*"))
    }


def test_images_land_as_they_came_with_their_provenance(tmp_path: Path) -> None:
    with Server(images) as server:
        urls = [server.url(f"/{number}.jpg") for number in range(20)]
        result = _download(write_list(tmp_path / "list", urls), tmp_path / "out")
    assert result.totals.ok == 20
    found = list(read_finished(tmp_path / "out"))
    assert [image.url for image in found] == urls
    for number, image in enumerate(found):
        data = (tmp_path / "out" / image.path).read_bytes()
        assert data == picture(number)
        assert image.path == f"n01440764/n01440764_{number}.jpg"
        assert (image.status, image.size_bytes) == (200, len(data))
        assert image.sha256 == image.source_sha256 == hashlib.sha256(data).hexdigest()
        assert (image.width, image.height) == (96, 72)
    assert result.totals.bytes == sum(image.size_bytes for image in found)


def test_small_storage_is_jpeg_of_the_short_side_and_keeps_the_source_digest(tmp_path: Path) -> None:
    def route(exchange: Exchange) -> None:
        exchange.answer(200, picture(5, "PNG" if "png" in exchange.path else "JPEG"))

    with Server(route) as server:
        lists = write_list(tmp_path / "list", [server.url("/png"), server.url("/jpeg")])
        _download(lists, tmp_path / "out", content=ContentOptions(short_side=32, quality=80))
    for image, kind in zip(read_finished(tmp_path / "out"), ("PNG", "JPEG"), strict=True):
        data = (tmp_path / "out" / image.path).read_bytes()
        opened = Image.open(io.BytesIO(data))
        assert (opened.format, min(opened.size)) == ("JPEG", 32)
        assert (image.width, image.height) == opened.size
        assert image.path.endswith(".jpg")
        assert image.sha256 == hashlib.sha256(data).hexdigest()
        assert image.source_sha256 == hashlib.sha256(picture(5, kind)).hexdigest()


@pytest.mark.slow
def test_connections_are_reused_and_never_more_than_allowed(tmp_path: Path) -> None:
    busy = threading.Semaphore(3)
    over: list[str] = []

    def route(exchange: Exchange) -> None:
        if not busy.acquire(blocking=False):
            over.append(exchange.path)
        time.sleep(0.01)
        images(exchange)
        busy.release()

    with Server(route) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(150)])
        result = _download(lists, tmp_path / "out", polite=PoliteOptions(per_host=3, concurrency=32), processes=2)
        assert result.totals.ok == 150
        assert not over
        assert server.open_most <= 3
        assert server.connections <= 3


def test_the_rate_of_a_host_is_kept(tmp_path: Path) -> None:
    with Server(images) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(12)])
        _download(lists, tmp_path / "out", polite=PoliteOptions(per_host=4, rate_per_host=8), processes=2)
        times = [when for when, _ in server.log]
    assert times[-1] - times[0] >= 11 / 8 - 0.2


@pytest.mark.slow
def test_a_slow_host_costs_the_others_nothing(tmp_path: Path) -> None:
    def slow(exchange: Exchange) -> None:
        time.sleep(2)
        images(exchange)

    with Server(slow) as tortoise, Server(images) as one, Server(images) as two:
        urls = [tortoise.url(f"/{number}") for number in range(100, 104)]
        urls += [host.url(f"/{number}") for number in range(60) for host in (one, two)]
        result = _download(
            write_list(tmp_path / "list", urls),
            tmp_path / "out",
            polite=PoliteOptions(per_host=2, concurrency=6),
            processes=2,
        )
        assert result.totals.ok == 124
        done = max(when for host in (one, two) for when, _ in host.log)
        assert done < min(when for when, _ in tortoise.log) + 2 + 1.5  # not one after the other


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_and_other_hosts_go_on(tmp_path: Path, form: str) -> None:
    refusals: list[float] = []

    def limited(exchange: Exchange) -> None:
        if not refusals:
            value = "2" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
            refusals.append(time.monotonic())
            exchange.answer(429, Retry_After=value)
        else:
            images(exchange)

    with Server(limited) as host, Server(images) as other:
        urls = [host.url(f"/{number}") for number in range(10)] + [other.url(f"/{number}") for number in range(50, 60)]
        result = _download(
            write_list(tmp_path / "list", urls),
            tmp_path / "out",
            polite=PoliteOptions(per_host=1, retries=2),
            processes=2,
        )
        assert result.totals.ok == 20
        later = [when for when, _ in host.log if when > refusals[0] + 0.001]
        assert min(later) - refusals[0] >= 1.9
        assert max(when for when, _ in other.log) - refusals[0] < 1.9


def test_a_host_that_asks_for_too_much_patience_is_left(tmp_path: Path) -> None:
    with Server(lambda exchange: exchange.answer(429, Retry_After="86400")) as host:
        lists = write_list(tmp_path / "list", [host.url(f"/{number}") for number in range(30)])
        result = _download(lists, tmp_path / "out")
        assert result.totals.failed == {"rate_limited": 30}
        assert sum(host.hits.values()) <= 4


@pytest.mark.slow
def test_a_dead_host_is_given_up_without_asking_for_each_url(tmp_path: Path) -> None:
    with Server(lambda exchange: exchange.reset()) as dead, Server(images) as fine:
        urls = [dead.url(f"/{number}") for number in range(300)] + [fine.url(f"/{number}") for number in range(5)]
        polite = PoliteOptions(per_host=4, retries=1, dead_after=6, probe_pause_s=0.2, backoff_s=0.05)
        result = _download(write_list(tmp_path / "list", urls), tmp_path / "out", polite=polite)
        assert result.totals.failed == {"connect": 300}
        assert result.totals.ok == 5
        assert sum(dead.hits.values()) < 60
        again = _download(
            tmp_path / "list",
            tmp_path / "out",
            polite=polite,
            retry_failed=True,
            fetch=FetchOptions(allow_private=True),
        )
        assert again.totals.failed == {"connect": 300}


@pytest.mark.slow
def test_only_passing_failures_are_tried_again_and_only_when_asked(tmp_path: Path) -> None:
    broken = {"/1": 500, "/2": 404}

    def route(exchange: Exchange) -> None:
        status = broken.get(exchange.path)
        exchange.answer(status) if status else images(exchange)

    with Server(route) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(4)])
        assert _download(lists, tmp_path / "out").totals.failed == {"gone": 1, "http_5xx": 1}
        broken.clear()
        before = server.hits.copy()
        assert _download(lists, tmp_path / "out").totals.failed == {"gone": 1, "http_5xx": 1}
        assert server.hits == before
        result = _download(lists, tmp_path / "out", retry_failed=True)
        assert result.totals.failed == {"gone": 1}
        assert server.hits - before == Counter({"/1": 1})


@pytest.mark.slow
def test_what_a_limit_refused_is_tried_again_once_it_is_lifted(tmp_path: Path) -> None:
    def route(exchange: Exchange) -> None:
        exchange.answer(200, picture(1), **({"X_Robots_Tag": "noai"} if exchange.path == "/kept-out" else {}))

    with Server(route) as server:
        lists, out = write_list(tmp_path / "list", [server.url("/kept-out"), server.url("/wide")]), tmp_path / "out"
        assert _download(lists, out, fetch=FetchOptions()).totals.failed == {"address_refused": 2}
        detail = json.loads((out / "failures.jsonl").read_text().splitlines()[0])["detail"]
        assert detail == "127.0.0.1 is not a public address (--allow-private)"
        narrow = ContentOptions(max_area=100)
        refused = _download(lists, out, retry_failed=True, content=narrow)
        assert refused.totals.failed == {"opted_out": 1, "unwanted_size": 1}
        assert _download(lists, out, retry_failed=True, content=narrow).totals == refused.totals
        assert server.hits == {"/kept-out": 1, "/wide": 1}
        ignoring = FetchOptions(allow_private=True, honour_opt_out=False)
        assert _download(lists, out, retry_failed=True, fetch=ignoring).totals.ok == 2


def test_the_same_bytes_from_many_urls_are_a_placeholder(tmp_path: Path) -> None:
    sign = Image.new("RGB", (200, 120), "white")
    sign.paste("black", (40, 50, 160, 70))
    out = io.BytesIO()
    sign.save(out, "JPEG")

    def route(exchange: Exchange) -> None:
        if "gone" in exchange.path:
            exchange.answer(200, out.getvalue())
        else:
            images(exchange)

    with Server(route) as server:
        urls = [server.url(f"/gone/{number}") for number in range(6)] + [server.url(f"/{n}") for n in range(8)]
        result = _download(write_list(tmp_path / "list", urls), tmp_path / "out", processes=2)
    assert result.totals.failed == {"placeholder": 6}
    assert result.totals.ok == 8
    assert len(_tree(tmp_path / "out")) == 8


@pytest.mark.slow
def test_a_known_placeholder_is_known_when_it_comes_alone_later(tmp_path: Path) -> None:
    sign = picture(3)

    def route(exchange: Exchange) -> None:
        exchange.answer(200, sign if "gone" in exchange.path else picture(int(exchange.path[1:])))

    with Server(route) as server:
        urls = [server.url(f"/gone/{number}") for number in range(10)] + [server.url(f"/{n}") for n in range(20, 28)]
        first = _download(write_list(tmp_path / "list", urls), tmp_path / "out")
        more = tmp_path / "more"
        more.write_text(f"n01440764_777\t{server.url('/gone/777')}\n")
        result = _download(more, tmp_path / "out")
    assert first.totals.failed == {"placeholder": 10}
    assert result.totals.failed == {"placeholder": 11}
    assert len(_tree(tmp_path / "out")) == result.totals.ok == 8


def test_a_list_that_names_each_photograph_often_loses_none(tmp_path: Path) -> None:
    with Server(images) as server:
        urls = [server.url(f"/copy{copy}/{number}") for copy in range(20) for number in (1, 2)]
        result = _download(write_list(tmp_path / "list", urls), tmp_path / "out", processes=2)
    assert result.totals.failed == {}


@pytest.mark.slow
def test_interruption_finishes_what_is_in_hand(tmp_path: Path) -> None:
    with Server(images) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(400)])
        result = download(
            DownloadOptions(urls=(lists,), out=tmp_path / "out", fetch=LOCAL, polite=PoliteOptions(per_host=2)),
            stop=lambda: sum(server.hits.values()) > 40,
        )
        assert isinstance(result.verdict, Interrupted)
        assert 0 < result.totals.pending < 400
        assert result.totals.ok == sum(server.hits.values())
        assert len(_tree(tmp_path / "out")) == result.totals.ok
        assert _download(lists, tmp_path / "out", processes=2).totals.ok == 400
        assert max(server.hits.values()) == 1


@pytest.mark.slow
def test_an_answer_without_a_body_keeps_its_connection(tmp_path: Path) -> None:
    with Server(lambda exchange: exchange.answer(404)) as server:
        _download(write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(60)]), tmp_path / "out")
        assert server.connections <= 4


@pytest.mark.slow
def test_too_many_failures_are_a_failed_run(tmp_path: Path) -> None:
    with Server(lambda exchange: exchange.answer(404)) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(30)])
        assert _download(lists, tmp_path / "all", max_failed_frac=1.0).verdict is None
        verdict = _download(lists, tmp_path / "most", max_failed_frac=0.95).verdict
    assert isinstance(verdict, BudgetError)
    assert "30 gone" in str(verdict)


@pytest.mark.slow
def test_a_run_that_goes_nowhere_is_stopped_early(tmp_path: Path) -> None:
    with Server(lambda exchange: exchange.answer(404)) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(4000)])
        result = _download(lists, tmp_path / "out", max_failed_frac=0.9)
    assert isinstance(result.verdict, BudgetError)
    assert result.totals.pending > 500
    assert result.totals.failed["gone"] >= 1000


def test_one_process_at_a_time(tmp_path: Path) -> None:
    errors: list[DownloadError] = []

    def second(exchange: Exchange) -> None:
        if not errors:
            try:
                _download(tmp_path / "list", tmp_path / "out")
            except DownloadError as error:
                errors.append(error)
        images(exchange)

    with Server(second) as server:
        assert _download(write_list(tmp_path / "list", [server.url("/1")]), tmp_path / "out").totals.ok == 1
    assert "in use" in str(errors[0])


def test_a_foreign_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.sqlite").write_bytes(b"no database at all, but long enough to look like one" * 50)
    with pytest.raises(DownloadError, match="journal"):
        _download(write_list(tmp_path / "list", ["http://a.com/"]), tmp_path / "out")


COMMAND = """
import sys
from pathlib import Path
from imnet_prep.download import DownloadOptions, FetchOptions, PoliteOptions, download
if __name__ == "__main__":
    download(DownloadOptions(urls=(Path(sys.argv[1]),), out=Path(sys.argv[2]), fetch=FetchOptions(allow_private=True),
                             polite=PoliteOptions(per_host=8, retries=1, backoff_s=0.05)))
"""


def _killable(folder: Path, lists: Path) -> subprocess.Popen[bytes]:
    (folder / "run.py").write_text(COMMAND)
    return subprocess.Popen(
        [sys.executable, str(folder / "run.py"), str(lists), str(folder / "out")], start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(12, marks=pytest.mark.long)])
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(tmp_path: Path, kills: int) -> None:
    whole: set[str] = set()  # paths whose image lay under its final name at a kill
    moments = random.Random(7)

    def route(exchange: Exchange) -> None:
        if exchange.path in whole:
            fetched_twice.append(exchange.path)
        time.sleep(0.004)
        number = int(exchange.path.rpartition("/")[2])
        if number % 7 == 0:
            exchange.answer(404)
        elif number % 11 == 0:
            exchange.answer(200, picture(number)[:500])
        else:
            images(exchange)

    fetched_twice: list[str] = []
    with Server(route) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(500)])
        for kill in range(kills):
            process = _killable(tmp_path, lists)
            begun = sum(server.hits.values())
            deadline = time.monotonic() + 30
            while (
                sum(server.hits.values()) < begun + moments.randrange(3, 40)
                and time.monotonic() < deadline
                and process.poll() is None
            ):
                time.sleep(0.003)
            # Now and then only the parent: its workers must then die of themselves.
            if sys.platform == "win32":
                pytest.skip("Windows has nothing like it")
            with contextlib.suppress(ProcessLookupError):  # it may just have come to its end
                (os.kill if kill % 2 else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
            with sqlite3.connect(f"file:{tmp_path}/out/journal.sqlite?mode=ro", uri=True) as journal:
                assert journal.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                good = {row[0] for row in journal.execute("SELECT name FROM urls WHERE state = 1")}
            for path in (tmp_path / "out").glob("n*/*"):
                Image.open(path).load()  # never half written
                assert path.stem in good
                whole.add("/" + path.stem.rpartition("_")[2])
        result = _download(
            lists, tmp_path / "out", polite=PoliteOptions(per_host=8, retries=1, backoff_s=0.05), processes=2
        )
        assert not fetched_twice
        whole.clear()
        calm = _download(
            lists, tmp_path / "calm", polite=PoliteOptions(per_host=8, retries=1, backoff_s=0.05), processes=2
        )
    assert result.totals == calm.totals
    assert _tree(tmp_path / "out") == _tree(tmp_path / "calm")
    reasons = [
        {json.loads(line)["id"]: json.loads(line)["reason"] for line in (tmp_path / name / "failures.jsonl").open()}
        for name in ("out", "calm")
    ]
    assert reasons[0] == reasons[1]


def test_a_worker_that_dies_costs_no_url(tmp_path: Path) -> None:
    killed: list[int] = []

    def route(exchange: Exchange) -> None:
        if exchange.path == "/30" and not killed:
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and _is_worker(entry):
                    killed.append(int(entry.name))
            kill(killed[0])
        images(exchange)

    with Server(route) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(80)])
        result = _download(lists, tmp_path / "out")
    assert killed
    assert result.totals.ok == 80
    assert len(_tree(tmp_path / "out")) == 80


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "certifi.py").write_text("raise ImportError('broken by the test')")
    with Server(images) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(4)])
        with monkeypatch.context() as patch:
            patch.syspath_prepend(broken)  # this process has imported certifi; its workers have not
            with pytest.raises(DownloadError, match="3 times before it was ready; got exit code 1"):
                _download(lists, tmp_path / "out")
        assert _download(lists, tmp_path / "out").totals.ok == 4


BREAKS_THE_CHECK = """
from pathlib import Path
from imnet_prep.images import check
def where():
    return {where!r}
def broken(*arguments, **options):
    raise KeyError("broken by the test")
check.read_header = broken
"""


def test_a_fault_in_the_check_of_an_image_costs_that_url_and_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "certifi.py").write_text(BREAKS_THE_CHECK.format(where=certifi.where()))
    with Server(images) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(4)])
        with monkeypatch.context() as patch:
            patch.syspath_prepend(broken)
            found = _download(lists, tmp_path / "out").totals
        assert (found.ok, found.failed, found.pending) == (0, {"internal": 4}, 0)
        assert _download(lists, tmp_path / "out", retry_failed=True).totals.ok == 4


def _is_worker(entry: Path) -> bool:
    """Say whether a process is a child of ours that runs a download's worker."""
    try:
        parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"spawn_main" in (entry / "cmdline").read_bytes()
    except OSError:
        return False
