"""An answer is never taken for another URL's, whatever a server sends before, in and after it."""

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imnet_prep.download import DownloadOptions, FetchOptions, PoliteOptions, download, read_finished
from imnet_prep.download.addresses import Resolver
from imnet_prep.download.fetch import Body, Failure, Fetcher
from tests.imnet_prep.download.servers import Exchange, Server, picture, write_list

Stream = Iterator[bytes | float | None]  # bytes to send, seconds to wait, None to close
HEAD = b"HTTP/1.1 200 OK\r\n"


def payload(path: str) -> bytes:
    """Return the body of a path, which no other path has."""
    return b"".join(
        hashlib.sha256(f"{path} {part}".encode()).digest() for part in range(random.Random(path).randrange(1, 400))
    )


def _length(body: bytes, *more: bytes) -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in (b"Content-Length: %d" % len(body), *more)) + b"\r\n" + body


def _chunked(body: bytes, rng: random.Random, end: bytes = b"0\r\n\r\n") -> bytes:
    parts, at = [], 0
    while at < len(body):
        piece = body[at : at + rng.randrange(1, 5000)]
        extension = rng.choice([b"", b"", b";x=y", b" "])
        parts.append(rng.choice([b"%x", b"%X", b"%04x"]) % len(piece) + extension + b"\r\n" + piece + b"\r\n")
        at += len(piece)
    return HEAD + b"Transfer-Encoding: " + rng.choice([b"chunked", b"Chunked"]) + b"\r\n\r\n" + b"".join(parts) + end


def _interim(rng: random.Random) -> Stream:
    for _ in range(rng.randrange(3)):
        status = rng.choice([100, 102, 103, 103, 199])
        yield (
            b"HTTP/1.1 %d X\r\n" % status + rng.choice([b"", b"Link: </a.css>\r\n", b"Content-Length: 5\r\n"]) + b"\r\n"
        )
        if rng.random() < 0.5:
            yield rng.choice([0.001, 0.01])


WELL_FORMED: list[Callable[[bytes, random.Random], bytes]] = [
    lambda body, rng: _length(body),
    lambda body, rng: _length(body, b"X-Filler: " + b"a" * rng.randrange(3000)),
    lambda body, rng: _length(body, b"Content-Length: %d" % len(body)),
    lambda body, rng: _length(body, b"Connection: keep-alive", b"Set-Cookie: a=b"),
    _chunked,
    lambda body, rng: _chunked(body, rng, b"0\r\nX-Trailer: a\r\n\r\n"),
    lambda body, rng: _length(body).replace(b"\r\n", b"\n", 3) if b"\r\n" not in body else _length(body),
]
MALFORMED: list[Callable[[bytes, random.Random], bytes]] = [
    lambda body, rng: _length(body) * 2,
    lambda body, rng: _length(body) + _chunked(payload("/another"), rng),
    lambda body, rng: _length(body) + rng.randbytes(rng.randrange(1, 9000)),
    lambda body, rng: _length(body).replace(b"%d" % len(body), b"%d" % (len(body) // 2), 1),
    lambda body, rng: _length(body).replace(b"Length: ", b"Length: " + rng.choice([b"+", b"-", b"0x"])),
    lambda body, rng: _length(body, b"Content-Length: %d" % (len(body) + 7)),
    lambda body, rng: _length(body, b"Transfer-Encoding: chunked"),
    lambda body, rng: _length(body, b"Transfer-Encoding: gzip, chunked"),
    lambda body, rng: _chunked(body, rng, b"-1\r\n" + bytes(100)),
    lambda body, rng: _chunked(body, rng, b"+0\r\n\r\n"),
    lambda body, rng: _chunked(body, rng, b"0_0\r\n\r\n"),
    lambda body, rng: _chunked(body, rng, b"zz\r\n"),
    lambda body, rng: _chunked(body, rng) + _length(payload("/another")),
    lambda body, rng: rng.randbytes(20) + _length(body),
    lambda body, rng: b"HTTP/1.1 204 No Content\r\n\r\n" + _length(body),
    lambda body, rng: b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n" + _length(body),
    lambda body, rng: b"HTTP/1.1 404 Gone\r\nContent-Length: 3\r\n\r\n" + _length(body),
    lambda body, rng: b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n" + _length(body),
    lambda body, rng: b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n" + _length(body),
]  # fmt: skip


def stream(path: str) -> tuple[bool, Stream]:
    """Return whether the answer to a path is well formed, and what the server does."""
    rng = random.Random(f"stream {path}")
    body = payload(path)
    good = rng.random() < 0.4

    def parts() -> Stream:
        yield from _interim(rng)
        answer = rng.choice(WELL_FORMED if good else MALFORMED)(body, rng)
        if not good and rng.random() < 0.2:  # an early end
            yield answer[: rng.randrange(len(answer))]
            yield None
        elif rng.random() < 0.3:
            cut = rng.randrange(len(answer))
            yield answer[:cut]
            yield 0.001
            yield answer[cut:]
        else:
            yield answer

    return good, parts()


def play(exchange: Exchange) -> None:
    for part in stream(exchange.path)[1]:
        if part is None:
            exchange.drop()
        elif isinstance(part, float):
            time.sleep(part)
        else:
            exchange.raw(part)


def fetch_all(count: int) -> Counter[str]:
    """Fetch ``count`` paths in 8 threads over shared connections; fail on any body that is not the path's own."""
    seen = Counter[str]()
    with Server(play) as server, Server(play) as other:
        fetcher = Fetcher(FetchOptions(allow_private=True, timeout_s=3), 8, Resolver())

        def one(number: int) -> tuple[bool, str]:
            path = f"/{number}"
            good = stream(path)[0]
            found = fetcher.fetch((other if number % 5 == 0 else server).url(path), 0)
            assert not isinstance(found, Body) or payload(path).startswith(found.data), f"{path}: another's answer"
            assert not good or (isinstance(found, Body) and found.data == payload(path)), (path, found)
            return good, "stored" if isinstance(found, Body) else found.reason if isinstance(found, Failure) else "hop"

        with ThreadPoolExecutor(8) as threads:
            for good, end in threads.map(one, range(count)):
                seen[end] += 1
                seen["good"] += good
    return seen


@pytest.mark.slow
def test_random_answers_never_reach_another_url() -> None:
    seen = fetch_all(600)
    assert seen["good"] >= 180
    assert seen["stored"] >= seen["good"]


@pytest.mark.long
def test_twenty_thousand_random_answers_never_reach_another_url() -> None:
    seen = fetch_all(20_000)
    assert seen["good"] >= 6_000
    assert seen["stored"] >= seen["good"]


def _early_hints(x: Exchange) -> None:
    body = picture(int(x.path[1:-4]))
    if int(x.path[1:-4]) % 3 == 0:
        x.raw(b"HTTP/1.1 %d Early Hints\r\nLink: </style.css>\r\n\r\n" % (102 + int(x.path[1:-4]) % 2))
        time.sleep(0.01)  # as a server waits for its backend
    x.answer(200, body)


def _twice(x: Exchange) -> None:
    x.answer(200, picture(int(x.path[1:-4])))
    x.answer(200, picture(int(x.path[1:-4])))


@pytest.mark.parametrize("route", [_early_hints, _twice])
def test_every_photograph_is_its_own(route: Callable[[Exchange], None], tmp_path: Path) -> None:
    with Server(route) as server:
        urls = write_list(tmp_path / "list.txt", [server.url(f"/{number}.jpg") for number in range(90)])
        fetch = FetchOptions(allow_private=True, timeout_s=5)
        result = download(DownloadOptions((urls,), tmp_path / "out", fetch=fetch, polite=PoliteOptions(per_host=3)))
        assert result.totals.ok == 90
        assert route is _twice or server.connections <= 3
    for image in read_finished(tmp_path / "out"):
        assert image.sha256 == hashlib.sha256(picture(int(image.name.partition("_")[2]))).hexdigest()


def test_a_second_answer_that_comes_a_little_later_is_not_taken_for_the_next() -> None:
    def twice(x: Exchange) -> None:
        x.answer(200, payload(x.path))
        time.sleep(0.03)  # the client has read its answer, and would use the connection again
        x.answer(200, payload(x.path))

    with Server(twice) as server:
        fetcher = Fetcher(FetchOptions(allow_private=True, timeout_s=5), 1, Resolver())
        for path in ("/0", "/1", "/2"):
            found = fetcher.fetch(server.url(path), 0)
            assert isinstance(found, Body), found
            assert found.data == payload(path)


def test_what_follows_an_answer_later_ends_the_reuse_of_a_hosts_connections() -> None:
    followed = threading.Event()

    def late(x: Exchange) -> None:
        x.answer(200, payload(x.path))
        if x.path == "/1":
            time.sleep(0.05)  # by now the client has read its answer
            x.raw(_length(payload("/another")))
            followed.set()

    with Server(late) as server:
        fetcher = Fetcher(FetchOptions(allow_private=True, timeout_s=5), 1, Resolver())

        def fetch(path: str) -> tuple[bytes, int]:
            found = fetcher.fetch(server.url(path), 0)
            assert isinstance(found, Body), found
            return found.data, server.connections

        assert fetch("/0") == (payload("/0"), 1)
        assert fetch("/1") == (payload("/1"), 1)
        assert followed.wait(10)
        assert fetch("/2") == (payload("/2"), 2)
        assert fetch("/3") == (payload("/3"), 3), "a host that does this once is not trusted again"


def test_a_negative_chunk_size_does_not_read_to_the_end_of_the_stream() -> None:
    sent = 0
    ended = threading.Event()

    def endless(x: Exchange) -> None:
        nonlocal sent
        x.drop()
        x.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n")
        try:
            while sent < 64 << 20:
                x.raw(bytes(1 << 20))
                sent += 1 << 20
        finally:
            ended.set()

    with Server(endless) as server:
        found = Fetcher(FetchOptions(allow_private=True, timeout_s=5), 1, Resolver()).fetch(server.url("/1.jpg"), 0)
        assert ended.wait(10)
    assert isinstance(found, Failure)
    assert "chunk of size" in found.detail
    assert sent < 64 << 20
