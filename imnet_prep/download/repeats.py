"""Find placeholders by repetition: the same bytes from many URLs are no photograph."""

from __future__ import annotations

import itertools

from imnet_prep.download.journal import PLACE, Journal
from imnet_prep.download.options import ContentOptions, FailReason


def retract_repeats(journal: Journal, options: ContentOptions) -> int:
    """Turn images that too many URLs share, byte for byte, into placeholders. Return the number of URLs.

    Call it on the finished folder, so that the order of arrival does not matter. The files are listed in ``doomed``, in
    the same transaction; :func:`imnet_prep.download.folder.bury` deletes them.
    """
    known = journal.db.execute(
        "SELECT DISTINCT urls.sha256 FROM placeholders CROSS JOIN urls INDEXED BY by_digest"
        " ON urls.sha256 = placeholders.sha256 AND urls.state = 1"
    ).fetchall()
    total = sum(_retract(journal, sha256, "the same bytes as a known placeholder") for (sha256,) in known)
    usual = _usual_multiplicity(journal)
    groups = journal.db.execute(
        "SELECT sha256, count(*), max(flat) FROM urls INDEXED BY by_digest WHERE state = 1 GROUP BY sha256"
        " HAVING count(*) >= ?",
        (min(options.repeats_flat, options.repeats_photo),),
    ).fetchall()
    for sha256, count, flat in groups:
        if count >= usual * (options.repeats_flat if flat else options.repeats_photo):
            total += _retract(journal, sha256, f"the same bytes from {count} URLs")
    return total


def _usual_multiplicity(journal: Journal) -> int:
    """Return the median number of URLs that share a photograph's bytes: 1 but for lists that repeat themselves."""
    histogram = journal.db.execute(
        "SELECT c, count(*) FROM"
        " (SELECT count(*) AS c, max(flat) AS flat FROM urls INDEXED BY by_digest WHERE state = 1 GROUP BY sha256)"
        " WHERE flat = 0 GROUP BY c ORDER BY c"
    ).fetchall()
    seen = list(itertools.accumulate(n for _, n in histogram))
    return next((int(c) for (c, _), upto in zip(histogram, seen, strict=True) if 2 * upto >= seen[-1]), 1)


def _retract(journal: Journal, sha256: bytes, detail: str) -> int:
    shares = "FROM urls WHERE state = 1 AND sha256 = ?"
    with journal.transaction():
        journal.db.execute("INSERT OR IGNORE INTO placeholders VALUES (?)", (sha256,))
        journal.db.execute(f"INSERT OR IGNORE INTO doomed SELECT {PLACE} {shares}", (sha256,))
        urls, size_bytes = journal.db.execute(f"SELECT count(*), sum(bytes) {shares}", (sha256,)).fetchone()
        journal.db.execute(
            "UPDATE urls SET state = 2, reason = ?, transient = 0, detail = ? WHERE state = 1 AND sha256 = ?",
            (FailReason.PLACEHOLDER, detail, sha256),
        )
        journal.count({"ok": -urls, "bytes": -size_bytes, f"failed:{FailReason.PLACEHOLDER}": urls})
    return int(urls)
