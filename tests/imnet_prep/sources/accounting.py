"""Whether a conversion accounts for every image of its sources: stored, rejected by name, or said to be skipped."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.record_list import REJECTED, RecordLine, read_rejected
from tests.records import read_records

Originals = Mapping[tuple[str, str], bytes]
"""The bytes of each image by its split and ``<class>/<name>``, as the undamaged source has it."""


def stored(records: Path) -> dict[tuple[str, str], RecordLine]:
    """Every record of a finished folder by split and name."""
    splits = RecordsFolder.open(records).manifest.splits
    return {(name, line.file_name): line for name, split in splits.items() for line in read_records(records, split)}


def lost(originals: Originals, records: Path) -> list[str]:
    """The images that a finished folder neither stores, under their name or another, nor lists as rejected.

    An image is also accounted for where a rejection ends with its base name: damage can destroy what was before it.
    Each rejection and each record counts for one image.
    """
    there = stored(records)
    digests = Counter(line.source_sha256 for key, line in there.items() if key not in originals)
    rejected = list(read_rejected(records / REJECTED))
    names = Counter((item.split, item.file_name) for item in rejected)
    bases = Counter(item.file_name.rpartition("/")[2] for item in rejected)
    missing = []
    for (split, name), data in originals.items():
        digest, base = hashlib.sha256(data).hexdigest(), name.rpartition("/")[2]
        if (split, name) in there:
            continue
        if names[split, name]:
            names[split, name] -= 1
            bases[base] -= 1
        elif digests[digest]:
            digests[digest] -= 1
        elif bases[base] > 0:
            bases[base] -= 1
        else:
            missing.append(f"{split}/{name}")
    return missing


def skipped_bytes(records: Path) -> int:
    """How many bytes of the sources the manifest says were skipped."""
    return sum(source.get("skipped_bytes", 0) for source in RecordsFolder.open(records).manifest.sources)


def check_accounted(originals: Originals, records: Path, exit_code: int, *, salvaged: bool = False) -> None:
    """Assert that every image is accounted for, or that the command failed and made no folder.

    Args:
        originals: What the undamaged source holds.
        records: The ``--out`` of the run.
        exit_code: Of the run.
        salvaged: It ran with ``--salvage``: where the manifest says that bytes were skipped, images may be missing.
    """
    if exit_code:
        assert not records.exists(), f"exit {exit_code}, and yet there is {records}"
        return
    assert (salvaged and skipped_bytes(records)) or not (missing := lost(originals, records)), missing[:5]
