"""Write the lists of records and rejections of finished shards, and make the manifest.

Only this module makes a manifest: for conversions, for resharded records and for adopted files.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep import catalog
from imnet_prep.build.plan import CONVENTIONS, Plan
from imnet_prep.build.shard_task import ShardResult, done_path
from imnet_prep.cpu import library_versions
from imnet_prep.files import file_digest, sync, write_atomically
from imnet_prep.records.manifest import Manifest, SplitInfo
from imnet_prep.records.publish import BUILD_WORK
from imnet_prep.records.record_list import RECORDS, REJECTED, rejected_bytes, write_lines
from imnet_prep.records.shards import Layout
from imnet_prep.types import ShardInfo

Digests = list[NDArray[np.uint64]]  # the first 8 bytes of each record's source digest, sorted, one array per split


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
        plan: The plan of the conversion.
        layouts: Sizes of each split's data files.
        sources: The sources, as the manifest records them.
        results: The results of all shards, in the order of the plan.

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
        label_convention=CONVENTIONS[plan.label_space],
        seed=plan.options.seed,
        options=plan.options.content(),
        sources=tuple(sorted(sources, key=lambda source: json.dumps(source, sort_keys=True))),
        plan=plan.digest,
        rejected=_file_entry(partial / REJECTED, REJECTED),
    )


def describe(splits: dict[str, SplitInfo], classes: tuple[str, ...], **rest: Any) -> Manifest:
    """Return the manifest of finished splits, with the words of the classes and the versions of the libraries used."""
    return Manifest(
        classes=classes,
        class_words=tuple(map(catalog.class_words, classes)),
        made_with=library_versions("imnet-prep", "opencv", "pillow"),
        splits=splits,
        **rest,
    )


def _file_entry(path: Path, name: str) -> dict[str, Any]:
    """Return name, size and digest of a file, as the manifest records them."""
    return {"file": name, "size_bytes": path.stat().st_size, "sha256": file_digest(path)}


def _lines(partial: Path, shards: Iterable[str]) -> Iterator[str]:
    """Yield the record lines of a split's shards, with the number of their shard filled in."""
    for number, name in enumerate(shards):
        with done_path(partial, name, ".jsonl").open(encoding="utf-8", newline="\n") as text:
            for line in text:
                # The last is the field: only strings follow it, and quotes in them are escaped.
                before, _, after = line.rstrip("\n").rpartition(',"shard":0,')
                yield f'{before},"shard":{number},{after}'


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
    """Write the record list of a split, and count its records.

    Args:
        path: The list to write.
        split: The name of the split.
        lines: The lines of all its records, in stored order (:class:`~imnet_prep.records.record_list.RecordLine`).
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
    """Count the different digests that no split before has; sort them in place, as there may be millions."""
    digests.sort()
    fresh = np.ones(len(digests), bool)
    fresh[1:] = digests[1:] != digests[:-1]
    for other in before:
        fresh &= other[np.minimum(np.searchsorted(other, digests), len(other) - 1)] != digests
    if len(digests):
        before.append(digests)
    return int(np.count_nonzero(fresh))
