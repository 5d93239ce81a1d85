"""Small records folders for the pipeline's tests, written with MindSpore's own FileWriter."""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imnet_prep.files import file_digest
from imnet_prep.images.decode import image_size
from imnet_prep.records.manifest import MANIFEST, Manifest, SplitInfo
from imnet_prep.records.record_list import RECORDS, RecordLine, write_lines
from imnet_prep.types import ShardInfo

HEADER_BYTES, PAGE_BYTES = 1 << 20, 1 << 22
Entry = tuple[str, int, bytes]
"""File name, label, image bytes."""


def picture(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """A smooth coloured picture with some edges: what JPEG was made for."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * fx + y * fy + phase) for fx, fy, phase in rng.uniform(0.01, 0.2, (3, 3))]
    pixels = np.stack([128 + 90 * wave for wave in waves], axis=-1)
    left, top = rng.integers(0, max(1, width // 2)), rng.integers(0, max(1, height // 2))
    pixels[top : top + height // 3, left : left + width // 3] = rng.integers(0, 256, 3)
    return np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], quality: int = 90, subsampling: int = 2, **options: object) -> bytes:
    """Encode; ``subsampling`` 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling, **options)
    return buffer.getvalue()


def entries(count: int, classes: int = 3, seed: int = 0, low: int = 40, high: int = 200) -> list[Entry]:
    """``count`` JPEGs of differing sizes, spread over classes."""
    sizes = np.random.default_rng(seed).integers(low, high, (count, 2))
    return [
        (
            f"n{i % classes:08d}/n{i % classes:08d}_{i}.JPEG",
            i % classes,
            jpeg(picture(seed * 100003 + i, int(w), int(h))),
        )
        for i, (w, h) in enumerate(sizes)
    ]


def write_folder(folder: Path, splits: dict[str, Sequence[Entry]], shards: int = 2, classes: int = 3) -> Path:
    """Write shards, indexes, record lists and the manifest."""
    infos = {name: _write_split(folder, name, rows, shards, classes) for name, rows in splits.items()}
    names = tuple(f"n{label:08d}" for label in range(classes))
    manifest = Manifest(names, ("",) * classes, "found", "sorted class name, from 0", 0, {}, (), {}, "", infos)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return folder


def rewrite_list(records: Path, change: Callable[[list[str]], list[str]]) -> Path:
    """Change the lines of the training split's record list; the shards stay."""
    path = records / "train" / RECORDS
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().splitlines()
    write_lines(path, change(lines))
    return path


def _write_split(folder: Path, split: str, rows: Sequence[Entry], shards: int, classes: int) -> SplitInfo:
    from mindspore.mindrecord import FileWriter

    (folder / split).mkdir(parents=True)
    cuts = np.linspace(0, len(rows), shards + 1).astype(int).tolist()
    infos, lines = [], []
    for number in range(shards):
        part = rows[cuts[number] : cuts[number + 1]]
        path = folder / split / f"{split}-{number:05d}-of-{shards:05d}.mindrecord"
        writer = FileWriter(str(path), shard_num=1)
        writer.set_header_size(HEADER_BYTES)
        writer.set_page_size(PAGE_BYTES)
        writer.add_schema({"image": {"type": "bytes"}, "label": {"type": "int32"}, "file_name": {"type": "string"}})
        writer.add_index(["label"])
        writer.write_raw_data([{"image": data, "label": label, "file_name": name} for name, label, data in part])
        writer.commit()
        index = path.with_name(path.name + ".db")
        infos.append(
            ShardInfo(
                f"{split}/{path.name}",
                len(part),
                path.stat().st_size,
                file_digest(path),
                index.stat().st_size,
                file_digest(index),
            )
        )
        for row, (name, label, data) in enumerate(part):
            digest = hashlib.sha256(data).hexdigest()
            lines.append(RecordLine(number, row, name, label, *image_size(data), digest, digest).to_json())
    listing = folder / split / RECORDS
    write_lines(listing, lines)
    counts = np.bincount([label for _, label, _ in rows], minlength=classes).tolist()
    record = {"file": f"{split}/{RECORDS}", "size_bytes": listing.stat().st_size, "sha256": file_digest(listing)}
    return SplitInfo(len(rows), len(rows), {}, {}, 0, tuple(counts), HEADER_BYTES, PAGE_BYTES, record, tuple(infos))
