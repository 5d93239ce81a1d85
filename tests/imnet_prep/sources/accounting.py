"""Whether a conversion accounts for every image of its sources: stored, rejected by name, or said to be skipped."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.record_list import REJECTED, read_rejected
from imnet_prep.types import Rejected
from tests.records import read_records

Name = tuple[str, str]
"""The split of an image and its ``<class>/<name>``."""


def stored_in(records: Path) -> dict[Name, str]:
    """The SHA-256, as found, of every image in a finished folder."""
    splits = RecordsFolder.open(records).manifest.splits
    return {
        (name, line.file_name): line.source_sha256
        for name, split in splits.items()
        for line in read_records(records, split)
    }


def lost(originals: Mapping[Name, bytes], stored: Mapping[Name, str], rejected: Iterable[Rejected]) -> list[Name]:
    """The images that are neither stored, under their name or another, nor rejected.

    Args:
        originals: The bytes of each image in the undamaged source.
        stored: The SHA-256 of each image as found.
        rejected: Those that were rejected. One counts for an image of its name; damage can destroy the folders in it.
    """
    others = Counter(digest for key, digest in stored.items() if key not in originals)
    names, bases = Counter[Name](), Counter[str]()
    for item in rejected:
        names[item.split, item.file_name] += 1
        bases[item.file_name.rpartition("/")[2]] += 1
    missing = []
    for key, data in originals.items():
        digest, base = hashlib.sha256(data).hexdigest(), key[1].rpartition("/")[2]
        if key in stored:
            continue
        if names[key] > 0:
            names[key] -= 1
            bases[base] -= 1
        elif others[digest] > 0:
            others[digest] -= 1
        elif bases[base] > 0:
            bases[base] -= 1
        else:
            missing.append(key)
    return missing


def says_skipped(records: Path) -> bool:
    """Whether the manifest says that bytes of the sources were skipped."""
    return any("skipped_bytes" in source for source in RecordsFolder.open(records).manifest.sources)


def check_accounted(originals: Mapping[Name, bytes], records: Path, exit_code: int, *, salvaged: bool = False) -> None:
    """Assert that every image is accounted for, or that the command failed and made no folder.

    Args:
        originals: The bytes of each image in the undamaged source.
        records: The ``--out`` of the run.
        exit_code: Of the run.
        salvaged: It ran with ``--salvage``: where the manifest says that bytes were skipped, images may be missing.
    """
    if exit_code:
        assert not records.exists(), f"exit {exit_code}, and yet there is {records}"
    elif not (salvaged and says_skipped(records)):
        missing = lost(originals, stored_in(records), read_rejected(records / REJECTED))
        assert not missing, missing[:5]
