"""Every way a server can misbehave ends in the right reason, in time, and no URL is lost."""

from __future__ import annotations

import gzip
import io
import json
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imnet_prep.download import DownloadOptions, DownloadResult, FetchOptions, PoliteOptions, download, read_finished
from tests.imnet_prep.download.servers import Exchange, Server, picture, write_list

GOOD = picture(1)
MAX_BYTES = 300_000
TIMEOUT_S = 2.5


def _plain(kind: str, size: tuple[int, int] = (64, 64), colour: str = "grey") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def _animated() -> bytes:
    out = io.BytesIO()
    frames = [Image.open(io.BytesIO(picture(seed))) for seed in (1, 2)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def _drip(exchange: Exchange, data: bytes) -> None:
    for at in range(len(data)):
        exchange.raw(data[at : at + 1])
        time.sleep(0.2)


def _endless_chunks(exchange: Exchange) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"4000\r\n" + b"\xff\xd8" * 0x2000 + b"\r\n"
    while True:
        exchange.raw(piece)


def _endless_continue(exchange: Exchange) -> None:
    while True:
        exchange.raw(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


@dataclass
class _Bad:
    """A route of many faults; the path names the fault."""

    first: dict[str, float]
    lock: threading.Lock

    def __call__(self, exchange: Exchange) -> None:
        name = exchange.path.strip("/").partition("?")[0].partition("/")[0]
        handler = getattr(self, "do_" + name.replace("-", "_").removesuffix(".jpg"), None)
        if handler is None:
            exchange.answer(404)
        else:
            handler(exchange)

    def _nth(self, exchange: Exchange) -> int:
        return exchange.server.hits[exchange.path]

    def do_ok(self, x: Exchange) -> None:
        x.answer(200, picture(1000 + sum(x.path.encode())))

    def do_drip(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        _drip(x, GOOD)

    def do_drip_headers(self, x: Exchange) -> None:
        _drip(x, b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 1000)

    def do_silent(self, x: Exchange) -> None:
        time.sleep(4)
        x.drop()

    def do_reset_body(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + GOOD[:1000])
        time.sleep(0.05)
        x.reset()

    def do_reset_twice(self, x: Exchange) -> None:
        if self._nth(x) <= 2:
            x.reset()
        else:
            x.answer(200, picture(7))

    def do_too_long(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(GOOD) + 100) + GOOD)
        x.drop()

    def do_too_short(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(GOOD) // 2) + GOOD)
        x.drop()

    def do_gzip_bomb(self, x: Exchange) -> None:
        x.answer(200, gzip.compress(b"\xff\xd8" + bytes(50_000_000)), Content_Encoding="gzip")

    def do_deflate_bomb(self, x: Exchange) -> None:
        x.answer(200, zlib.compress(bytes(50_000_000)), Content_Encoding="deflate")

    def do_gzip_good(self, x: Exchange) -> None:
        x.answer(200, gzip.compress(picture(8)), Content_Encoding="gzip")

    def do_gzip_lie(self, x: Exchange) -> None:
        x.answer(200, picture(9), Content_Encoding="gzip")

    def do_gzip_cut(self, x: Exchange) -> None:
        x.answer(200, gzip.compress(GOOD)[:-200], Content_Encoding="gzip")

    def do_brotli(self, x: Exchange) -> None:
        x.answer(200, GOOD, Content_Encoding="br")

    def do_endless(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            x.raw(bytes(65536))

    def do_endless_chunks(self, x: Exchange) -> None:
        _endless_chunks(x)

    def do_endless_continue(self, x: Exchange) -> None:
        _endless_continue(x)

    def do_declared_large(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n")
        time.sleep(1)

    def do_no_length(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.0 200 OK\r\n\r\n" + picture(10))
        x.drop()

    def do_chunked(self, x: Exchange) -> None:
        data = picture(11)
        x.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(data), 1000):
            part = data[at : at + 1000]
            x.raw(b"%x\r\n" % len(part) + part + b"\r\n")
        x.raw(b"0\r\n\r\n")

    def do_chunked_cut(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n" + GOOD[:50])
        x.drop()

    def do_loop(self, x: Exchange) -> None:
        x.answer(301, Location="/loop")

    def do_ping(self, x: Exchange) -> None:
        x.answer(302, Location=x.server.url("/pong"))

    def do_pong(self, x: Exchange) -> None:
        x.answer(302, Location=x.server.url("/ping"))

    def do_to(self, x: Exchange) -> None:
        place = x.path.partition("?")[2]
        x.answer(302, Location=place)

    def do_no_location(self, x: Exchange) -> None:
        x.answer(302)

    def do_status(self, x: Exchange) -> None:
        status = int(x.path.rpartition("/")[2])
        if status in (204, 304):
            x.raw(f"HTTP/1.1 {status} X\r\n\r\n".encode())
        else:
            x.answer(status, b"<html>no</html>")

    def do_partial(self, x: Exchange) -> None:
        x.answer(206, GOOD)

    def do_junk(self, x: Exchange) -> None:
        x.raw(b"\x00\x01\x02SSH-2.0-junk\r\n\r\n")
        x.drop()

    def do_http09(self, x: Exchange) -> None:
        x.raw(GOOD)
        x.drop()

    def do_close(self, x: Exchange) -> None:
        x.drop()

    def do_many_headers(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 5000 + b"\r\n")
        x.drop()

    def do_long_header(self, x: Exchange) -> None:
        x.raw(b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * 200_000 + b"\r\n\r\n")
        x.drop()

    def do_busy_then_fine(self, x: Exchange) -> None:
        if self._nth(x) <= 2:
            x.answer(503)
        else:
            x.answer(200, picture(12))

    def do_empty(self, x: Exchange) -> None:
        x.answer(200)

    def do_html(self, x: Exchange) -> None:
        x.answer(200, b"<!DOCTYPE html><p>gone", Content_Type="image/jpeg")

    def do_cut_jpeg(self, x: Exchange) -> None:
        x.answer(200, GOOD[: len(GOOD) * 2 // 3])

    def do_png(self, x: Exchange) -> None:
        x.answer(200, picture(13, "PNG"), Content_Type="image/jpeg")

    def do_webp(self, x: Exchange) -> None:
        x.answer(200, picture(14, "WEBP"))

    def do_pixel(self, x: Exchange) -> None:
        x.answer(200, _plain("GIF", (1, 1)))

    def do_one_colour(self, x: Exchange) -> None:
        x.answer(200, _plain("JPEG", (200, 150)))

    def do_animated(self, x: Exchange) -> None:
        x.answer(200, _animated())

    def do_noai(self, x: Exchange) -> None:
        x.answer(200, GOOD, X_Robots_Tag="noindex, NoAI")

    def do_noai_other(self, x: Exchange) -> None:
        x.answer(200, picture(15), X_Robots_Tag="otherbot: noai")

    def do_lost(self, x: Exchange) -> None:
        x.answer(302, Location="/images/photo_unavailable_l.png")


OK_CASES = [
    "/ok/a", "/ok/b b", "/ok/é", "/reset-twice", "/gzip-good", "/gzip-lie", "/no-length", "/chunked", "/to?/ok/c",
    "/to?../ok/d", "/to?//{authority}/ok/e", "/busy-then-fine", "/png.jpg", "/webp", "/noai-other", "/to?/ok/ü f",
]  # fmt: skip
FAILED_CASES = {
    "/drip": "too_slow", "/drip-headers": "timeout", "/silent": "timeout", "/reset-body": "truncated",
    "/too-long": "truncated", "/too-short": "truncated", "/gzip-bomb": "too_large", "/deflate-bomb": "too_large",
    "/gzip-cut": "truncated", "/brotli": "not_an_image", "/endless": "too_large", "/endless-chunks": "too_large",
    "/endless-continue": "timeout", "/declared-large": "too_large", "/chunked-cut": "truncated",
    "/loop": "redirect_refused", "/ping": "redirect_refused", "/to?file:///etc/passwd": "redirect_refused",
    "/to?ftp://127.0.0.1/x": "redirect_refused", "/to?data:image/png;base64,AA": "redirect_refused",
    "/to?": "redirect_refused", "/no-location": "redirect_refused", "/status/300": "redirect_refused",
    "/status/204": "not_an_image", "/status/304": "redirect_refused", "/status/201": "not_an_image",
    "/status/404": "gone", "/status/410": "gone", "/status/403": "http_4xx", "/status/451": "http_4xx",
    "/status/500": "http_5xx", "/status/599": "http_5xx", "/status/999": "http_4xx", "/partial": "truncated",
    "/junk": "connect", "/http09": "connect", "/close": "connect", "/many-headers": "too_large",
    "/long-header": "too_large", "/empty": "not_an_image", "/html": "not_an_image", "/cut-jpeg": "truncated",
    "/pixel": "placeholder", "/one-colour": "placeholder", "/animated": "not_an_image", "/noai": "opted_out",
    "/lost": "placeholder",
}  # fmt: skip
OTHER_CASES = {
    "http://does-not-exist.invalid/x.jpg": "dns",
    "http://127.0.0.1:9/refused.jpg": "connect",
    "https://127.0.0.1:{port}/plain-as-tls.jpg": "tls",
    "https://127.0.0.1:{tls_port}/self-signed.jpg": "tls",
    "http://127.0.0.1:{port}/images/photo_unavailable.png": "placeholder",
}


@dataclass
class _Seen:
    result: DownloadResult
    out: Path
    paths: dict[str, str]  # id -> case
    server: Server
    seconds: float

    def failures(self) -> dict[str, dict[str, Any]]:
        lines = (self.out / "failures.jsonl").read_text("utf-8").splitlines()
        return {self.paths[item["id"]]: item for item in map(json.loads, lines)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Seen]:
    """One run over every case at once: also the proof that no case disturbs another."""
    folder = tmp_path_factory.mktemp("faults")
    with Server(_Bad({}, threading.Lock())) as server, Server(lambda x: x.answer(200, GOOD), tls=True) as tls:
        authority = f"127.0.0.1:{server.port}"
        cases = [*OK_CASES, *FAILED_CASES, *OTHER_CASES]
        urls = [case if "://" in case[:8] else server.url(case) for case in cases]
        urls = [
            url.replace("{port}", str(server.port))
            .replace("{tls_port}", str(tls.port))
            .replace("{authority}", authority)
            for url in urls
        ]
        options = DownloadOptions(
            urls=(write_list(folder / "list.txt", urls),),
            out=folder / "out",
            fetch=FetchOptions(timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES, allow_private=True),
            polite=PoliteOptions(per_host=24, retries=2, backoff_s=0.05, dead_after=100),
        )
        begun = time.monotonic()
        result = download(options)
        seconds = time.monotonic() - begun
        paths = {f"n01440764_{number}": case for number, case in enumerate(cases)}
        yield _Seen(result, folder / "out", paths, server, seconds)


def test_every_url_is_accounted_for(seen: _Seen) -> None:
    totals = seen.result.totals
    assert totals.requested == len(seen.paths)
    assert totals.requested == totals.ok + sum(totals.failed.values()) + totals.pending
    assert totals.pending == 0
    assert seen.result.verdict is None


@pytest.mark.parametrize("case", OK_CASES)
def test_a_good_answer_lands_whole(seen: _Seen, case: str) -> None:
    good = {seen.paths[image.name]: image for image in read_finished(seen.out)}
    assert case in good, seen.failures()[case]
    Image.open(seen.out / good[case].path).load()


@pytest.mark.parametrize(("case", "reason"), [*FAILED_CASES.items(), *OTHER_CASES.items()])
def test_a_bad_answer_ends_with_its_reason(seen: _Seen, case: str, reason: str) -> None:
    failures = seen.failures()
    assert case in failures, "it was taken for an image"
    assert failures[case]["reason"] == reason, failures[case]


def test_nothing_hangs_beyond_its_deadline(seen: _Seen) -> None:
    # The slowest are three attempts that each take the whole time limit, and the pauses between them.
    assert seen.seconds < 3 * TIMEOUT_S + 20


def test_the_extension_is_the_real_format(seen: _Seen) -> None:
    found = {seen.paths[image.name]: image.path.rpartition(".")[2] for image in read_finished(seen.out)}
    assert found["/png.jpg"] == "png"
    assert found["/webp"] == "webp"
    assert found["/ok/a"] == "jpg"


def test_nothing_else_lies_in_the_folder(seen: _Seen) -> None:
    images = {image.path for image in read_finished(seen.out)}
    on_disk = {str(path.relative_to(seen.out)) for path in seen.out.glob("n*/*")}
    assert on_disk == images
    assert not list((seen.out / ".incoming").iterdir())


def test_permanent_failures_are_asked_once_and_passing_ones_again(seen: _Seen) -> None:
    hits = seen.server.hits
    assert hits["/status/404"] == 1
    assert hits["/cut-jpeg"] == 1
    assert hits["/html"] == 1
    assert hits["/status/500"] == 3
    assert hits["/reset-body"] == 3


def test_the_client_says_who_it_is(seen: _Seen) -> None:
    assert all(agent.startswith("imnet-prep/") for agent in seen.server.user_agents)
