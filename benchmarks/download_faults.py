"""`imnet-prep download` beside img2dataset on eight local hosts that misbehave as the web does.

Command::

    python -m benchmarks.download_faults --peer .venv-img2dataset

Of 1,000 URLs half are good; the others answer 404, a page of HTML, a cut body, 503 twice and then the image, 429 once,
the image after two seconds, 103 before the image, or a redirect to itself. Both tools have the same time limit,
number of retries and number of connections, and store the bytes as they came. Images are counted, and compared with
what was served by SHA-256.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

HOSTS, CONNECTIONS, TIMEOUT_S, RETRIES = 8, 64, 10, 3
KINDS = ["ok"] * 8 + ["gone", "html", "cut", "busy", "limited", "slow", "hints", "loop"]


@cache
def picture(number: int) -> bytes:
    """Return the JPEG of a number, like no other."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    coarse.save(out, "JPEG", quality=90)
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers ``/<kind>/<number>.jpg``."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[Counter[str]] = Counter()
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_GET(self) -> None:
        _, kind, name = self.path.split("/")
        body = picture(int(name.partition(".")[0]))
        with self.lock:
            self.seen[self.path] += 1
            times = self.seen[self.path]
        if kind == "gone":
            self.reply(404, b"gone")
        elif kind == "html":
            self.reply(200, b"<html>no image here</html>")
        elif (kind == "busy" and times <= 2) or (kind == "limited" and times == 1):
            self.reply(503 if kind == "busy" else 429, b"later")
        elif kind == "loop":
            self.reply(302, b"", Location=self.path)
        elif kind == "cut":
            self.reply(200, body[: len(body) // 2], length=len(body))
            self.close_connection = True
        else:
            if kind == "slow":
                time.sleep(2)
            if kind == "hints":
                self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
            self.reply(200, body)

    def reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A host."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that close a connection before they have the whole answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="virtual environment with img2dataset")
    args = parser.parse_args()
    servers = [Server(("127.0.0.1", 0), Handler) for _ in range(HOSTS)]
    for server in servers:
        server.socket.listen(512)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = []
    for number in range(args.count):
        port = servers[number % HOSTS].server_port
        urls.append(f"http://127.0.0.1:{port}/{KINDS[(number // HOSTS + number) % len(KINDS)]}/{number}.jpg")
        picture(number)
    expected = {hashlib.sha256(picture(number)).hexdigest() for number in range(args.count)}
    there = sum(url.split("/")[3] in ("ok", "busy", "limited", "slow", "hints") for url in urls)
    print(f"{args.count} URLs on {HOSTS} hosts, {there} of them can be had")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for tool in (ours, *([peer] if args.peer else [])):
                Handler.seen.clear()
                work = Path(folder) / tool.__name__
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                begun = time.monotonic()
                found = tool(urls, work, args.peer)
                seconds = time.monotonic() - begun
                right = len(found & expected)
                result = {"tool": tool.__name__, "images": len(found), "right": right, "seconds": round(seconds, 1)}
                print(json.dumps(result | {"requests": Handler.seen.total()}), flush=True)
        Handler.seen.clear()
        ours(urls, Path(folder) / "ours", None)
        again = Handler.seen.total()
        ours(urls, Path(folder) / "ours", None, "--retry-failed")
        print(json.dumps({"requests of a second run": again, "with --retry-failed": Handler.seen.total()}))


def ours(urls: list[str], work: Path, _: Path | None, *more: str) -> set[str]:
    """Return the digests of the images that we store."""
    (work / "urls.txt").write_text("".join(f"n01440764_{number}\t{url}\n" for number, url in enumerate(urls)))
    command = [
        sys.executable, "-m", "imnet_prep", "download", "--urls", str(work / "urls.txt"), "--out", str(work / "out"),
        "--timeout-s", str(TIMEOUT_S), "--retries", str(RETRIES), "--concurrency", str(CONNECTIONS),
        "--per-host", str(CONNECTIONS // HOSTS), "--allow-private", *more,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in (work / "out").glob("n*/*")}


def peer(urls: list[str], work: Path, venv: Path) -> set[str]:
    """Return the digests of the images that img2dataset stores."""
    (work / "urls.txt").write_text("\n".join(urls) + "\n")
    command = [
        str(venv / "bin" / "img2dataset"), "--url_list", str(work / "urls.txt"), "--output_folder", str(work / "out"),
        "--processes_count", "2", "--thread_count", str(CONNECTIONS // 2), "--timeout", str(TIMEOUT_S),
        "--retries", str(RETRIES), "--resize_mode", "no", "--disable_all_reencoding", "True",
        "--output_format", "files", "--number_sample_per_shard", str(-(-len(urls) // 2)),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in (work / "out").glob("*/*.jpg")}


if __name__ == "__main__":
    main()
