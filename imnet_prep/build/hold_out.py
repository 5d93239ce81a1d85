"""Choose validation images from the training images, for sources without a validation split."""

import hashlib
import sqlite3
from collections.abc import Callable

from imnet_prep.errors import PlanError
from imnet_prep.types import SPLITS

_TRAIN, _VAL = SPLITS.index("train"), SPLITS.index("val")
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
    added. Only a class without any image below the threshold, or with nothing else, depends on its other images.

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

    def chance(file_name: str) -> int:
        name = f"train/{file_name}".encode()
        return int.from_bytes(
            hashlib.blake2b(name, digest_size=8, key=seed, person=b"val").digest(), "little", signed=True
        )

    connection.create_function("chance", 1, chance, deterministic=True)
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
