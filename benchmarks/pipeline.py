"""The loader beside its peers, on the same photographs.

Commands::

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline --images my-photos --all

The photographs, repeated under other names to 3,000, are stored as records for us and for MindSpore and as class
folders for the others, as they are and at short side 256. All make uint8 batches of 64 at 224 px, antialiased bilinear,
without normalisation (MindSpore's operators know no antialiasing), with a thread or process a core; ours also compares
the SHA-256 of every image that it reads. Each runs in a process of its own (`loaders.py`) that has started before the
first round; a round is a window of a second and a half. What the page cache holds, it holds for all.

`cpu_ms` is processor time an image, all threads and processes. `--all` adds our portable decoder, torchvision on
Pillow, evaluation from short side 256, our decoder without a reader, and `limit`: libjpeg-turbo's own partial decode
with the resize, from memory, in one C++ call a thread.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from ctypes.util import find_library
from pathlib import Path

from benchmarks.contenders import Contender, output_of, together
from benchmarks.loaders import SHORT, SIZE
from benchmarks.rounds import Result, compare
from benchmarks.setting import Setting, parser, run
from imnet_prep.cpu import cpu_count

LEAST = 3000
WINDOW_S, SHORT_WINDOW_S = 1.5, 0.7
CASES = (("originals", "train"), ("originals", "eval"), ("short256", "train"))
OURS = {"ours": "ours", "MindSpore": "mindspore"}
PEERS = {"DALI": "dali", "torchvision v2": "torchvision", "SPDL": "spdl"}
MORE = {"ours, portable": "ours_portable", "limit": "limit", "our decoder alone": "decoder_alone"}
MORE_PEERS = {"torchvision PIL": "torchvision_pil"}


def prepare(told: Setting) -> dict[str, Path]:
    """Write the photographs as files and as records, as they are and at short side 256; return both folders."""
    tool = (sys.executable, "-m", "imnet_prep")
    originals, short = told.work / "originals", told.work / "short256"
    told.photos.write(originals / "files", max(len(told.photos.files), LEAST))
    convert = (*tool, "to-mindrecord", originals / "files", "--split", "train", "--shards", 4, "--out")
    output_of([*convert, originals / "records"])
    output_of([*convert, short / "records", "--short-side", SHORT, "--quality", 90])
    output_of([*tool, "export", short / "records", "--to", "imagefolder", "--out", short / "exported"])
    shutil.move(short / "exported" / "train", short / "files")
    return {"originals": originals, "short256": short}


def measure(told: Setting, *, everything: bool = False) -> Iterator[Result]:
    """Compare the loaders on each kind of images."""
    names = OURS | (MORE if everything else {})
    peers = PEERS | (MORE_PEERS if everything else {}) if told.peers else {}
    if "SPDL" in peers and not find_library("avfilter"):
        print("without SPDL: it needs FFmpeg's libraries (apt-get install ffmpeg)", file=sys.stderr)
        del peers["SPDL"]
    loaders = {name: (sys.executable, loader) for name, loader in names.items()}
    loaders |= {name: (str(told.peers), loader) for name, loader in peers.items()}
    return compare_loaders(told, "load", loaders, CASES + ((("short256", "eval"),) if everything else ()))


def compare_loaders(
    told: Setting, prefix: str, loaders: Mapping[str, tuple[str, str]], cases: Sequence[tuple[str, str]] = CASES
) -> Iterator[Result]:
    """Compare loaders, each an interpreter and a name of `loaders.py`, on kinds of images."""
    roots = prepare(told)
    seconds = SHORT_WINDOW_S if told.short else WINDOW_S
    for kind, mode in cases:
        words = ["--root", roots[kind], "--mode", mode, "--threads", cpu_count(), "--seconds", seconds]
        contenders = {name: Contender(python, "loaders", loader, *words) for name, (python, loader) in loaders.items()}
        size_kb = statistics.mean(path.stat().st_size for path in (roots[kind] / "files").rglob("*.*")) / 1000
        stored = "as they are" if kind == "originals" else f"at short side {SHORT}"
        what = "training" if mode == "train" else "evaluation"
        title = f"{what} batches at {SIZE} px, photographs stored {stored}, {size_kb:.0f} kB each; start-up left out"
        with together(contenders) as ready:
            yield compare(f"{prefix}-{kind}-{mode}", title, ready, told.rounds, told.seed)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--all", action="store_true", help="all loaders and kinds")
    args = options.parse_args()
    run(args, [lambda told: measure(told, everything=args.all)])


if __name__ == "__main__":
    main()
