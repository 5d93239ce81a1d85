"""Finished shards to a whole records folder: the lists of records and rejections and, last, the manifest.

This is the one place that makes a manifest: for conversions, for resharded records and for files that others made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog
from imnet_prep.build.plan import Plan
from imnet_prep.build.shard_task import ShardResult, done_path
from imnet_prep.cpu import library_versions
from imnet_prep.files import file_digest, sync, write_atomically
from imnet_prep.records.manifest import Manifest, SplitInfo
from imnet_prep.records.publish import BUILD_WORK
from imnet_prep.records.record_list import RECORDS, REJECTED, rejected_bytes, write_lines
from imnet_prep.records.shards import Layout
from imnet_prep.types import ShardInfo

Digests = list[NDArray[np.uint64]]  # the first 8 bytes of each record's source digest, sorted, an array a split


def assemble(
    partial: Path,
    plan: Plan,
    layouts: dict[str, Layout],
    sources: Sequence[dict[str, Any]],
    results: Sequence[ShardResult],
) -> Manifest:
    """Write the lists of a conversion and return its manifest, which is not written yet.

    Args:
        partial: The folder with all shards in place.
        plan: What was carried out.
        layouts: Sizes of each split's data files.
        sources: Where the images came from, as the manifest records it.
        results: Of all shards, in the order of the plan.

    Raises:
        OSError: The disk is full or fails.
    """
    rejected = [*plan.rejected, *(item for result in results for item in result.rejected)]
    write_atomically(partial / REJECTED, rejected_bytes(rejected), stage=partial / BUILD_WORK)
    splits: dict[str, SplitInfo] = {}
    digests: Digests = []
    for split in plan.splits:
        stored = {result.name: result.info for result in results if result.split == split and result.info is not None}
        splits[split] = describe_split(
            partial / split / RECORDS,
            split,
            _lines(partial, stored),
            list(stored.values()),
            layouts[split],
            len(plan.classes),
            Counter(item.reason.value for item in rejected if item.split == split),
            digests,
        )
        sync(partial / split)
    return describe(
        splits,
        plan.classes,
        label_space=plan.label_space,
        label_convention=plan.label_convention,
        seed=plan.options.seed,
        options=plan.options.content(),
        sources=tuple(sorted(sources, key=lambda source: json.dumps(source, sort_keys=True))),
        plan=plan.digest,
        rejected=_file_entry(partial / REJECTED, REJECTED),
    )


def describe(splits: dict[str, SplitInfo], classes: tuple[str, ...], **rest: Any) -> Manifest:
    """Return the manifest of finished splits: with the classes' words, and the versions of what made the images."""
    words, made_with = tuple(map(catalog.class_words, classes)), library_versions("imnet-prep", "opencv", "pillow")
    return Manifest(classes=classes, class_words=words, made_with=made_with, splits=splits, **rest)


def _file_entry(path: Path, name: str) -> dict[str, Any]:
    """Return name, size and digest of a file, as the manifest has them."""
    return {"file": name, "size_bytes": path.stat().st_size, "sha256": file_digest(path)}


def _lines(partial: Path, shards: Iterable[str]) -> Iterator[str]:
    """Join the record lines of a split's shards, which do not know their own number."""
    for number, name in enumerate(shards):
        with done_path(partial, name, ".jsonl").open(encoding="utf-8", newline="\n") as text:
            for line in text:
                # No quote stands unescaped in a name, so this is the field.
                yield line.rstrip("\n").replace(',"shard":0,', f',"shard":{number},', 1)


def describe_split(
    path: Path,
    split: str,
    lines: Iterable[str],
    shards: Sequence[ShardInfo],
    layout: Layout,
    classes: int,
    rejected: dict[str, int],
    before: Digests,
) -> SplitInfo:
    """Write the record list of a split, and count what is in it.

    Args:
        path: The list to write.
        split: Its name.
        lines: Of all its records, in stored order (:class:`~imnet_prep.records.record_list.RecordLine`).
        shards: Its data files.
        layout: Their sizes.
        classes: Number of classes.
        rejected: Number of rejected images by reason.
        before: Digests of the splits before; this one's are appended.

    Raises:
        OSError: The disk is full or fails.
    """
    images = sum(shard.rows for shard in shards)
    counts = np.zeros(classes, np.int64)
    digests = np.empty(images, np.uint64)
    changes: Counter[str] = Counter()

    def counted() -> Iterator[str]:
        for row, line in enumerate(lines):
            values = json.loads(line)
            if values["label"] >= 0:
                counts[values["label"]] += 1
            digests[row] = int(values["source_sha256"][:16], 16)
            changes.update(values.get("changes", ()))
            yield line

    write_lines(path, counted())
    return SplitInfo(
        found=images + sum(rejected.values()),
        images=images,
        rejected=dict(rejected),
        changes=dict(changes),
        duplicates=images - _new_digests(digests, before),
        class_counts=tuple(counts.tolist()),
        header_size=layout.header_size,
        page_size=layout.page_size,
        records=_file_entry(path, f"{split}/{RECORDS}"),
        shards=tuple(shards),
    )


def _new_digests(digests: NDArray[np.uint64], before: Digests) -> int:
    """Count the different digests that no split before has; sorts them in place, as a million need not be copied."""
    digests.sort()
    fresh = np.ones(len(digests), bool)
    fresh[1:] = digests[1:] != digests[:-1]
    for other in before:
        fresh &= other[np.minimum(np.searchsorted(other, digests), len(other) - 1)] != digests
    if len(digests):
        before.append(digests)
    return int(np.count_nonzero(fresh))
