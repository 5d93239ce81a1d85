"""The loaders that `pipeline.py` compares: each yields, for ever, the number of images of its next batch.

A contender that serves (`contenders.py`); the folder holds the same images as `records` and as class folders below
`files`::

    python -m benchmarks.loaders ours --root FOLDER --mode train --threads 2 --seconds 2
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from benchmarks.contenders import processor_s, serve

BATCH, SIZE, SHORT = 64, 224, 256
SETTLE_S = 0.5  # before each measured window: what was made ready while others ran is used up


def ours(root: Path, mode: str, threads: int, native: str = "on") -> Iterator[int]:
    """`open_batches`, as the trainer uses it; digests are compared at every reading, as they are in a first epoch."""
    from imnet_prep import EvalOptions, TrainOptions, open_batches

    options = (TrainOptions if mode == "train" else EvalOptions)(batch_size=BATCH, image_size=SIZE)
    loading = {"workers": threads, "native": native, "check": "always"}
    with open_batches(root / "records", "train", options, seed=0, **loading) as batches:
        epoch = 0
        while True:
            yield from (len(batch) for batch in batches.epoch(epoch))
            epoch += 1


def ours_portable(root: Path, mode: str, threads: int) -> Iterator[int]:
    """`open_batches` on OpenCV and Pillow."""
    return ours(root, mode, threads, native="off")


def ours_torch(root: Path, mode: str, threads: int) -> Iterator[int]:
    """`TorchLoader`: tensors of PyTorch. It reads as `ours` does."""
    from imnet_prep import EvalOptions, TrainOptions
    from imnet_prep.loader.torch import TorchLoader

    options = (TrainOptions if mode == "train" else EvalOptions)(batch_size=BATCH, image_size=SIZE)
    with TorchLoader(root / "records", "train", options, workers=threads, native="on", check="always") as loader:
        while True:
            yield from (len(images) for images, _ in loader)


def ours_dataset(root: Path, mode: str, threads: int) -> Iterator[int]:
    """`to_dataset`: `open_batches` as a dataset of MindSpore. It reads as `ours` does."""
    from imnet_prep import EvalOptions, TrainOptions, open_batches, to_dataset

    options = (TrainOptions if mode == "train" else EvalOptions)(batch_size=BATCH, image_size=SIZE)
    loading = {"workers": threads, "native": "on", "check": "always"}
    with open_batches(root / "records", "train", options, seed=0, **loading) as batches:
        data = to_dataset(batches)
        while True:
            for row in data.create_tuple_iterator(num_epochs=1, output_numpy=True):
                yield len(row[0])


def limit(root: Path, mode: str, threads: int, fast: bool = False) -> Iterator[int]:
    """The C++ decoder alone with libjpeg-turbo's own entropy decoder, from memory."""
    from concurrent.futures import Future, ThreadPoolExecutor

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
        waiting: list[Future[int]] = []
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
    rows = data.create_tuple_iterator(num_epochs=-1, output_numpy=True)
    while True:
        yield from (len(row[0]) for row in rows)


def dali(root: Path, mode: str, threads: int) -> Iterator[int]:
    """NVIDIA DALI on the CPU; training decodes only the crop."""
    pipeline = dali_pipeline(root, mode, threads)
    pipeline.build()
    while True:
        images, _ = pipeline.run()
        images.as_array()
        yield BATCH


def dali_torch(root: Path, mode: str, threads: int) -> Iterator[int]:
    """The same through DALI's iterator for PyTorch."""
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    for batch in DALIGenericIterator([dali_pipeline(root, mode, threads)], ["image", "label"]):  # without end
        yield len(batch[0]["image"])


def dali_pipeline(root: Path, mode: str, threads: int) -> Any:
    """Return DALI's pipeline of uint8 (N, H, W, 3) images and labels."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None)  # type: ignore[untyped-decorator]
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

    return build()


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
    order = endless(len(data), mode)
    for images, _ in torch.utils.data.DataLoader(data, BATCH, sampler=order, num_workers=threads, prefetch_factor=4):
        yield len(images)


def endless(count: int, mode: str) -> Iterator[int]:
    """Yield places for ever, in another order each epoch in training. Epochs are short here, and each end costs."""
    draw = random.Random(0)
    while True:
        yield from draw.sample(range(count), count) if mode == "train" else range(count)


def torchvision_pil(root: Path, mode: str, threads: int) -> Iterator[int]:
    """torchvision on Pillow images."""
    return torchvision(root, mode, threads, pil=True)


def spdl(root: Path, mode: str, threads: int) -> Iterator[int]:
    """SPDL: an image a task, decoded, cropped and scaled by FFmpeg; training decodes whole images."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    draw = random.Random(0)

    def crop(width: int, height: int) -> str:
        """FFmpeg's filters for torchvision's RandomResizedCrop and flip, or for its Resize and CenterCrop."""
        if mode == "eval":
            short = min(width, height)
            side = round(short * SIZE / SHORT)
            return f"crop={side}:{side},scale={SIZE}:{SIZE}:flags=bilinear"
        for _ in range(10):
            area = width * height * draw.uniform(0.08, 1.0)
            ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= width and h <= height:
                break
        else:
            w = h = min(width, height)
        flip = ",hflip" if draw.random() < 0.5 else ""
        left, top = draw.randint(0, width - w), draw.randint(0, height - h)
        return f"crop={w}:{h}:{left}:{top},scale={SIZE}:{SIZE}:flags=bilinear{flip}"

    def decode(path: str) -> Any:
        packets = spdl.io.demux_image(path)
        filters = f"{crop(packets.width, packets.height)},format=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=filters)

    def join(frames: list[Any]) -> Any:
        return spdl.io.to_numpy(spdl.io.convert_frames(frames))

    paths = [str(path) for path in sorted((root / "files").rglob("*.JPEG"))]

    source = (paths[number] for number in endless(len(paths), mode))
    builder = PipelineBuilder().add_source(source).pipe(decode, concurrency=threads).aggregate(BATCH)
    pipeline = builder.pipe(join).add_sink(4).build(num_threads=threads)
    with pipeline.auto_stop():
        for batch in pipeline:
            yield len(batch)


LOADERS: dict[str, Callable[[Path, str, int], Iterator[int]]] = {
    "ours": ours,
    "ours_portable": ours_portable,
    "ours_torch": ours_torch,
    "ours_dataset": ours_dataset,
    "limit": limit,
    "decoder_alone": decoder_alone,
    "mindspore": mindspore,
    "dali": dali,
    "dali_torch": dali_torch,
    "torchvision": torchvision,
    "torchvision_pil": torchvision_pil,
    "spdl": spdl,
}


def used_s() -> float:
    """Return the processor time of this process and its live children, in seconds."""
    return sum(processor_s(pid) for pid in (os.getpid(), *(child.pid or 0 for child in active_children())))


def contend(name: str, root: Path, mode: str, threads: int, seconds: float) -> Callable[[], Mapping[str, float]]:
    """Start a loader, and return what measures it for a time."""
    stream = LOADERS[name](root, mode, threads)

    def take(seconds: float) -> tuple[int, float]:
        began, images = time.perf_counter(), 0
        while (wall := time.perf_counter() - began) < seconds:
            images += next(stream)
        return images, wall

    def measure() -> dict[str, float]:
        take(SETTLE_S)
        cpu = used_s()
        images, wall = take(seconds)
        return {"images_per_s": images / wall, "cpu_ms": 1e3 * (used_s() - cpu) / images}

    take(2 * SETTLE_S)
    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", choices=sorted(LOADERS))
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--mode", choices=("train", "eval"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    serve(lambda: contend(args.loader, args.root, args.mode, args.threads, args.seconds))


if __name__ == "__main__":
    main()
