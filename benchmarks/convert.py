"""`imnet-prep to-mindrecord` beside MindSpore's ImageNetToMR, and the decode rate of the cores.

Command::

    python -m benchmarks.convert --images ../shared/data/imagenet-samples-250.tar

All read the same folder of photographs, repeated under other names, and both converters write four shards; a first
round that does not count warms the page cache. Both rates are the converter's own time, start-up left out. ImageNetToMR
copies bytes and checks nothing; ours reads every compressed bit, hashes each image and each file, reads all back and
brings it to the disk. The third is OpenCV's decoding at 1/8 scale (the whole stream is read) of the same files, one
process a core.

`cpu_ms` is processor time an image, all processes, start-up included.
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.contenders import children_s, run_json
from benchmarks.rounds import Measure, Result, compare
from benchmarks.setting import Setting, parser, run
from imnet_prep.cpu import cpu_count

SHARDS = 4
COUNT, SHORT_COUNT = 6_000, 1_000
IMAGENET_TO_MR = """
import json, sys, time
from mindspore.mindrecord import ImageNetToMR
converter = ImageNetToMR(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
started = time.perf_counter()
converter.transform()
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def measure(told: Setting, count: int | None = None) -> list[Result]:
    """Convert a folder of photographs."""
    count = count or (SHORT_COUNT if told.short else COUNT)
    folder = told.photos.write(told.work / "photos", count)
    classes = "".join(f"{path.name} {number}\n" for number, path in enumerate(sorted(folder.iterdir())))
    (told.work / "map").write_text(classes, encoding="utf-8")
    contenders: dict[str, Measure] = {
        "ours": lambda: with_cpu_ms(count, lambda: ours(folder, told.work)),
        "ImageNetToMR": lambda: with_cpu_ms(count, lambda: imagenet_to_mr(folder, told.work, count)),
        "OpenCV decodes at 1/8": lambda: with_cpu_ms(count, lambda: decode(folder)),
    }
    title = f"{count} photographs in class folders to {SHARDS} shards; start-up left out"
    result = compare("convert", title, contenders, told.rounds, told.seed, warm_up=True)
    shutil.rmtree(folder)
    return [result]


def with_cpu_ms(count: int, measured: Callable[[], float]) -> Mapping[str, float]:
    """Measure images/s, and the processor time of all children that ended meanwhile."""
    before = children_s()
    rate = measured()
    return {"images_per_s": rate, "cpu_ms": 1000 * (children_s() - before) / count}


def ours(folder: Path, work: Path) -> float:
    """Return images/s of `imnet-prep to-mindrecord`, as it reports them."""
    shutil.rmtree(work / "records", ignore_errors=True)
    command = [sys.executable, "-m", "imnet_prep", "to-mindrecord", str(folder), "--out", str(work / "records")]
    return float(run_json([*command, "--shards", str(SHARDS), "--json"])["images_per_s"])


def imagenet_to_mr(folder: Path, work: Path, count: int) -> float:
    """Return images/s of MindSpore's converter."""
    shutil.rmtree(work / "mr", ignore_errors=True)
    (work / "mr").mkdir()
    words = [str(work / "map"), str(folder), str(work / "mr" / "a.mindrecord"), str(SHARDS)]
    return count / float(run_json([sys.executable, "-c", IMAGENET_TO_MR, *words])["seconds"])


def _decode(paths: list[str]) -> None:
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    for path in paths:
        data = np.fromfile(path, np.uint8)
        assert cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None


def decode(folder: Path) -> float:
    """Return images/s of OpenCV at 1/8 scale, one process a core; imports left out."""
    paths = [str(path) for path in sorted(folder.rglob("*.*"))]
    cores = cpu_count()
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(_decode, [paths[:1]] * cores))
        started = time.perf_counter()
        list(pool.map(_decode, [paths[start : start + 50] for start in range(0, len(paths), 50)]))
        return len(paths) / (time.perf_counter() - started)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--count", type=int, help=f"photographs (default {COUNT}, with --short {SHORT_COUNT})")
    args = options.parse_args()
    run(args, [functools.partial(measure, count=args.count)])


if __name__ == "__main__":
    main()
