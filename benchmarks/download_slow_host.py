"""What one host that answers after 5 seconds costs ten fast ones, in `imnet-prep download`.

Command::

    python -m benchmarks.download_slow_host --images ../shared/data/imagenet-samples-250.tar --count 5000

The ten hosts are ten loopback addresses of one nginx; the slow one is a server of its own. Runs with and without it
alternate. The rate is that of the fast hosts' images, from the run's first end of a fetch to the last one of theirs, by
the journal's times; medians are given.
"""

from __future__ import annotations

import argparse
import http.server
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks import photographs
from benchmarks.download import served

HOSTS = [f"127.0.0.{number}" for number in range(1, 11)]
SLOW, ANSWER_S, EVERY = "127.0.0.11", 5.0, 250  # one URL in 250 is the slow host's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder or a tar of JPEGs (default: made, see photographs.py)")
    parser.add_argument("--count", type=int, default=5000, help="URLs of the fast hosts in a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        loaded = photographs.load(args.images)
        loaded.write(work / "www", len(loaded.files))
        photos = sorted(path for path in (work / "www").rglob("*") if path.is_file())
        with served(work / "www", work, HOSTS) as (server, base), slow_host(photos[0].read_bytes()) as slow_base:
            if server != "nginx":
                raise SystemExit("this benchmark needs nginx: ten addresses, and a server that is not what is measured")
            port = base.rpartition(":")[2]
            fast = [
                f"http://{HOSTS[n % 10]}:{port}/{photos[n % len(photos)].relative_to(work / 'www')}?copy={n}"
                for n in range(args.count)
            ]
            rates: dict[str, list[float]] = {"without": [], "with": []}
            for number in range(args.rounds + 1):
                for kind, found in rates.items():
                    rate = run(fast, slow_base if kind == "with" else None, Path(tempfile.mkdtemp(dir=work)))
                    print(f"round {number} {kind}: {rate:.0f} images/s", file=sys.stderr)
                    if number:  # the first round warms caches
                        found.append(rate)
    ratio = statistics.median(b / a for a, b in zip(rates["without"], rates["with"], strict=True))
    medians = {kind: round(statistics.median(found), 1) for kind, found in rates.items()}
    print(json.dumps({**medians, "with_of_without": round(ratio, 3), "server": server, "rounds": args.rounds}))


@contextmanager
def slow_host(photo: bytes) -> Iterator[str]:
    """Serve one photograph after :data:`ANSWER_S`; yields the base URL."""

    class Slow(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(ANSWER_S)
            self.send_response(200)
            self.send_header("Content-Length", str(len(photo)))
            self.end_headers()
            self.wfile.write(photo)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((SLOW, 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{SLOW}:{server.server_address[1]}"
        server.shutdown()


def run(fast: list[str], slow_base: str | None, work: Path) -> float:
    """Download, and give the fast hosts' images/s."""
    urls: list[str] = []
    for number, url in enumerate(fast):
        urls.append(url)
        if slow_base and number % EVERY == 0:
            urls.append(f"{slow_base}/{number}.jpg")
    (work / "list.txt").write_text("".join(f"n00000001_{n}\t{url}\n" for n, url in enumerate(urls)))
    command = [sys.executable, "-m", "imnet_prep", "download"]
    command += ["--urls", str(work / "list.txt"), "--out", str(work / "out"), "--allow-private", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if (ok := json.loads(done.stdout)["ok"]) != len(urls):
        raise SystemExit(f"images were lost: {ok} of {len(urls)}")
    with closing(sqlite3.connect(work / "out" / "journal.sqlite")) as journal:
        query = f"SELECT MIN(time), MAX(time) FROM urls WHERE url NOT LIKE 'http://{SLOW}:%'"
        first, last = journal.execute(query).fetchone()
    return len(fast) / float(last - first)


if __name__ == "__main__":
    main()
