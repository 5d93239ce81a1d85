"""A real HTTP server on 127.0.0.1 that misbehaves on demand, and counts what it sees."""

from __future__ import annotations

import functools
import io
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data"


@functools.cache
def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (96, 72)) -> bytes:
    """Draw a picture like no other: smooth colours under noise, in any format of Pillow's."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
    pixels = np.clip(smooth + rng.integers(-24, 25, smooth.shape), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return out.getvalue()


@dataclass
class Exchange:
    """One request on one connection, to be answered in whatever way."""

    server: Server
    sock: socket.socket
    path: str
    headers: dict[str, str]
    keep: bool = True

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def drop(self) -> None:
        """End the connection after this."""
        self.keep = False

    def reset(self) -> None:
        """End it with a RST, as a crashed host does."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.sock.close()
        self.keep = False


Route = Callable[[Exchange], None]


@dataclass
class Server:
    """Serves ``route`` for every request, a thread a connection.

    Attributes:
        route: Answers an exchange.
        tls: Speak TLS with the self-signed certificate of ``data``.
        hits: Requests by path. log: (time.monotonic, path). open_now, open_most: Connections.
        peers: Connections by the address that they came from.
    """

    route: Route
    tls: bool = False
    family: int = socket.AF_INET
    address: str = "127.0.0.1"
    hits: Counter[str] = field(default_factory=Counter)
    log: list[tuple[float, str]] = field(default_factory=list)
    open_now: int = 0
    open_most: int = 0
    connections: int = 0
    peers: Counter[str] = field(default_factory=Counter)
    port: int = 0
    host_headers: set[str] = field(default_factory=set)
    user_agents: set[str] = field(default_factory=set)

    def __enter__(self) -> Server:
        self._lock = threading.Lock()
        self._closing = False
        self._listener = socket.socket(self.family)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((self.address, 0))
        self._listener.listen(512)
        self.port = self._listener.getsockname()[1]
        self._socks: set[socket.socket] = set()
        self._context: ssl.SSLContext | None = None
        if self.tls:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(DATA / "localhost.crt", DATA / "localhost.key")
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._listener.close()
        with self._lock:
            for sock in self._socks:
                sock.close()

    def url(self, path: str) -> str:
        shown = f"[{self.address}]" if ":" in self.address else self.address
        return f"http{'s' if self.tls else ''}://{shown}:{self.port}{path}"

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock, peer[0]), daemon=True).start()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        with self._lock:
            self._socks.add(sock)
            self.connections += 1
            self.peers[peer] += 1
            self.open_now += 1
            self.open_most = max(self.open_most, self.open_now)
        try:
            if self._context:
                sock = self._context.wrap_socket(sock, server_side=True)
            self._talk(sock)
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                self.open_now -= 1
                self._socks.discard(sock)
            sock.close()

    def _talk(self, sock: socket.socket) -> None:
        reader = sock.makefile("rb")
        if reader.peek(1)[:1] == b"\x16":  # a TLS ClientHello on a plain port
            sock.sendall(b"HTTP/1.1 400 X\r\nContent-Length: 0\r\n\r\n")
            return
        keep = True
        while keep and (first := reader.readline()):
            path = first.split()[1].decode("latin-1")
            headers = {}
            while (line := reader.readline().strip()) != b"":
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            with self._lock:
                self.hits[path] += 1
                self.log.append((time.monotonic(), path))
                self.host_headers.add(headers.get("host", ""))
                self.user_agents.add(headers.get("user-agent", ""))
            exchange = Exchange(self, sock, path, headers)
            self.route(exchange)
            keep = exchange.keep


def images(exchange: Exchange) -> None:
    """Answer any path with its own picture: ``/17`` or ``/x/17.jpg`` is picture 17."""
    digits = "".join(char for char in exchange.path.rpartition("/")[2] if char.isdigit())
    exchange.answer(200, picture(int(digits or 0)), Content_Type="image/jpeg")


def write_list(path: Path, urls: list[str], wnid: str = "n01440764") -> Path:
    """Write a list in the fall11 form, ids counted from 0."""
    path.write_text("".join(f"{wnid}_{number}\t{url}\n" for number, url in enumerate(urls)), encoding="utf-8")
    return path
