"""`imnet-prep download` beside what it is made of, and beside img2dataset, from one local server in one run.

Command::

    python -m benchmarks.download --images ../shared/data/imagenet-samples-250.tar --count 5000 --peer /tmp/dl-venv

The peer needs a virtual environment of its own with ``benchmarks/requirements-download.txt``; without ``--peer`` it
is left out. The server is nginx where installed, else Python's (slower: it then is part of what is measured). Every
photograph is asked for under many URLs (a query string), ours and theirs alike. Rounds alternate; medians are
given.

``combined`` is 1 / (1 / raw + 1 / decode), both measured here on the same cores: raw is plain ``requests`` sessions
in one process a core, decode reads every compressed bit at 1/8 scale in one process a core. ``cpu_ms`` is processor
time an image, the server's left out: the fairer figure on a machine that others use too.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imnet_prep.cpu import cpu_count

THREADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("../shared/data/imagenet-samples-250.tar"))
    parser.add_argument("--count", type=int, default=5000, help="URLs a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", type=Path, help="virtual environment with img2dataset")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imnet-bench-download")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    (args.work / "www").mkdir(parents=True)
    with tarfile.open(args.images) as tar:
        tar.extractall(args.work / "www", filter="data")
    photos = sorted(path for path in (args.work / "www").rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    with served(args.work / "www", args.work) as (server, base):
        paths = [f"{base}/{photo.relative_to(args.work / 'www')}" for photo in photos]
        urls = [f"{paths[n % len(paths)]}?copy={n // len(paths)}" for n in range(args.count)]
        print(json.dumps(measure(urls, photos, server, args), indent=1))
    shutil.rmtree(args.work)


def measure(urls: list[str], photos: list[Path], server: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run the contestants in turn, round after round, and give medians in images/s."""
    runs: dict[str, Callable[[], float]] = {
        "raw": lambda: in_processes(fetch_all, urls),
        "decode": lambda: in_processes(decode_all, [str(photos[n % len(photos)]) for n in range(len(urls))]),
        "ours": lambda: ours(urls, args.work, []),
        "ours_256": lambda: ours(urls, args.work, ["--short-side", "256", "--quality", "90"]),
    }
    if args.peer:
        runs["img2dataset_256"] = lambda: img2dataset(urls, args.work, args.peer)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    cpu_ms: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            before = children_s()
            rate = run()
            cpu = 1000 * (children_s() - before) / len(urls)
            print(f"round {number} {name}: {rate:.0f} images/s, {cpu:.2f} ms", file=sys.stderr)
            if number:  # the first round warms caches
                rates[name].append(rate)
                cpu_ms[name].append(cpu)
    result: dict[str, Any] = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    combined = [1 / (1 / raw + 1 / decode) for raw, decode in zip(rates["raw"], rates["decode"], strict=True)]
    result["combined"] = round(statistics.median(combined), 1)
    result["ours_of_combined"] = round(
        statistics.median(our / limit for our, limit in zip(rates["ours"], combined, strict=True)), 3
    )
    if args.peer:
        pairs = zip(rates["ours_256"], rates["img2dataset_256"], strict=True)
        result["ours_256_of_img2dataset"] = round(statistics.median(our / peer for our, peer in pairs), 3)
    spread = {name: [round(min(found), 1), round(max(found), 1)] for name, found in rates.items()}
    return result | {
        "cpu_ms": {name: round(statistics.median(found), 3) for name, found in cpu_ms.items()},
        "spread": spread,
        "server": server,
        "count": len(urls),
        "rounds": args.rounds,
        "cores": cpu_count(),
        "python": platform.python_version(),
    }


def children_s() -> float:
    """Return the processor time, user and system, of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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
        listen = " ".join(f"listen {host}:{port};" for host in hosts)
        config.write_text(
            f"daemon off; worker_processes 1; pid {work}/nginx.pid; error_log {work}/nginx.err;\n"
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


def ours(urls: list[str], work: Path, extra: list[str]) -> float:
    """Return images/s of the whole command as it reports it: list, workers' start, fetch, check, fsync, journal."""
    out = fresh(work)
    text = "".join(f"n{n % 50 + 1:08d}_{n}\t{url}\n" for n, url in enumerate(urls))
    (work / "list.txt").write_text(text)
    command = [
        sys.executable,
        "-m",
        "imnet_prep",
        "download",
        "--urls",
        str(work / "list.txt"),
        "--out",
        str(out),
        "--allow-private",
        "--json",
    ]
    done = subprocess.run([*command, *extra], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    result = json.loads(done.stdout)
    if result["ok"] != len(urls):
        raise SystemExit(f"ours lost images: {result}")
    return float(result["ok"] / result["seconds"])


def img2dataset(urls: list[str], work: Path, venv: Path) -> float:
    """Return images/s between the first shard's start and the last one's end, so without its start-up."""
    out = fresh(work)
    (work / "peer.txt").write_text("\n".join(urls) + "\n")
    cores = cpu_count()
    shard = str(-(-len(urls) // (2 * cores)))
    command = [
        str(venv / "bin" / "img2dataset"), "--url_list", str(work / "peer.txt"), "--output_folder", str(out),
        "--processes_count", str(cores), "--thread_count", "32", "--image_size", "256", "--resize_mode", "keep_ratio",
        "--encode_quality", "90", "--output_format", "files", "--number_sample_per_shard", shard,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stats = [json.loads(path.read_text()) for path in out.glob("*_stats.json")]
    done = sum(item["successes"] for item in stats)
    if done != len(urls):
        raise SystemExit(f"img2dataset lost images: {done} of {len(urls)}")
    return float(done / (max(item["end_time"] for item in stats) - min(item["start_time"] for item in stats)))


if __name__ == "__main__":
    main()
