"""Do the numbers add up: those of the list of rejected images, and ILSVRC2012's as published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from imnet_prep import catalog
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.records.check import check_size
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import MANIFEST, Manifest, SplitInfo
from imnet_prep.records.problems import Problem

EXPECTATIONS = ("ilsvrc2012",)


def check_rejected(folder: RecordsFolder) -> Iterator[Problem]:
    """Compare the list of rejected images with the manifest: its size, its digest, and the numbers by reason."""
    entry, splits = folder.manifest.rejected, folder.manifest.splits
    if not entry:
        return
    file = str(entry["file"])
    if problem := check_size(folder.path, file, entry["size_bytes"]):
        yield problem
        return
    found: dict[str, Counter[str]] = {name: Counter() for name in splits}
    try:
        for item in folder.rejected():
            # A split whose images were all rejected is not in the manifest.
            found.setdefault(item.split, Counter())[item.reason] += 1
    except (IntegrityError, RecordsError) as error:
        yield Problem("rejected", file, str(error))
        return
    for name, split in splits.items():
        if found[name] != split.rejected:
            yield Problem(
                "rejected", file, f"split {name}: expected {_words(split.rejected)}, got {_words(found[name])}"
            )


def _words(counts: Mapping[str, int]) -> str:
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
    known = catalog.counts()
    total, low, high = {
        "train": (known.train, known.train_per_class_min, known.train_per_class_max),
        "val": (known.val, known.val_per_class, known.val_per_class),
    }[name]
    # Asked for, every image must be there; else those that were rejected, under a budget, are accounted for.
    if total != (split.images if asked else split.found):
        duplicates = split.rejected.get("duplicate", 0)
        detail = f"split {name}: ILSVRC2012 has {total:,} images, here are {split.images:,}"
        yield Problem("counts", MANIFEST, detail + (f" ({duplicates} rejected as duplicates)" if duplicates else ""))
    low = 0 if not asked and any(split.rejected.values()) else low
    wrong = [label for label, count in enumerate(split.class_counts) if not low <= count <= high]
    if wrong:
        between = f"{low}" if low == high else f"{low} to {high}"
        first = f"label {wrong[0]} has {split.class_counts[wrong[0]]}"
        yield Problem("counts", MANIFEST, f"split {name}: {len(wrong)} classes without {between} images; {first}")
