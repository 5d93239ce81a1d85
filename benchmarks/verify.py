"""`imnet-prep verify` beside sha256sum and OpenCV's decode rate; what bit flips it finds; copies of photographs.

Command::

    python -m benchmarks.verify --images ../shared/data/imagenet-samples-250.tar --count 10000

- ``hash``: seconds of ``verify --level hash`` over those of as many ``sha256sum`` processes on the same files.
- ``decode``: images/s of ``verify --level decode`` (hash and duplicates included, and without them) over those of
  OpenCV's full decode of the same images, one process a core.
- ``flips``: one random bit flipped in each of 200 copies of shards. Found by all digests; by decode with the shard
  digests withheld; by decode with both withheld, and the share of changed records that then nothing can see.
- ``copies``: of 250 photographs, those re-encoded at q60, scaled to 70 %, mirrored, and all three, that are found.

Runs alternate and medians are given; the first round only warms the page cache.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import photographs
from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.check.verify import verify
from imnet_prep.cpu import cpu_count
from imnet_prep.errors import RecordsError
from imnet_prep.records.mindrecord import Shard
from imnet_prep.types import Progress

ROUNDS = 5
FLIPS = 200


def quiet(_: Progress) -> None:
    """A progress callback that says nothing."""


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder or a tar of JPEGs (default: made, see photographs.py)")
    parser.add_argument("--count", type=int, default=4000, help="images of the timed folder")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "imnet-bench-verify")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    loaded = photographs.load(args.images)
    folder = loaded.write(args.work / "photos", len(loaded.files))
    photos = sorted(path for path in folder.rglob("*") if path.is_file())
    try:
        small = make(args.work / "small", photos, len(photos))
        large = make(args.work / "large", photos, args.count)
        result: dict[str, Any] = {"cores": cpu_count(), "machine": platform.machine(), "images": args.count}
        result |= {"flips": flips(small, args.work / "flipped"), "copies": copies(photos)}
        result |= speeds(large, args.count)
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(args.work, ignore_errors=True)


def make(folder: Path, photos: list[Path], count: int) -> Path:
    """Convert the photographs, repeated under other names, to records; ten classes, four shards."""
    for number in range(count):
        source = photos[number % len(photos)]
        target = folder / "source" / f"class{number % 10}" / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    options = ConvertOptions(max_rejected="100%")
    convert([folder / "source"], folder / "records", None, PlanOptions(shards=4), options, quiet, lambda: False)
    return folder / "records"


# --- speed -----------------------------------------------------------------------------------------------------------


def speeds(records: Path, count: int) -> dict[str, Any]:
    """Time the contestants in turn."""
    files = [str(path) for path in sorted(records.rglob("*")) if path.is_file()]
    runs: dict[str, Callable[[], object]] = {
        "sha256sum": lambda: subprocess.run(
            ["xargs", "-0", "-P", str(cpu_count()), "-n", "1", "sha256sum"],
            input="\0".join(files).encode(), stdout=subprocess.DEVNULL, check=True,
        ),
        "hash": lambda: verify(records, "hash", cpu_count(), quiet),
        "opencv": lambda: opencv(records),
        "decode": lambda: verify(records, "decode", cpu_count(), quiet),
        "decode_only": lambda: verify(records, "decode", cpu_count(), quiet, withhold=("shards",)),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: [round(median[name], 3), *(round(v, 3) for v in sorted(seconds[name]))] for name in runs},
        "hash_over_sha256sum": round(median["hash"] / median["sha256sum"], 3),
        "decode_images_per_s": round(count / median["decode"], 1),
        "opencv_images_per_s": round(count / median["opencv"], 1),
        "decode_share_of_opencv": round(median["opencv"] / median["decode"], 3),
        "decode_only_share_of_opencv": round(median["opencv"] / median["decode_only"], 3),
    }


def opencv(records: Path) -> None:
    """Decode every image in full, a shard a task, one process a core."""
    spawn = multiprocessing.get_context("spawn")  # forked, OpenCV's threads hang
    with ProcessPoolExecutor(cpu_count(), spawn) as pool:
        list(pool.map(decode_shard, sorted(records.glob("*/*.mindrecord"))))


def decode_shard(path: Path) -> int:
    """Decode the images of a shard with OpenCV."""
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    with Shard(path) as shard:
        for row in range(len(shard)):
            cv2.imdecode(np.frombuffer(shard.image(row), np.uint8), cv2.IMREAD_COLOR)
        return len(shard)


# --- bit flips -------------------------------------------------------------------------------------------------------


def flips(records: Path, work: Path) -> dict[str, Any]:
    """Flip one random bit in each of 200 copies of shards or indexes, one after the other, and count who finds it."""
    draw = random.Random(0)
    files = sorted(records.glob("*/*.mindrecord*"))
    weights = [path.stat().st_size for path in files]
    before = contents(records)
    found = {"changes_a_record": 0, "all_digests": 0, "record_digests": 0, "no_digests": 0}
    missed = {"all_digests": 0, "record_digests": 0, "no_digests": 0}
    shutil.copytree(records, work)
    for number in range(FLIPS):
        # Half by size, which is nearly always an image; half by file, which is headers and indexes as well.
        path = draw.choices(files, weights)[0] if number % 2 else draw.choice(files)
        target = work / path.relative_to(records)
        bit = draw.randrange(8 * target.stat().st_size)
        flip(target, bit)
        changed = contents(work, only=target, before=before)
        found["changes_a_record"] += changed
        for name, withhold in (
            ("all_digests", ()),
            ("record_digests", ("shards",)),
            ("no_digests", ("shards", "records")),
        ):
            level = "hash" if name == "all_digests" else "decode"
            seen = not verify(work, level, cpu_count(), quiet, withhold=withhold).ok
            found[name] += seen
            missed[name] += (changed or name == "all_digests") and not seen
        flip(target, bit)
    shutil.rmtree(work)
    unseen = missed["no_digests"] / max(1, found["changes_a_record"])
    return {"flips": FLIPS, **found, "missed": missed, "share_unseen_without_any_digest": round(unseen, 3)}


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        value = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([value]))


def contents(records: Path, *, only: Path | None = None, before: Any = None) -> Any:
    """Read every record; or say whether those of one shard are other ones than ``before``."""
    import hashlib

    names = (
        [only.name.removesuffix(".db")] if only is not None else [path.name for path in records.glob("*/*.mindrecord")]
    )
    found = {}
    try:
        for name in names:
            with Shard(next(records.glob(f"*/{name}"))) as shard:
                for row in range(len(shard)):
                    fields = shard.fields(row)
                    image = hashlib.sha256(shard.image(row)).digest()
                    found[name, row] = image, fields.get("label"), fields.get("file_name")
    except (RecordsError, KeyError):
        return True
    if before is None:
        return found
    return found != {key: value for key, value in before.items() if key[0] == names[0]}


# --- copies ----------------------------------------------------------------------------------------------------------


def copies(photos: list[Path]) -> dict[str, Any]:
    """Count the copies of photographs that are found, and the pairs that are none."""
    import numpy as np
    from PIL import Image, ImageOps

    from imnet_prep.check.duplicates import near_duplicates
    from imnet_prep.images.perceptual_hash import hash_image

    def encode(image: Image.Image, quality: int) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return out.getvalue()

    images: list[tuple[int, str, bytes]] = [
        (number, "original", path.read_bytes()) for number, path in enumerate(photos)
    ]
    for number, path in enumerate(photos):
        image = Image.open(path).convert("RGB")
        size = round(0.7 * image.width), round(0.7 * image.height)
        small = image.resize(size, Image.Resampling.BILINEAR)
        for name, data in (
            ("q60", encode(image, 60)),
            ("scaled", encode(small, 90)),
            ("mirrored", encode(ImageOps.mirror(image), 90)),
            ("all", encode(ImageOps.mirror(small), 60)),
        ):
            images.append((number, name, data))
    signatures = np.stack([hash_image(data).bits for _, _, data in images])
    pairs = near_duplicates(signatures, lambda place: images[place][2])
    false = sum(images[pair.first][0] != images[pair.second][0] for pair in pairs)
    right = {images[pair.second][:2] for pair in pairs if images[pair.first][0] == images[pair.second][0]}
    by_kind = {kind: sum(name == kind for _, name in right) for kind in ("q60", "scaled", "mirrored", "all")}
    return {"photographs": len(photos), "found": by_kind, "false_pairs": false}


if __name__ == "__main__":
    main()
