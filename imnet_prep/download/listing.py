"""What is written beside the images for people: ``failures.jsonl`` and ``bad_lines.jsonl``."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
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
    rows = journal.db.execute(
        "SELECT wnid, name, url, reason, transient, status, final_url, attempts, detail, time"
        " FROM urls WHERE state = 2 ORDER BY row"
    )
    _write(journal.folder / FAILURES_NAME, (_failure(row, hosts) for row in rows))
    bad = journal.db.execute(
        "SELECT lists.path, line, kind, why, text FROM bad_lines JOIN lists ON lists.id = bad_lines.list"
        " ORDER BY list, line"
    )
    keys = ("list", "line", "kind", "why", "text")
    _write(
        journal.folder / BAD_LINES_NAME, (dict(zip(keys, (Path(row[0]).name, *row[1:]), strict=True)) for row in bad)
    )
    return tuple(hosts.most_common(_TOP))


def _failure(row: tuple[Any, ...], hosts: Counter[str]) -> dict[str, Any]:
    wnid, name, url, reason, transient, status, final_url, attempts, detail, time_s = row
    host = host_of(url)
    hosts[host] += 1
    return {
        "wnid": wnid,
        "id": name,
        "url": url,
        "host": host,
        "reason": reason,
        "transient": bool(transient),
        "status": status,
        "final_url": final_url or url,
        "attempts": attempts,
        "detail": detail or "",
        "time": time_s,
    }


def _write(path: Path, items: Iterable[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
