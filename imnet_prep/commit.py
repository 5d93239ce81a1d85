"""Finished shards to a whole records folder: the lists of records and rejections and, last, the manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog
from imnet_prep.files import file_digest, sync, write_atomically
from imnet_prep.plan import Plan
from imnet_prep.records.manifest import MANIFEST, RECORDS, Manifest, SplitInfo, write_records
from imnet_prep.records.shards import Layout
from imnet_prep.shard_task import ShardResult, lines_path
from imnet_prep.sources import SourceInfo
from imnet_prep.types import Rejected
from imnet_prep.workspace import REJECTED

_CHUNK_ROWS = 1 << 16


def write_rejected(path: Path, rejected: Sequence[Rejected]) -> None:
    """Write ``rejected.jsonl``: a line an image, sorted by split, name and reason."""
    lines = [
        json.dumps({k: v for k, v in asdict(item).items() if v or k != "thumbnail"}, sort_keys=True, ensure_ascii=False)
        for item in sorted(rejected, key=lambda item: (item.split, item.file_name, item.reason))
    ]
    write_atomically(path, "".join(line + "\n" for line in lines).encode())


def commit(
    partial: Path,
    plan: Plan,
    layouts: dict[str, Layout],
    infos: Sequence[SourceInfo],
    results: Sequence[ShardResult],
) -> Manifest:
    """Write the lists and, last, the manifest.

    Args:
        partial: The folder with all shards in place.
        plan: What was carried out.
        layouts: Sizes of each split's data files.
        infos: Of the sources.
        results: Of all shards, in the order of the plan.

    Raises:
        OSError: The disk is full or fails.
    """
    rejected = [*plan.rejected, *(item for result in results for item in result.rejected)]
    write_rejected(partial / REJECTED, rejected)
    splits: dict[str, SplitInfo] = {}
    digests: list[NDArray[np.uint64]] = []  # of the splits before, sorted
    for split in plan.splits:
        mine = [result for result in results if result.split == split]
        splits[split] = _split_info(partial, plan, split, layouts[split], mine, rejected, digests)
    manifest = Manifest(
        classes=plan.classes,
        class_words=tuple(catalog.class_words(name) for name in plan.classes),
        label_space=plan.label_space,
        label_convention=plan.label_convention,
        seed=plan.options.seed,
        options=plan.options.content(),
        sources=tuple(sorted((asdict(info) for info in infos), key=lambda info: json.dumps(info, sort_keys=True))),
        made_with={name: version(name) for name in ("imnet-prep", "opencv-python-headless", "pillow")},
        plan=plan.digest,
        splits=splits,
        rejected=_file_entry(partial, REJECTED),
    )
    write_atomically(partial / MANIFEST, manifest.to_bytes())
    return manifest


def _file_entry(folder: Path, name: str) -> dict[str, Any]:
    """Give name, size and digest of a file, as the manifest has them."""
    path = folder / name
    return {"file": name, "size_bytes": path.stat().st_size, "sha256": file_digest(path)}


def _split_info(
    partial: Path,
    plan: Plan,
    split: str,
    layout: Layout,
    results: Sequence[ShardResult],
    rejected: Sequence[Rejected],
    before: list[NDArray[np.uint64]],
) -> SplitInfo:
    """Join the record lines of a split's shards, and count them; ``before`` grows by the split's source digests."""
    stored = [result for result in results if result.info is not None]
    images = sum(result.images for result in stored)
    counts = np.zeros(len(plan.classes), np.int64)
    digests = np.empty(images, np.uint64)
    changes: Counter[str] = Counter()

    def lines() -> Iterator[str]:
        row = 0
        for number, result in enumerate(stored):
            with lines_path(partial, result.name).open(encoding="utf-8") as text:
                for line in text:
                    values = json.loads(line)
                    if values["label"] >= 0:
                        counts[values["label"]] += 1
                    digests[row] = int(values["source_sha256"][:16], 16)
                    row += 1
                    changes.update(values.get("changes", ()))
                    # No quote stands unescaped in a name, so this is the field.
                    yield line.rstrip("\n").replace(',"shard":0,', f',"shard":{number},', 1)

    path = partial / split / RECORDS
    write_records(path, lines())
    sync(path)
    sync(path.parent)
    mine = Counter(item.reason.value for item in rejected if item.split == split)
    return SplitInfo(
        found=images + sum(mine.values()),
        images=images,
        rejected=dict(mine),
        changes=dict(changes),
        duplicates=images - _new_digests(digests, before),
        class_counts=tuple(int(count) for count in counts),
        header_size=layout.header_size,
        page_size=layout.page_size,
        records=_file_entry(partial, f"{split}/{RECORDS}"),
        shards=tuple(result.info for result in stored if result.info is not None),
    )


def _new_digests(digests: NDArray[np.uint64], before: list[NDArray[np.uint64]]) -> int:
    """Count the different digests that no split before has; sorts them in place, as a million need not be copied."""
    digests.sort()
    fresh = 0
    for start in range(0, len(digests), _CHUNK_ROWS):
        chunk = np.unique(digests[start : start + _CHUNK_ROWS])
        if start and chunk[0] == digests[start - 1]:
            chunk = chunk[1:]
        known = np.zeros(len(chunk), bool)
        for other in before:
            place = np.minimum(np.searchsorted(other, chunk), len(other) - 1)
            known |= other[place] == chunk
        fresh += int(np.count_nonzero(~known))
    if len(digests):
        before.append(digests)
    return fresh
