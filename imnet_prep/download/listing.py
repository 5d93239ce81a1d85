"""Write the listings beside the images: ``failures.jsonl`` and ``bad_lines.jsonl``."""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from imnet_prep.download.journal import Journal
from imnet_prep.download.urls import host_of

FAILURES_NAME = "failures.jsonl"
BAD_LINES_NAME = "bad_lines.jsonl"
_TOP = 5


def write_listings(journal: Journal) -> tuple[tuple[str, int], ...]:
    """Write both listings, each whole or not at all.

    Returns:
        (host, failed URLs) of the hosts with the most failures.
    """
    hosts: Counter[str] = Counter()
    failures = _items(
        journal,
        "SELECT wnid, name AS id, url, reason, transient, status, coalesce(final_url, url) AS final_url, attempts,"
        " coalesce(detail, '') AS detail, time FROM urls WHERE state = 2 ORDER BY row",
    )
    _write(journal.folder / FAILURES_NAME, (_failure(item, hosts) for item in failures))
    bad = _items(
        journal,
        "SELECT lists.path AS list, line, kind, why, text FROM bad_lines JOIN lists ON lists.id = bad_lines.list"
        " ORDER BY bad_lines.list, line",
    )
    _write(journal.folder / BAD_LINES_NAME, (item | {"list": Path(item["list"]).name} for item in bad))
    return tuple(hosts.most_common(_TOP))


def _items(journal: Journal, query: str) -> Iterator[dict[str, Any]]:
    rows = journal.db.cursor()
    rows.row_factory = sqlite3.Row
    return map(dict, rows.execute(query))


def _failure(item: dict[str, Any], hosts: Counter[str]) -> dict[str, Any]:
    host = host_of(item["url"])
    hosts[host] += 1
    return item | {"host": host, "transient": bool(item["transient"])}


def _write(path: Path, items: Iterable[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
