"""A folder behind a web server that does what a test says: slow, cut, refused, changed or held answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 1 << 16


class Server(ThreadingHTTPServer):
    """Serves a folder, with ranges.

    Attributes:
        url: Of the folder.
        pause_s: Seconds before each piece of 64 KiB.
        cut: Whether every third answer ends in its middle.
        refused: Paths that end so are answered with 403.
        held: Paths that end so are not answered while they are here.
        changed: Paths, and how often they are still answered with one bit changed.
        answers: Answers with a body so far.
    """

    def __init__(self, folder: Path, pause_s: float = 0, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.pause_s, self.cut, self.answers = pause_s, False, 0
        self.refused: set[str] = set()
        self.held: set[str] = set()
        self.changed: dict[str, int] = {}
        self.lock = threading.Lock()
        super().__init__(address, partial(_Handler, directory=str(folder)))
        self.url = f"http://{address[0]}:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that were killed."""


class _Handler(SimpleHTTPRequestHandler):
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
        while self.path.endswith(tuple(self.server.held)):
            time.sleep(0.01)
        if not path.is_file() or self.path.endswith(tuple(self.server.refused)):
            self.send_error(403 if path.is_file() else 404)
            return
        stat, span = path.stat(), self.headers.get("Range")
        first, last = (int(part) for part in span.removeprefix("bytes=").split("-")) if span else (0, stat.st_size - 1)
        last = min(last, stat.st_size - 1)
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{stat.st_size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{stat.st_mtime_ns}-{stat.st_size}"')
        self.end_headers()
        if body:
            with path.open("rb") as file:
                file.seek(first)
                self.send(file.read(last + 1 - first))

    def send(self, part: bytes) -> None:
        with self.server.lock:
            self.server.answers += 1
            cut = self.server.cut and self.server.answers % 3 == 0
            if len(part) > 1 and self.server.changed.get(self.path):  # one byte asks whether there are ranges
                self.server.changed[self.path] -= 1
                part = part[:-1] + bytes([part[-1] ^ 1])
        if cut:
            part, self.close_connection = part[: len(part) // 2], True
        for start in range(0, len(part), PIECE):
            if self.server.pause_s:
                time.sleep(self.server.pause_s)
            self.wfile.write(part[start : start + PIECE])


@contextmanager
def served(folder: Path, *, pause_s: float = 0) -> Iterator[Server]:
    """Serve a folder."""
    server = Server(folder, pause_s)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.held.clear()
        server.shutdown()
        server.server_close()
