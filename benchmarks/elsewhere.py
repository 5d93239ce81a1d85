"""How long training waits for data that comes over a slow network into a small cache.

Command (as root, on Linux: it makes a network namespace, and limits the rate of its interface by ``tc tbf``)::

    python -m benchmarks.elsewhere --images ../shared/data/imagenet-samples-250.tar

Records of 8 shards lie behind a web server in the namespace. `mbv2 train` reads them at 224 px in batches of 32 through
a cache of three shards. ``data_wait_frac`` is the share of the time after the first step, so after the first shard.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import photographs
from benchmarks.sources import repeated
from tests.served import Server

NETWORK, HERE, THERE, PORT = "imnet-elsewhere", "10.99.0.1", "10.99.0.2", 8000
SHARDS, KEPT = 8, 3


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder or a tar of photographs; made ones if not given")
    parser.add_argument("--count", type=int, default=2000, help="images in an epoch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--mb-per-s", type=float, default=8.0, help="rate of the network")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imnet-bench-elsewhere")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        Server(args.serve, address=(THERE, PORT)).serve_forever()
    shutil.rmtree(args.work, ignore_errors=True)
    try:
        records = make_records(args.images, args.count, args.work)
        with slow_server(records, args.mb_per_s):
            print(json.dumps(measure(records, args), indent=1))
    finally:
        shutil.rmtree(args.work, ignore_errors=True)


def make_records(images: Path | None, count: int, work: Path) -> Path:
    """Convert photographs, again and again under other names, to training records of 8 shards."""
    for label, name, data in repeated(photographs.load(images), count):
        path = work / "images" / "train" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    call = ["to-mindrecord", str(work / "images"), "--out", str(work / "records"), "--shards", str(SHARDS)]
    subprocess.run([sys.executable, "-m", "imnet_prep", *call], check=True, stdout=sys.stderr)
    shutil.rmtree(work / "images")
    return work / "records"


@contextmanager
def slow_server(records: Path, mb_per_s: float) -> Iterator[None]:
    """Serve records in a network namespace whose answers come at a limited rate."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("netns", "add", NETWORK)
    try:
        ip("link", "add", NETWORK, "type", "veth", "peer", "name", "eth0", "netns", NETWORK)
        ip("addr", "add", f"{HERE}/24", "dev", NETWORK)
        ip("link", "set", NETWORK, "up")
        ip("-n", NETWORK, "addr", "add", f"{THERE}/24", "dev", "eth0")
        ip("-n", NETWORK, "link", "set", "eth0", "up")
        shape = ["root", "tbf", "rate", f"{8 * mb_per_s:g}mbit", "burst", "256kb", "latency", "100ms"]
        subprocess.run(["tc", "-n", NETWORK, "qdisc", "add", "dev", "eth0", *shape], check=True)
        serve = [sys.executable, "-m", "benchmarks.elsewhere", "--serve", str(records)]
        server = subprocess.Popen(["ip", "netns", "exec", NETWORK, *serve])
        try:
            yield
        finally:
            server.kill()
            server.wait()
    finally:
        ip("netns", "del", NETWORK)


def measure(records: Path, args: argparse.Namespace) -> dict[str, object]:
    """Train through a cache of three shards."""
    sizes = {path.name: path.stat().st_size for path in (records / "train").iterdir()}
    shards = [size for name, size in sizes.items() if name.endswith(".mindrecord")]
    limit = KEPT * (max(shards) + max(size for name, size in sizes.items() if name.endswith(".db")))
    limit += sizes["records.jsonl.gz"]
    call = [sys.executable, "-m", "mbv2", "train", "--records", f"http://{THERE}:{PORT}"]
    call += ["--cache", str(args.work / "cache")]
    call += ["--cache-bytes", str(limit), "--out", str(args.work / "run"), "--epochs", str(args.epochs)]
    call += ["--image-size", "224", "--batch-size", "32", "--json"]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    return {
        "data_wait_frac": result["data_wait_frac"],
        "images_per_s": result["images_per_s"],
        "training_reads_mb_per_s": round(result["images_per_s"] * sum(shards) / args.count / 1e6, 2),
        "network_mb_per_s": args.mb_per_s,
        "shard_mb": round(max(shards) / 1e6, 1),
        "cache_mb": round(limit / 1e6, 1),
        "epochs": args.epochs,
    }


if __name__ == "__main__":
    main()
