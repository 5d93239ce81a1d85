"""What img2dataset writes beside each tar: how many URLs gave an image, and why others did not."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from imnet_prep.errors import SourceError
from imnet_prep.files import open_plain
from imnet_prep.sources.base import printable

_MAX_STATS_BYTES = 64 << 20
_LISTED = 4  # reasons


def account(tar: Path, images: int) -> str:
    """Compare the images in a tar with its ``_stats.json``.

    Args:
        tar: The tar. images: Its samples with an image.

    Returns:
        A note on the URLs that gave no image, or an empty string. Where pyarrow is installed, it counts the rows of the
        ``.parquet`` beside the tar by status; otherwise it repeats the counts of the ``_stats.json``.

    Raises:
        SourceError: The tar has fewer images than were written.
    """
    stats = _stats(tar.with_name(f"{tar.stem}_stats.json"))
    if not stats:
        return ""
    if images < stats["successes"]:
        raise SourceError(
            f"{tar} lacks images",
            expected=f"{stats['successes']} by {tar.stem}_stats.json",
            got=str(images),
            remedy="download it again; without that file, what is there is taken",
        )
    failed = stats["count"] - stats["successes"]
    if not failed:
        return ""
    reasons = _statuses(tar.with_suffix(".parquet")) or Counter(
        {name: count for name, count in stats.items() if name.startswith("failed_") and count}
    )
    listed = ", ".join(f"{printable(reason)} {count}" for reason, count in reasons.most_common(_LISTED))
    return f"{tar.name}: {failed} of {stats['count']} URLs failed ({listed or 'no reason given'})"


def _stats(path: Path) -> dict[str, int]:
    """Return the counts in a ``_stats.json``; nothing if there is no such file."""
    try:
        with open_plain(path) as file:
            values: dict[str, Any] = json.loads(file.read(_MAX_STATS_BYTES))
        counts = {name: value for name, value in values.items() if type(value) is int}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # of another tool
    return counts if {"count", "successes"} <= counts.keys() else {}


def _statuses(path: Path) -> Counter[str]:
    """Count the failed rows of img2dataset's Parquet file by status; nothing without the file or pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return Counter()
    try:
        statuses = parquet.read_table(path, columns=["status"])["status"].to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException):
        return Counter()
    return Counter(str(status) for status in statuses if status != "success")
