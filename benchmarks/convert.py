"""`imnet-prep to-mindrecord` beside MindSpore's ImageNetToMR, and the decode rate of the cores.

Command::

    python -m benchmarks.convert --images ../shared/data/imagenet-samples-250.tar

All read the same folder of photographs, repeated under other names, and both converters write four shards; a first
round that does not count warms the page cache. ImageNetToMR copies bytes and checks nothing; ours reads every
compressed bit, hashes each image and each file, reads all back and brings it to the disk. The third is OpenCV decoding
the same files at 1/8 scale (the whole stream is read), one process a core.

Fixed costs are left out: each round, a converter also converts a few of the photographs, whose time and processor time
are subtracted. They are the start of Python and of the workers, and in ImageNetToMR waits of whole seconds.

`cpu_ms` is processor time an image, all processes.
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.contenders import children_s, run_json
from benchmarks.rounds import Measure, Result, compare
from benchmarks.setting import Setting, parser, run
from imnet_prep.cpu import cpu_count

SHARDS = 4
COUNT, SHORT_COUNT, FEW = 12_000, 1_000, 40
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
    folder, few = told.photos.write(told.work / "photos", count), told.photos.write(told.work / "few", FEW)
    converters = {"ours": ours, "ImageNetToMR": mindspore, "OpenCV decodes at 1/8": decode}
    contenders: dict[str, Measure] = {
        name: functools.partial(beyond_a_few, convert, told.work, folder, few, count)
        for name, convert in converters.items()
    }
    title = f"{count} photographs in class folders to {SHARDS} shards; fixed costs left out"
    result = compare("convert", title, contenders, told.rounds, told.seed, warm_up=True)
    shutil.rmtree(folder)
    shutil.rmtree(few)
    return [result]


def beyond_a_few(
    convert: Callable[[Path, Path], float], work: Path, folder: Path, few: Path, count: int
) -> Mapping[str, float]:
    """Convert both folders, and return images/s and processor time of what the larger one has more.

    Args:
        convert: Converts a folder, with another one for its results, and returns the seconds that it took.
        work: The folder for the results.
        folder: The photographs.
        few: A few of them.
        count: How many are in ``folder``.
    """
    costs = []
    for photographs in (few, folder):
        before = children_s()
        seconds = convert(photographs, work)
        costs.append((seconds, children_s() - before))
    seconds, processor = (large - small for small, large in zip(*costs, strict=True))
    return {"images_per_s": (count - FEW) / seconds, "cpu_ms": 1000 * processor / (count - FEW)}


def ours(folder: Path, work: Path, before: Sequence[str] = ()) -> float:
    """Return the seconds of `imnet-prep to-mindrecord`, as it reports them; its command line follows ``before``."""
    shutil.rmtree(work / "records", ignore_errors=True)
    command = [*before, sys.executable, "-m", "imnet_prep", "to-mindrecord", str(folder)]
    return float(run_json([*command, "--out", str(work / "records"), "--shards", str(SHARDS), "--json"])["seconds"])


def mindspore(folder: Path, work: Path) -> float:
    """Return the seconds of MindSpore's converter."""
    shutil.rmtree(work / "mr", ignore_errors=True)
    (work / "mr").mkdir()
    classes = "".join(f"{path.name} {number}\n" for number, path in enumerate(sorted(folder.iterdir())))
    (work / "map").write_text(classes, encoding="utf-8")
    words = [str(work / "map"), str(folder), str(work / "mr" / "a.mindrecord"), str(SHARDS)]
    return float(run_json([sys.executable, "-c", IMAGENET_TO_MR, *words])["seconds"])


def _decode(paths: list[str]) -> None:
    import cv2
    import numpy as np

    cv2.setNumThreads(1)
    for path in paths:
        data = np.fromfile(path, np.uint8)
        assert cv2.imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None


def decode(folder: Path, work: Path) -> float:
    """Return the seconds of OpenCV's decoding at 1/8 scale, one process a core; imports left out."""
    paths = [str(path) for path in sorted(folder.rglob("*.*"))]
    cores = cpu_count()
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(_decode, [paths[:1]] * cores))
        started = time.perf_counter()
        list(pool.map(_decode, [paths[start : start + 50] for start in range(0, len(paths), 50)]))
        return time.perf_counter() - started


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--count", type=int, help=f"photographs (default {COUNT}, with --short {SHORT_COUNT})")
    args = options.parse_args()
    run(args, [functools.partial(measure, count=args.count)])


if __name__ == "__main__":
    main()
