"""`imnet-prep download` beside img2dataset, and beside what it is made of, from one local server.

Command::

    python -m benchmarks.download --images ../shared/data/imagenet-samples-250.tar --count 5000

The server is nginx where installed, else Python's (slower: it then is part of what is measured). Every photograph is
asked for under many URLs (a query string), all contenders alike; a first round that does not count warms caches.

- `download-256`: stored at short side 256, quality 90. Ours is the time that the command reports: list, workers' start,
  fetch, check, re-encode, fsync, journal. img2dataset's is from its first shard's start to its last one's end. An image
  that a tool did not store is `lost`, and does not count.
- `download`: stored as it came. The other is no tool but the least work that there is: plain `requests` sessions in one
  process a core, and then every compressed bit read at 1/8 scale, in one process a core.

`cpu_ms` is processor time a URL, start-up included, the server's left out.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.contenders import children_s, run_json
from benchmarks.rounds import Measure, Result, compare
from benchmarks.setting import Setting, parser, run
from imnet_prep.cpu import cpu_count

THREADS = 8
COUNT, SHORT_COUNT = 1_500, 500
SMALL = ("--short-side", "256", "--quality", "90")


def with_cpu_ms(count: int, measured: Callable[[], float]) -> Mapping[str, float]:
    """Measure images/s, and the processor time of all children that ended meanwhile."""
    before = children_s()
    rate = measured()
    return {"images_per_s": rate, "cpu_ms": 1000 * (children_s() - before) / count}


def measure(told: Setting, count: int | None = None) -> list[Result]:
    """Download a list of URLs."""
    count = count or (SHORT_COUNT if told.short else COUNT)
    root = told.photos.write(told.work / "www", len(told.photos.files))
    photos = sorted(path for path in root.rglob("*") if path.is_file())
    chosen = [photos[number % len(photos)] for number in range(count)]
    with served(root, told.work) as (server, base):
        urls = [f"{base}/{path.relative_to(root)}?copy={number}" for number, path in enumerate(chosen)]

        def plainly() -> float:
            fetch_s = count / in_processes(fetch_all, urls)
            return count / (fetch_s + count / in_processes(decode_all, [str(path) for path in chosen]))

        small: dict[str, Measure] = {"ours": lambda: ours(urls, told.work, SMALL)}
        if told.img2dataset:
            peer = told.img2dataset
            small["img2dataset"] = lambda: img2dataset(urls, told.work, peer)
        plain: dict[str, Measure] = {
            "ours": lambda: ours(urls, told.work, ()),
            "requests, then OpenCV": lambda: with_cpu_ms(count, plainly),
        }
        title = f"{count} URLs of {server} on this machine"
        rules = (told.rounds, told.seed)
        return [
            compare("download-256", f"{title}, stored at short side 256", small, *rules, warm_up=True),
            compare("download", f"{title}, stored as they come, every bit read", plain, *rules, warm_up=True),
        ]


@contextmanager
def served(root: Path, work: Path, hosts: Sequence[str] = ("127.0.0.1",)) -> Any:
    """Serve a folder on a free port of loopback addresses, by nginx if it is there; yields (name, the first's URL)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx:
        config = work / "nginx.conf"
        temps = " ".join(f"{name}_temp_path {work}/ngx_{name};" for name in ("proxy", "fastcgi", "uwsgi", "scgi"))
        is_root = os.geteuid() == 0  # type: ignore[attr-defined, unused-ignore]
        user = "user root; " if is_root else ""  # it would drop its rights, and see no private folder
        listen = " ".join(f"listen {host}:{port};" for host in hosts)
        config.write_text(
            f"{user}daemon off; worker_processes 1; pid {work}/nginx.pid; error_log {work}/nginx.err;\n"
            f"events {{ worker_connections 1024; }}\n"
            f"http {{ access_log off; sendfile on; keepalive_requests 1000000;\n"
            f"client_body_temp_path {work}/ngx_body; {temps}\n"
            f"types {{ image/jpeg JPEG; }} server {{ {listen} root {root}; }} }}\n"
        )
        process = subprocess.Popen([nginx, "-c", str(config), "-e", str(work / "nginx.err")])
    else:
        process = subprocess.Popen([sys.executable, "-m", "http.server", "-b", "127.0.0.1", "-d", str(root), str(port)])
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield ("nginx" if nginx else "python"), f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def in_processes(work: Callable[[list[str]], None], items: list[str]) -> float:
    """Share items among one process a core, and give items a second, start-up left out."""
    count = cpu_count()
    ready = multiprocessing.Barrier(count + 1)
    processes = [
        multiprocessing.Process(target=_share, args=(work, items[number::count], ready)) for number in range(count)
    ]
    for process in processes:
        process.start()
    ready.wait()
    begun = time.monotonic()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit("a measuring process failed")
    return len(items) / (time.monotonic() - begun)


def _share(work: Callable[[list[str]], None], items: list[str], ready: Any) -> None:
    import cv2
    import requests

    cv2.setNumThreads(1)
    requests.Session()  # both are imported before the clock starts
    ready.wait()
    work(items)


def fetch_all(urls: list[str]) -> None:
    """Fetch with plain ``requests``, a session a thread."""
    import requests

    def some(share: list[str]) -> None:
        with requests.Session() as session:
            session.trust_env = False
            for url in share:
                answer = session.get(url, timeout=10)
                if answer.status_code != 200 or not answer.content:
                    raise SystemExit(f"{url}: {answer.status_code}")

    threads = [threading.Thread(target=some, args=(urls[n::THREADS],)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def decode_all(paths: list[str]) -> None:
    """Read every compressed bit, at 1/8 scale."""
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    load = functools.lru_cache(1000)(lambda path: np.fromfile(path, np.uint8))
    for path in paths:
        assert cv2.imdecode(load(path), cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None


def fresh(work: Path) -> Path:
    """Return a new folder. None is removed before the end: ext4 looks long for inodes where many were just deleted."""
    return Path(tempfile.mkdtemp(prefix="out-", dir=work)) / "out"


def ours(urls: list[str], work: Path, extra: Sequence[str]) -> Mapping[str, float]:
    """Run `imnet-prep download`."""
    text = "".join(f"n{n % 50 + 1:08d}_{n}\t{url}\n" for n, url in enumerate(urls))
    (work / "list.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "imnet_prep", "download", "--urls", str(work / "list.txt"), "--out"]
    command += [str(fresh(work)), "--allow-private", "--json", *extra]
    lost = 0

    def rate() -> float:
        nonlocal lost
        told = run_json(command)
        lost = len(urls) - told["ok"]
        return float(told["ok"] / told["seconds"])

    return {**with_cpu_ms(len(urls), rate), "lost": lost}


def img2dataset(urls: list[str], work: Path, python: Path) -> Mapping[str, float]:
    """Run img2dataset, which keeps files as ours does."""
    out = fresh(work)
    (work / "peer.txt").write_text("\n".join(urls) + "\n", encoding="utf-8")
    cores = cpu_count()
    command = [
        str(python.with_name("img2dataset")), "--url_list", str(work / "peer.txt"), "--output_folder", str(out),
        "--processes_count", str(cores), "--thread_count", "32", "--image_size", "256", "--resize_mode", "keep_ratio",
        "--encode_quality", "90", "--output_format", "files",
        "--number_sample_per_shard", str(-(-len(urls) // (2 * cores))),
    ]  # fmt: skip
    lost = 0

    def rate() -> float:
        nonlocal lost
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shards = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*_stats.json")]
        stored = sum(shard["successes"] for shard in shards)
        lost = len(urls) - stored
        return float(stored / (max(one["end_time"] for one in shards) - min(one["start_time"] for one in shards)))

    return {**with_cpu_ms(len(urls), rate), "lost": lost}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--count", type=int, help=f"URLs a round (default {COUNT}, with --short {SHORT_COUNT})")
    args = options.parse_args()
    run(args, [functools.partial(measure, count=args.count)])


if __name__ == "__main__":
    main()
