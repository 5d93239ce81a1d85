"""`imnet-prep to-mindrecord` of the same photographs in the forms that people have, beside a plain tar.

Command::

    python -m benchmarks.sources --images ../shared/data/imagenet-samples-250.tar --count 12500 --rounds 6

The forms are converted in turn, round after round, in another order each; the first round only warms the page cache.
``ratios`` are medians over the rounds of a form's rate by that of the tar in the same round, by wall time from process
start to process end and by processor time. The S3 server is moto's, on the same cores. As it comes, it reads the
whole object for every range (5.4 s of processor time for a tar of 258 MiB); here it keeps the bytes at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks import photographs
from benchmarks.photographs import Photographs, add_to_tar
from imnet_prep.cpu import cpu_count

SERVER = """
import logging, sys
from moto.s3.models import FakeKey
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
read, write = FakeKey.value.fget, FakeKey.value.fset
kept = {}
def value(key):
    if id(key) not in kept:
        kept[id(key)] = (key, read(key))
    return kept[id(key)][1]
FakeKey.value = property(value, write)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
Photo = tuple[str, str, bytes]  # class, file name, bytes


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder or a tar of JPEGs (default: made, see photographs.py)")
    parser.add_argument("--count", type=int, default=12_500)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imnet-bench-sources")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = server.stdout.readline().strip()
        forms = write_forms(repeated(photographs.load(args.images), args.count), args.work, address)
        print(json.dumps(measure(forms, args.count, args.rounds, args.work, address), indent=1))
    finally:
        server.kill()
        shutil.rmtree(args.work)


def repeated(photos: Photographs, count: int) -> list[Photo]:
    """Return the photographs again and again under other names, ``count`` of them."""
    found = [(Path(name), data) for name, data in photos.files]
    chosen = [(*found[number % len(found)], number // len(found)) for number in range(count)]
    return [(name.parent.name, f"{name.stem}_{copy:04d}.jpg", data) for name, data, copy in chosen]


def timed(call: list[str], environment: dict[str, str]) -> float:
    """Run a command that must succeed; return seconds."""
    started = time.perf_counter()
    done = subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{call[0]} failed: {done.stderr[-2000:]}")
    return seconds


def write_forms(photos: list[Photo], work: Path, address: str) -> dict[str, list[str]]:
    """Write each form; return the arguments of `to-mindrecord` for each."""
    import boto3
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = sorted({label for label, _, _ in photos})
    (work / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    with tarfile.open(work / "plain.tar", "w") as plain, tarfile.open(work / "wds.tar", "w") as wds:
        for label, file, data in photos:
            number = names.index(label)
            add_to_tar(plain, f"{label}/{file}", data)
            add_to_tar(wds, file, data)
            add_to_tar(wds, file.replace(".jpg", ".cls"), str(number).encode())
            add_to_tar(wds, file.replace(".jpg", ".json"), json.dumps({"filename": file, "label": number}).encode())
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with pq.ParquetWriter(work / "train.parquet", schema) as writer:
        for start in range(0, len(photos), 100):
            rows = [
                {"image": {"bytes": data, "path": file}, "label": names.index(label)}
                for label, file, data in photos[start : start + 100]
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    client = boto3.client(
        "s3", endpoint_url=address, **{f"aws_{key}": "test" for key in ("access_key_id", "secret_access_key")}
    )
    client.create_bucket(Bucket="bucket")
    client.upload_file(str(work / "plain.tar"), "bucket", "plain.tar")
    return {
        "tar": [str(work / "plain.tar")],
        "webdataset": [str(work / "wds.tar"), "--classes", str(work / "classes.txt")],
        "parquet": [str(work / "train.parquet")],
        "s3_tar": ["s3://bucket/plain.tar"],
    }


def measure(forms: dict[str, list[str]], count: int, rounds: int, work: Path, address: str) -> dict[str, object]:
    """Convert the forms in turn; return rates in images/s and ratios to the tar of the same round."""
    access = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    order, draw = list(forms), random.Random(0)
    wall: dict[str, list[float]] = {name: [] for name in forms}
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            shutil.rmtree(work / "records", ignore_errors=True)
            call = [sys.executable, "-m", "imnet_prep", "to-mindrecord", *forms[name], "--out", str(work / "records")]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = timed(call, access)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"round {number} {name}: {count / seconds:.0f} images/s, {used:.1f} s", file=sys.stderr, flush=True)
            if number:
                wall[name].append(seconds)
                cpu[name].append(used)
    middle = statistics.median
    return {
        "images_per_s": {name: round(count / middle(values)) for name, values in wall.items()},
        "ratios": {
            name: {
                kind: round(middle(tar / own for tar, own in zip(values["tar"], values[name], strict=True)), 3)
                for kind, values in (("wall", wall), ("processor", cpu))
            }
            for name in forms
        },
        "images": count,
        "rounds": rounds,
        "cores": cpu_count(),
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    main()
