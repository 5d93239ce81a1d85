"""The pipeline beside its peers, on the same photographs, in one run.

Command::

    python -m benchmarks.pipeline --images ../shared/data/imagenet-samples-250.tar --dali /tmp/dali-venv/bin/python \
        --torch /tmp/bench-venv/bin/python

Each peer runs under the interpreter it is given (see ``benchmarks/requirements-pipeline.txt``); without one it is left
out. Every photograph is written four times under other names, as files for the peers and as records for us and for
MindSpore. Each contestant is a process of its own that warms up and then measures for ``--seconds``; the rounds
alternate, and the median over the rounds counts. All make uint8 batches, antialiased bilinear, no normalisation
(MindSpore's operators know no antialiasing).

``cpu_ms`` is processor time an image over all threads and processes of a contestant: on a machine that others use too,
its ratios say more than those of images/s.

``limit`` is libjpeg-turbo's own partial decode, with the resize, from memory, in one C++ call a thread, no reader.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from imnet_prep.cpu import cpu_count

BATCH, SIZE, SHORT = 64, 224, 256
COPIES = 4
WARM_UP_S = 2.0
MODES = ("train", "eval")


# ---- contestants: each gives an endless iterator of the number of images made --------------------------------------


def ours(root: Path, mode: str, threads: int, native: str = "on") -> Iterator[int]:
    """`open_batches`, as the trainer uses it."""
    from imnet_prep import EvalOptions, TrainOptions, open_batches

    options = (TrainOptions if mode == "train" else EvalOptions)(batch_size=BATCH, image_size=SIZE)
    with open_batches(root / "records", "train", options, seed=0, workers=threads, native=native) as batches:
        epoch = 0
        while True:
            yield from (len(batch) for batch in batches.epoch(epoch))
            epoch += 1


def ours_portable(root: Path, mode: str, threads: int) -> Iterator[int]:
    """`open_batches` on OpenCV and Pillow."""
    return ours(root, mode, threads, native="off")


def limit(root: Path, mode: str, threads: int, fast: bool = False) -> Iterator[int]:
    """The C++ decoder alone with libjpeg-turbo's own entropy decoder, from memory."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    from imnet_prep.images.batch_decoder import NativeDecoder
    from imnet_prep.loader.augment import eval_geometry, train_geometry
    from imnet_prep.loader.options import EvalOptions, TrainOptions

    images = [path.read_bytes() for path in sorted((root / "files").rglob("*.JPEG"))]
    decoder = NativeDecoder(fast=fast)
    sizes, _ = decoder.sizes(images)
    ids = np.arange(len(images), dtype=np.uint64)
    parts = [range(start, min(start + 32, len(images))) for start in range(0, len(images), 32)]
    outs = [np.empty((32, SIZE, SIZE, 3), dtype=np.uint8) for _ in range(4 * threads)]

    def work(number: int, epoch: int) -> int:
        rows = np.asarray(parts[number % len(parts)])
        if mode == "train":
            geometry = train_geometry(TrainOptions(BATCH, SIZE), sizes[rows], 0, epoch, ids[rows])
        else:
            geometry = eval_geometry(EvalOptions(BATCH, SIZE), sizes[rows])
        chosen = [images[row] for row in rows]
        decoder.decode(chosen, geometry, "bilinear", outs[number % len(outs)][: len(rows)])
        return len(rows)

    with ThreadPoolExecutor(threads) as pool:
        number = 0
        waiting = []
        while True:
            while len(waiting) < 2 * threads:
                waiting.append(pool.submit(work, number, number // len(parts)))
                number += 1
            yield waiting.pop(0).result()


def decoder_alone(root: Path, mode: str, threads: int) -> Iterator[int]:
    """The C++ decoder alone with our entropy decoder, from memory."""
    return limit(root, mode, threads, fast=True)


def mindspore(root: Path, mode: str, threads: int) -> Iterator[int]:
    """MindSpore's own reader and C++ operators, uint8 HWC out."""
    import mindspore.dataset as ds
    from mindspore.dataset import vision

    ds.config.set_num_parallel_workers(threads)
    files = [str(path) for path in sorted((root / "records/train").glob("*.mindrecord"))]
    data = ds.MindDataset(files, columns_list=["image", "label"], shuffle=mode == "train")
    if mode == "train":
        operations = [vision.RandomCropDecodeResize(SIZE), vision.RandomHorizontalFlip()]
    else:
        operations = [vision.Decode(), vision.Resize(SHORT), vision.CenterCrop(SIZE)]
    data = data.map(operations, input_columns=["image"]).batch(BATCH, drop_remainder=mode == "train")
    while True:
        for row in data.create_tuple_iterator(num_epochs=1, output_numpy=True):
            yield len(row[0])


def dali(root: Path, mode: str, threads: int) -> Iterator[int]:
    """NVIDIA DALI on the CPU; training decodes only the crop."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None)
    def build() -> Any:
        data, label = fn.readers.file(file_root=str(root / "files"), random_shuffle=mode == "train", name="reader")
        if mode == "train":
            image = fn.decoders.image_random_crop(
                data, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
            )
            image = fn.resize(image, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
            image = fn.flip(image, horizontal=fn.random.coin_flip())
        else:
            image = fn.decoders.image(data, device="cpu", output_type=types.RGB)
            image = fn.resize(image, resize_shorter=SHORT, interp_type=types.INTERP_LINEAR, antialias=True)
            image = fn.crop(image, crop=(SIZE, SIZE))
        return image, label

    pipeline = build()
    pipeline.build()
    while True:
        images, _ = pipeline.run()
        images.as_array()
        yield BATCH


def torchvision(root: Path, mode: str, threads: int, pil: bool = False) -> Iterator[int]:
    """torchvision v2 on tensors, DataLoader with a worker a core."""
    import torch
    from torchvision import datasets
    from torchvision import io as tvio
    from torchvision import transforms as pil_transforms
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    if pil:
        kind: Any = pil_transforms
        last = [pil_transforms.PILToTensor()]
        loader = datasets.folder.pil_loader
    else:
        kind, last = v2, []
        loader = lambda path: tvio.decode_image(tvio.read_file(path), mode=tvio.ImageReadMode.RGB)  # noqa: E731
    steps = (
        [kind.RandomResizedCrop(SIZE, antialias=True), kind.RandomHorizontalFlip()]
        if mode == "train"
        else [kind.Resize(SHORT, antialias=True), kind.CenterCrop(SIZE)]
    )
    data = datasets.ImageFolder(str(root / "files"), transform=kind.Compose(steps + last), loader=loader)
    batches = torch.utils.data.DataLoader(
        data, BATCH, shuffle=mode == "train", num_workers=threads, persistent_workers=True, prefetch_factor=4
    )
    while True:
        for images, _ in batches:
            yield len(images)


def torchvision_pil(root: Path, mode: str, threads: int) -> Iterator[int]:
    """torchvision on Pillow images."""
    return torchvision(root, mode, threads, pil=True)


CONTESTANTS: dict[str, Callable[[Path, str, int], Iterator[int]]] = {
    "ours": ours,
    "ours_portable": ours_portable,
    "limit": limit,
    "decoder_alone": decoder_alone,
    "mindspore": mindspore,
    "dali": dali,
    "torchvision": torchvision,
    "torchvision_pil": torchvision_pil,
}


def processor_s() -> float:
    """Processor time of this process and its live children, seconds."""
    ticks = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def contest(name: str, root: Path, mode: str, threads: int, seconds: float) -> dict[str, float]:
    """Warm up, then measure."""
    stream = CONTESTANTS[name](root, mode, threads)
    warm, made = time.perf_counter() + WARM_UP_S, 0
    while made < 4 * BATCH or time.perf_counter() < warm:
        made += next(stream)
    began, cpu, images = time.perf_counter(), processor_s(), 0
    while time.perf_counter() - began < seconds:
        images += next(stream)
    wall, used = time.perf_counter() - began, processor_s() - cpu
    return {"images_per_s": images / wall, "cpu_ms": 1e3 * used / images}


# ---- the run -------------------------------------------------------------------------------------------------------


def photographs(source: Path) -> list[tuple[str, bytes]]:
    """Class and bytes of every JPEG in a tar or a folder of class folders."""
    if source.is_dir():
        return [(path.parent.name, path.read_bytes()) for path in sorted(source.rglob("*.JPEG"))]
    with tarfile.open(source) as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith(".JPEG")]
        return [(Path(m.name).parent.name, archive.extractfile(m).read()) for m in members]  # type: ignore[union-attr]


def shrink(data: bytes) -> bytes:
    """What `to-mindrecord --short-side 256 --quality 90` stores."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SHORT / min(picture.size)
    if scale < 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepare(root: Path, images: list[tuple[str, bytes]]) -> float:
    """Write files and records; gives the mean size in bytes."""
    for copy in range(COPIES):
        for number, (name, data) in enumerate(images):
            path = root / "files" / name / f"{copy}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    command = [Path(sys.executable).with_name("imnet-prep"), "to-mindrecord", root / "files", "--out", root / "records"]
    subprocess.run([*command, "--split", "train", "--shards", "4"], check=True, stdout=subprocess.DEVNULL)
    return statistics.mean(len(data) for _, data in images)


def main() -> None:
    """Parse, run all rounds, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description="The pipeline beside its peers.")
    parser.add_argument("--images", type=Path, default=Path("../shared/data/imagenet-samples-250.tar"))
    parser.add_argument("--dali", help="interpreter with DALI")
    parser.add_argument("--torch", help="interpreter with torch and torchvision")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--stored", choices=("originals", "short256", "both"), default="both")
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--contest", nargs=3, metavar=("NAME", "ROOT", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contest:
        name, root, mode = options.contest
        print(json.dumps(contest(name, Path(root), mode, options.threads, options.seconds)), flush=True)
        os._exit(0)  # workers of the contestants are not waited for
    interpreters = dict.fromkeys(CONTESTANTS, sys.executable)
    interpreters |= {"dali": options.dali, "torchvision": options.torch, "torchvision_pil": options.torch}
    names = [name for name in options.only if interpreters[name]]
    images = photographs(options.images)
    result: dict[str, Any] = {"cores": options.threads, "machine": platform.processor() or platform.machine()}
    kinds = ("originals", "short256") if options.stored == "both" else (options.stored,)
    with tempfile.TemporaryDirectory(prefix="pipeline-bench-") as folder:
        for kind in kinds:
            root = Path(folder) / kind
            stored = [(name, shrink(data)) for name, data in images] if kind == "short256" else images
            print(f"{kind}: {COPIES * len(images)} images, {prepare(root, stored):.0f} bytes each", file=sys.stderr)
            for mode in MODES:
                result[f"{kind}_{mode}"] = run(names, interpreters, root, mode, options)
    print(json.dumps(result))


def run(
    names: list[str], interpreters: dict[str, str], root: Path, mode: str, options: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of one mode; medians, extremes, and ratios to ours."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in random.sample(names, len(names)):
            command = [interpreters[name], __file__, "--contest", name, str(root), mode]
            command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONWARNINGS": "ignore"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    table = {}
    for name, rounds in found.items():
        rates = [one["images_per_s"] for one in rounds]
        cpu = statistics.median(one["cpu_ms"] for one in rounds)
        table[name] = {
            "images_per_s": round(statistics.median(rates)), "min": round(min(rates)), "max": round(max(rates)),
            "cpu_ms": round(cpu, 3),
        }  # fmt: skip
    for name, row in table.items():
        if "ours" in table:
            row["ours_over"] = round(table["ours"]["images_per_s"] / row["images_per_s"], 2)
            row["ours_over_by_cpu"] = round(row["cpu_ms"] / table["ours"]["cpu_ms"], 2)
        print(f"{root.name:10} {mode:6} {name:16} {row}", file=sys.stderr, flush=True)
    return table


if __name__ == "__main__":
    main()
