"""Choose validation images from the training images, for sources without a validation split."""

import hashlib
import posixpath
import re
import sqlite3
from collections.abc import Callable

from imnet_prep.errors import PlanError
from imnet_prep.types import SPLITS

_TRAIN, _VAL = SPLITS.index("train"), SPLITS.index("val")
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*)", re.DOTALL)
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio
_CHOSEN = (  # of each class: those below the threshold, or one where that share is an image or more; never all
    "SELECT record FROM (SELECT record, chance, "
    "ROW_NUMBER() OVER (PARTITION BY class ORDER BY chance, record) AS place, "
    "COUNT(*) OVER (PARTITION BY class) AS images "
    f"FROM (SELECT record, class, chance(file_name) AS chance FROM found WHERE split = {_TRAIN} AND class != '')) "
    "WHERE place < images AND (chance < :threshold OR (place = 1 AND images * :fraction >= 1))"
)


def hold_out(
    connection: sqlite3.Connection, fraction: float, seed: bytes, keys: Callable[[str, str], tuple[int, int]]
) -> None:
    """Move a fraction of each class from the train split to the val split of a plan that is being made.

    Whether an image is moved depends on the seed and its own name, so that it stays where it is when other images are
    added. Only where none of a class would be moved, or all, this depends on its other images.

    Args:
        connection: The database, with the table ``found``.
        fraction: The probability of each image, between 0 and 1.
        seed: The key of the hash.
        keys: Returns the record id and the rank of an image by split and name.

    Raises:
        PlanError: There is a validation split, or no class has two training images.
    """
    counts = dict(connection.execute("SELECT split, COUNT(*) FROM found GROUP BY split"))
    if _VAL in counts:
        raise PlanError(
            "--val-fraction: the sources have a validation split",
            expected="a train split alone, which is divided",
            got=f"{counts[_VAL]} validation images",
            remedy="leave out --val-fraction, or select the training images with --split train",
        )

    connection.create_function("chance", 1, lambda name: _chance(name, seed), deterministic=True)
    connection.create_function("val_record", 1, lambda name: keys("val", name)[0], deterministic=True)
    connection.create_function("val_rank", 1, lambda name: keys("val", name)[1], deterministic=True)
    moved = connection.execute(
        f"UPDATE found SET split = {_VAL}, record = val_record(file_name), rank = val_rank(file_name) "
        f"WHERE split = {_TRAIN} AND record IN ({_CHOSEN})",
        {"threshold": round(fraction * (1 << 64)) - (1 << 63), "fraction": fraction},
    ).rowcount
    if not moved:
        raise PlanError(
            f"--val-fraction {fraction} leaves no image for validation",
            expected="classes with two training images or more",
            got=f"{counts.get(_TRAIN, 0)} training images",
            remedy="use a larger fraction",
        )


def _chance(file_name: str, seed: bytes) -> int:
    """Return a number for the threshold, uniform over all 64 bits (signed), by the name of an image.

    Images whose names differ in their last number alone are multiples of the golden ratio apart. So the fraction of
    images numbered in sequence is met within two or three, where independent numbers would miss it by more.

    Source: Knuth, The Art of Computer Programming, volume 3, section 6.4 (Fibonacci hashing, theorem S).
    """
    before, number, after = _parts(posixpath.splitext(file_name)[0])
    name = f"train/{before}\0{after}".encode()
    start = hashlib.blake2b(name, digest_size=8, key=seed, person=b"val").digest()
    return (int.from_bytes(start, "little") + number * _GOLDEN) % (1 << 64) - (1 << 63)


def _parts(stem: str) -> tuple[str, int, str]:
    """Return the last number in a name, and what is before and after it."""
    match = _NUMBERED.fullmatch(stem)
    return (match[1], int(match[2]), match[3]) if match else (stem, 0, "")
