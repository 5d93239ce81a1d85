"""Do the numbers add up: manifest against itself, the list of rejected images, and ILSVRC2012 as published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from imnet_prep import catalog
from imnet_prep.errors import RecordsError
from imnet_prep.problems import Problem
from imnet_prep.records.manifest import MANIFEST, Manifest, SplitInfo

EXPECTATIONS = ("ilsvrc2012",)


def check_counts(name: str, split: SplitInfo) -> Iterator[Problem]:
    """Compare the manifest's numbers for a split with each other."""
    rows = sum(shard.rows for shard in split.shards)
    if rows != split.images:
        yield Problem("manifest", MANIFEST, f"split {name}: {split.images} images, but its shards have {rows} rows")
    if split.found != split.images + sum(split.rejected.values()):
        yield Problem("manifest", MANIFEST, f"split {name}: found {split.found} is not images + rejected")
    labelled = sum(split.class_counts)
    if labelled != split.images and not (name == "test" and labelled == 0):
        yield Problem("manifest", MANIFEST, f"split {name}: {split.images} images, but class_counts add to {labelled}")


def check_rejected(records: Path, manifest: Manifest) -> Iterator[Problem]:
    """Compare the list of rejected images with the manifest's numbers."""
    if not manifest.rejected:
        return
    file = str(manifest.rejected["file"])
    found: dict[str, Counter[str]] = {}
    number = 0
    try:
        with (records / file).open("rb") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - named in the message
                values = json.loads(line)
                found.setdefault(str(values["split"]), Counter())[str(values["reason"])] += 1
    except OSError:
        return  # said as missing or of another size
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        yield Problem("rejected", file, f"line {number} is damaged: {error}")
        return
    for name in sorted({*found, *manifest.splits}):
        got = dict(found.get(name, Counter()))
        expected = manifest.splits[name].rejected if name in manifest.splits else {}
        # A split whose images were all rejected is not in the manifest.
        if name in manifest.splits and got != expected:
            yield Problem("rejected", file, f"split {name}: expected {_words(expected)}, got {_words(got)}")


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in sorted(counts.items())) or "none"


def check_expectation(manifest: Manifest, expect: str | None) -> Iterator[Problem]:
    """Compare with ILSVRC2012 as published, where it was asked for or where official archives were converted whole.

    Raises:
        RecordsError: The expectation is unknown.
    """
    if expect is not None and expect not in EXPECTATIONS:
        raise RecordsError(f"unknown --expect {expect!r}", expected=f"one of {', '.join(EXPECTATIONS)}")
    names = tuple(synset.wnid for synset in catalog.synsets())
    if expect is not None and manifest.classes != names:
        detail = f"expected the {len(names)} wnids of ILSVRC2012 in sorted order, got {len(manifest.classes)} classes"
        yield Problem("counts", MANIFEST, detail)
    if expect is not None and not {"train", "val"} & set(manifest.splits):
        yield Problem("counts", MANIFEST, "expected a train or val split")
    for name in ("train", "val"):
        split = manifest.splits.get(name)
        if split is not None and (expect is not None or _official_and_whole(manifest, name)):
            yield from _check_published(name, split, asked=expect is not None)


def _official_and_whole(manifest: Manifest, split: str) -> bool:
    """Whether a split came from its official archive alone, and nothing was left out on purpose."""
    options = manifest.options
    if any(options.get(name) is not None for name in ("keep_classes", "max_per_class")):
        return False
    archives = [catalog.archive_with_digest(str(source["md5"])) for source in manifest.sources]
    kinds = {archive.split for archive in archives if archive is not None and "train_t3" not in archive.file_name}
    return split in kinds and all(source["official"] or source["images"] is None for source in manifest.sources)


def _check_published(name: str, split: SplitInfo, *, asked: bool) -> Iterator[Problem]:
    counts = catalog.counts()
    total = counts.train if name == "train" else counts.val
    duplicates = split.rejected.get("duplicate", 0)
    # Asked for, every image must be there; else those that were rejected, under a budget, are accounted for.
    got = split.images if asked else split.found
    if got != total:
        detail = f"split {name}: ILSVRC2012 has {total:,} images, here are {split.images:,}"
        yield Problem("counts", MANIFEST, detail + (f" ({duplicates} rejected as duplicates)" if duplicates else ""))
    low, high = counts.train_per_class_min, counts.train_per_class_max
    if name == "val":
        low = high = counts.val_per_class
    if not asked and any(split.rejected.values()):
        low = 0
    wrong = [label for label, count in enumerate(split.class_counts) if not low <= count <= high]
    if wrong:
        between = f"{low}" if low == high else f"{low} to {high}"
        first = f"label {wrong[0]} has {split.class_counts[wrong[0]]}"
        yield Problem("counts", MANIFEST, f"split {name}: {len(wrong)} classes without {between} images; {first}")
