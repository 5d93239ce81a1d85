"""Records of many small images, written without a source folder: ``python -m benchmarks.verify_records DIR COUNT``."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import cv2
import numpy as np

from imnet_prep.files import file_digest
from imnet_prep.records.manifest import MANIFEST, Manifest, SplitInfo
from imnet_prep.records.record_list import RECORDS, RecordLine, write_lines
from imnet_prep.records.shards import ShardWriter, choose_layout, read_back

CLASSES, SHARD_ROWS = 100, 20_000


def main() -> None:
    """Write the folder."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    (folder / "train").mkdir(parents=True)
    shards = -(-count // SHARD_ROWS)
    layout = choose_layout(SHARD_ROWS, SHARD_ROWS * 900, 3000)
    infos, lines = [], []
    for number in range(shards):
        name = f"train/train-{number:05d}-of-{shards:05d}.mindrecord"
        writer = ShardWriter(folder / name, layout)
        for row in range(min(SHARD_ROWS, count - number * SHARD_ROWS)):
            place = number * SHARD_ROWS + row
            image, label = draw(place), place % CLASSES
            file_name = f"class{label:03d}/image_{place:07d}.jpg"
            writer.add(image, label, file_name)
            digest = hashlib.sha256(image).hexdigest()
            lines.append(RecordLine(number, row, file_name, label, 32, 32, digest, digest).to_json())
        infos.append(read_back(folder / name, name, writer.finish()))
    listing = folder / "train" / RECORDS
    write_lines(listing, lines)
    counts = np.bincount(np.arange(count) % CLASSES, minlength=CLASSES).tolist()
    record = {"file": f"train/{RECORDS}", "size_bytes": listing.stat().st_size, "sha256": file_digest(listing)}
    split = SplitInfo(
        count, count, {}, {}, 0, tuple(counts), layout.header_size, layout.page_size, record, tuple(infos)
    )
    names = tuple(f"class{label:03d}" for label in range(CLASSES))
    manifest = Manifest(names, ("",) * CLASSES, "found", "sorted", 0, {}, (), {}, "0" * 64, {"train": split})
    (folder / MANIFEST).write_bytes(manifest.to_bytes())


def draw(number: int) -> bytes:
    """A small picture like no other number's: of 5 x 5 colours, a million would hold many near duplicates."""
    coarse = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", cv2.resize(coarse, (32, 32), interpolation=cv2.INTER_CUBIC))[1])


if __name__ == "__main__":
    main()
