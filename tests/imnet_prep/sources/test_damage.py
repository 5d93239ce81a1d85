"""Not one image is lost without a word, however an archive is damaged; and --salvage takes what is left."""

from __future__ import annotations

import hashlib
import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pytest

from imnet_prep.errors import SourceError
from imnet_prep.images.check import ValidateOptions, validate
from imnet_prep.sources import detect, merge, read
from imnet_prep.types import ImageRef, Rejected
from tests.imnet_prep.sources.accounting import Name, lost
from tests.imnet_prep.sources.damaged import BLOCK, MAKERS, damage, places


@dataclass
class Outcome:
    """What a conversion stores, rejects and skips, or its error."""

    stored: dict[Name, str]
    rejected: list[Rejected]
    skipped: int | None = None  # bytes that are named as left out
    error: str = ""


def outcome(paths: Sequence[Path], *, salvage: bool = False) -> Outcome:
    """Find, read and check the images of some sources, as a conversion does."""
    stored, rejected = dict[Name, str](), list[Rejected]()
    try:
        sources = detect(paths, salvage=salvage)
        for found in merge(sources):
            raw = read(found) if isinstance(found, ImageRef) else found
            sample = raw if isinstance(raw, Rejected) else validate(raw, ValidateOptions())
            if isinstance(sample, Rejected):
                rejected.append(sample)
            else:
                stored[found.split, found.file_name] = sample.source_sha256
    except SourceError as error:
        return Outcome({}, [], error=str(error))
    skipped = [source.skipped_bytes for source in sources if source.skipped_bytes is not None]
    return Outcome(stored, rejected, sum(skipped) if skipped else None)


def count_if_whole(data: bytes) -> int | None:
    """Count the files of a tar that is, byte for byte, what ``tar -b N`` writes, or ``cat`` of two such; else None.

    Nothing tells then that there were more. Python's tarfile reads the files; behind them are the zeros of a record.
    """
    try:
        members = list(places(data))
    except tarfile.TarError:
        return None
    inner = [count_if_whole(data[body:stop]) for name, _, body, stop in members if name.endswith(".tar")]
    end = max((stop for *_, stop in members), default=0)
    end += -end % BLOCK
    zeros = len(data[end:]) - len(data[end:].lstrip(b"\x00"))
    after, rest = end + zeros // BLOCK * BLOCK, 0
    if not members:
        return None
    if after < len(data):
        is_joint = after % (20 * BLOCK) == 0 and 2 * BLOCK <= after - end < 22 * BLOCK
        follows = count_if_whole(data[after:])
        if not is_joint or follows is None:
            return None
        rest = follows
    else:
        factors = [factor for factor in (*range(1, 21), 32, 64, 128, 256) if len(data) % (factor * BLOCK) == 0]
        if zeros < BLOCK or not any(zeros < (factor + 2) * BLOCK for factor in factors):
            return None
    return None if None in inner else len(members) + sum(filter(None, inner)) + rest


def untold(damaged: Mapping[str, bytes], original: Mapping[str, bytes]) -> int:
    """The number of files that whole tars do not have any more, as nothing in them tells."""
    counts = [(count_if_whole(data), count_if_whole(original[name])) for name, data in damaged.items()]
    return 0 if None in dict(counts) else sum((before or 0) - (after or 0) for after, before in counts)


def check_lost(images: Mapping[Name, bytes], found: Outcome, allowed: int, about: str) -> None:
    """Check that no image is lost but those that nothing tells of, and those that the bytes left out have room for.

    How many of these were there before a cut is not known.
    """
    missing = lost(images, found.stored, found.rejected)
    rooms = sorted(BLOCK + -(-len(images[key]) // BLOCK) * BLOCK for key in missing)
    hidden = sum(total <= (found.skipped or 0) for total in accumulate(rooms))
    if not (found.skipped and "cut" in about):
        assert len(missing) <= max(allowed, hidden), f"{about}: {missing[:3]}"


SEEDS = [range(8), *(pytest.param(range(k, k + 124), marks=pytest.mark.long) for k in range(8, 1000, 124))]


@pytest.mark.parametrize("form", MAKERS)
@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_damaged_archives_account_for_every_image(form: str, seeds: range, tmp_path: Path) -> None:
    untouched_images = kept = 0
    for seed in seeds:
        rng = random.Random(f"{form} {seed}")
        archive = MAKERS[form](rng)
        files, done, touched = damage(rng, archive)
        paths = archive.write(tmp_path / str(seed), files)
        strict = outcome(paths)
        assert "\n" not in strict.error
        allowed = untold(files, archive.files)
        if not strict.error:
            assert (strict.skipped or 0) <= 64 * BLOCK  # of zeros at the end
            check_lost(archive.images, strict, allowed, f"seed {seed}: {done}")
        salvaged = outcome(paths, salvage=True)
        untouched = archive.images.keys() - touched
        if salvaged.error:
            assert not untouched, f"seed {seed}: {done}: {salvaged.error}"
            continue
        if salvaged.skipped is None:
            check_lost(archive.images, salvaged, allowed, f"seed {seed}: {done}")
        assert strict.error or salvaged == strict
        there = {
            key for key in untouched if salvaged.stored.get(key) == hashlib.sha256(archive.images[key]).hexdigest()
        }
        assert len(untouched - there) <= max(1, 0.05 * len(untouched)), (
            f"seed {seed}: {done}: {sorted(untouched - there)[:3]}"
        )
        untouched_images += len(untouched)
        kept += len(there)
    assert kept >= 0.95 * untouched_images


def test_the_damaged_tar_of_a_folder_is_named(tmp_path: Path) -> None:
    archive = MAKERS["folder"](random.Random(0))
    name = sorted(archive.files)[1]
    data = archive.files[name]
    header = list(places(data))[3][1]
    (folder,) = archive.write(tmp_path / "tars", archive.files | {name: data[:header] + data[header + BLOCK :]})
    assert f"{folder / name} is damaged: bytes {header:,} to " in outcome([folder]).error
    (source,) = detect([folder], salvage=True)
    list(source.refs())
    assert f"({name}: no tar header, after " in source.notes[-1]


def test_an_empty_class_tar_is_damage(tmp_path: Path) -> None:
    archive = MAKERS["folder"](random.Random(0))
    name = sorted(archive.files)[1]
    (folder,) = archive.write(tmp_path / "tars", archive.files | {name: bytes(len(archive.files[name]))})
    assert "zero bytes, and no member" in outcome([folder]).error


def test_a_padded_archive_is_whole_and_a_longer_one_is_not(tmp_path: Path) -> None:
    archive = MAKERS["class"](random.Random(0))
    data = archive.files["x.tar"].rstrip(b"\x00")
    data += bytes(-len(data) % BLOCK)
    for blocks, is_whole in ((0, False), (1, True), (2, True), (64 - len(data) // BLOCK % 64 + 64, True), (401, False)):
        paths = archive.write(tmp_path / str(blocks), {"x.tar": data + bytes(blocks * BLOCK)})
        assert (not outcome(paths).error) == is_whole, blocks
