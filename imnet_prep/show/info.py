"""Describe a records folder from its manifest alone."""

from pathlib import Path
from typing import Any

from imnet_prep.records.elsewhere import open_records
from imnet_prep.records.manifest import SplitInfo
from imnet_prep.remote import shown


def describe(records: Path | str) -> dict[str, Any]:
    """Summarise the manifest of a records folder, or of records behind a URL.

    Returns:
        Counts, bytes and class balance by split, the label convention, sources and the digest of the manifest.

    Raises:
        RecordsError: There is no such folder, or it has no manifest.
        RemoteError: The URL cannot be read.
        IntegrityError: The manifest is damaged or was changed.
    """
    folder = open_records(records)
    manifest = folder.manifest
    return {
        "records": shown(str(records)),
        "images": folder.records,
        "classes": len(manifest.classes),
        "first_classes": [
            f"{name} ({words})" if words else name
            for name, words in zip(manifest.classes[:5], manifest.class_words[:5], strict=True)
        ],
        "label_convention": manifest.label_convention,
        "splits": {name: describe_split(split) for name, split in manifest.splits.items()},
        "seed": manifest.seed,
        "options": {name: value for name, value in manifest.options.items() if value is not None},
        "sources": list(manifest.sources),
        "made_with": manifest.made_with,
        "manifest_sha256": manifest.digest,
    }


def describe_split(split: SplitInfo) -> dict[str, Any]:
    """Summarise a split: images, shards, bytes on disk, class balance, and counts of what was not stored unchanged."""
    counts = [count for count in split.class_counts if count]
    return {
        "images": split.images,
        "shards": len(split.shards),
        "bytes": sum(shard.size_bytes + shard.index_size_bytes for shard in split.shards),
        "classes_with_images": len(counts),
        "images_per_class": f"{min(counts, default=0)} to {max(counts, default=0)}",
        "rejected": split.rejected,
        "changes": split.changes,
        "duplicates": split.duplicates,
    }
