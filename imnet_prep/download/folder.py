"""The download folder: locks, spools, what a crash left, commits, placeholders by repetition, and listings.

An image is first written and fsynced in the incoming folder. Then a line goes to its worker's spool, the row is
committed, and the image gets its final name. :func:`recover` repairs what a crash leaves between two of these steps.
"""

import itertools
import json
import logging
import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from imnet_prep.download.journal import DIGEST, JOURNAL_NAME, PLACE, Journal, Outcome
from imnet_prep.download.messages import Task
from imnet_prep.download.options import ContentOptions, FailReason
from imnet_prep.download.urllist import OURS
from imnet_prep.download.urls import host_of
from imnet_prep.errors import DownloadError
from imnet_prep.files import exclusive_lock, file_digest, rename, sync

log = logging.getLogger(__name__)

INCOMING = ".incoming"  # in the download folder: whole images that wait for their row, the spools, the locks
LOCK_NAME = "download.lock"
WORKER_LOCK = "worker-{}.lock"  # held by a worker; the next run waits for it
OLD_WORKERS_LOCK = "users.lock"  # shared by the workers of earlier versions
_COMMIT_EVERY_S = 0.25
FAILURES_NAME = "failures.jsonl"
BAD_LINES_NAME = "bad_lines.jsonl"
_ENDINGS = (".jpg", ".png", ".gif", ".webp", ".bmp", ".tif")  # of the images
_TOP = 5  # hosts named with their failures
_STRAGGLERS_S = 20.0  # how long the workers of a killed run may take to notice


@contextmanager
def opened(out: Path) -> Iterator[Journal]:
    """Open the folder for this process alone.

    Raises:
        DownloadError: It cannot be written, or another process uses it.
    """
    incoming = out / INCOMING
    _refuse_foreign(out)
    with ExitStack() as held:
        try:
            incoming.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive_lock(incoming / LOCK_NAME))
            _wait_for_workers(incoming)
        except BlockingIOError as error:
            raise DownloadError(f"{out} is in use by another download", remedy="wait for it, or stop it") from error
        except OSError as error:
            raise DownloadError(f"cannot write to {out}", got=error.strerror or str(error)) from error
        yield held.enter_context(closing(Journal(out)))


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder of files that no download made: an image would take the name of one of them.

    Raises:
        DownloadError: It has no journal, and a folder or a file of a name that is ours.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        if (out / JOURNAL_NAME).exists():
            return
        with os.scandir(out) as entries:
            taken = [
                one.name for one in entries if one.name != INCOMING and (one.is_dir() or one.name.startswith(OURS))
            ]
        if taken:
            raise DownloadError(
                f"{out} holds what no download made",
                expected="a new folder, or one with a journal.sqlite",
                got=", ".join(sorted(taken)[:5]),
                remedy="choose another --out",
            )


def _wait_for_workers(incoming: Path) -> None:
    """Wait for the workers of a killed run, which die with it but may be inside a write."""
    locks = [*incoming.glob(WORKER_LOCK.format("*")), *incoming.glob(OLD_WORKERS_LOCK)]
    _wait_for(locks, f"workers of an earlier run still use {incoming.parent}", "stop them")


def wait_for_run(out: Path) -> None:
    """Wait for a run that was killed a moment ago.

    Raises:
        DownloadError: It goes on.
    """
    locks = list((out / INCOMING).glob(LOCK_NAME))
    _wait_for(locks, f"{out} is in use by another download", "wait for it, or stop it")


def _wait_for(locks: list[Path], what: str, remedy: str) -> None:
    until = time.monotonic() + _STRAGGLERS_S
    while locks:
        try:
            with exclusive_lock(locks[-1]):
                locks.pop()
        except BlockingIOError:
            if time.monotonic() > until:
                raise DownloadError(what, remedy=remedy) from None
            time.sleep(0.05)


def read_spool(spool: Path) -> list[Outcome]:
    """Read the results of a spool. A line that a crash cut is left out."""
    outcomes = []
    for line in spool.read_bytes().splitlines():
        with suppress(ValueError, TypeError):
            outcome = Outcome(**json.loads(line))
            outcomes.append(outcome._replace(reason=FailReason(outcome.reason) if outcome.reason else None))
    return outcomes


def recover(journal: Journal) -> None:
    """Repair what a crash left: spooled results, images without their name, files without their row.

    A spooled image is committed only if its file is whole by its digest.
    """
    incoming = journal.folder / INCOMING
    spools = sorted(incoming.glob("spool-*"))
    for spool in spools:
        whole = [one for one in read_spool(spool) if one.reason is not None or _is_whole(incoming / one.temp, one)]
        with journal.transaction():
            moves = [(one.temp, place) for one in whole if (place := journal.finish(one))]
        land(journal, moves)
    for path in incoming.iterdir():
        row = path.name.partition("-")[0]
        if row.isdigit():
            found = journal.db.execute(
                f"SELECT {PLACE}, {DIGEST} FROM urls WHERE row = ? AND state = 1", (int(row),)
            ).fetchone()
            if found and file_digest(path) == found[1]:
                land(journal, [(path.name, found[0])])
            else:
                path.unlink()
    for spool in spools:
        spool.unlink()
    for scratch in journal.folder.glob(".loading-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    bury(journal)
    if gone := journal.reset_missing(_short_of_files(journal)):
        log.warning("%d images are no longer in %s, and will be fetched again", gone, journal.folder)


def _short_of_files(journal: Journal) -> dict[str, set[str]]:
    """Return the names of the files of each class that has fewer files than images."""
    short: dict[str, set[str]] = {}
    for wnid, count in journal.images_by_class():
        try:
            with os.scandir(journal.folder / wnid) as entries:
                names = {entry.name for entry in entries if entry.name.endswith(_ENDINGS)}  # not Thumbs.db
        except FileNotFoundError:
            names = set()
        if len(names) < count:
            short[wnid] = names
    return short


def _is_whole(path: Path, outcome: Outcome) -> bool:
    try:
        return file_digest(path) == (outcome.stored_sha256 or outcome.sha256)
    except OSError:
        return False


def land(journal: Journal, moves: list[tuple[str, str]]) -> None:
    """Rename committed images to their places."""
    for temp, place in moves:
        source, target = journal.folder / INCOMING / temp, journal.folder / place
        try:
            rename(source, target)
        except FileNotFoundError:
            target.parent.mkdir(exist_ok=True)
            rename(source, target)


class Results:
    """Write results to the journal, and commit them a few times a second.

    Attributes:
        journal: Where results go.
        counts: Ended URLs of this run, by reason of failure or "ok".
        size_bytes: Bytes of this run's images.
        leftovers: Files of the incoming folder that are needless after the next commit.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.counts = Counter[str]()
        self.size_bytes = 0
        self.leftovers: list[str] = []
        self._moves: list[tuple[str, str]] = []
        self._due_at = 0.0

    def add(self, outcome: Outcome) -> None:
        """Take the end of a URL."""
        self.counts[outcome.reason or "ok"] += 1
        self.size_bytes += outcome.size_bytes
        self._begin()
        if place := self.journal.finish(outcome):
            self._moves.append((outcome.temp, place))
        elif outcome.temp:  # its row had ended meanwhile
            self.leftovers.append(outcome.temp)

    def tried(self, task: Task) -> None:
        """Take the number of attempts of a URL that will be tried again."""
        self._begin()
        self.journal.db.execute("UPDATE urls SET attempts = ?2 WHERE row = ?1 AND state = 0", (task.row, task.attempts))

    def _begin(self) -> None:
        if not self.journal.db.in_transaction:
            self.journal.db.execute("BEGIN IMMEDIATE")
            self._due_at = time.monotonic() + _COMMIT_EVERY_S

    def give_up(self, host: int, reason: FailReason, detail: str, in_hand: Collection[int]) -> None:
        """Fail every pending URL of a host without asking for it, but for the rows in hand."""
        log.info("%s (%s)", detail, reason)
        self.commit()
        self.counts[reason] += self.journal.fail_host(host, reason, detail, in_hand)

    def due_s(self) -> float:
        """Return the seconds until the next commit is due, at most one."""
        return max(0.0, self._due_at - time.monotonic()) if self.journal.db.in_transaction else 1.0

    def commit(self) -> None:
        """Commit the results to the journal, then give the images their names."""
        incoming = self.journal.folder / INCOMING
        if self._moves:
            sync(incoming)  # the files' names
        self.journal.db.commit()
        land(self.journal, self._moves)
        for name in self.leftovers:
            (incoming / name).unlink(missing_ok=True)
        self._moves.clear()
        self.leftovers.clear()


def bury(journal: Journal) -> None:
    """Delete the files of images that were retracted."""
    for (path,) in journal.db.execute("SELECT path FROM doomed").fetchall():
        (journal.folder / path).unlink(missing_ok=True)
    journal.db.execute("DELETE FROM doomed")


def retract_repeats(journal: Journal, options: ContentOptions) -> int:
    """Turn images that too many URLs share, byte for byte, into placeholders. Return the number of URLs.

    Call it on the finished folder, so that the order of arrival does not matter. The files are listed in ``doomed``, in
    the same transaction; :func:`bury` deletes them.
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


def write_listings(journal: Journal) -> tuple[tuple[str, int], ...]:
    """Write both listings, each whole or not at all.

    Returns:
        (host, failed URLs) of the hosts with the most failures.
    """
    failures = _items(
        journal,
        "SELECT wnid, name AS id, url, reason, transient, status, coalesce(final_url, url) AS final_url, attempts,"
        " coalesce(detail, '') AS detail, time FROM urls WHERE state = 2 ORDER BY row",
    )
    more = (item | {"host": host_of(item["url"]), "transient": bool(item["transient"])} for item in failures)
    _write(journal.folder / FAILURES_NAME, more)
    bad = _items(
        journal,
        "SELECT lists.path AS list, line, kind, why, text FROM bad_lines JOIN lists ON lists.id = bad_lines.list"
        " ORDER BY bad_lines.list, line",
    )
    _write(journal.folder / BAD_LINES_NAME, (item | {"list": Path(item["list"]).name} for item in bad))
    top = journal.db.execute(
        "SELECT url, count(*), min(row) FROM urls WHERE state = 2 GROUP BY host ORDER BY 2 DESC, 3 LIMIT ?", (_TOP,)
    )
    return tuple((host_of(url), count) for url, count, _ in top)


def _items(journal: Journal, query: str) -> Iterator[dict[str, Any]]:
    rows = journal.db.cursor()
    rows.row_factory = sqlite3.Row
    return map(dict, rows.execute(query))


def _write(path: Path, items: Iterable[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)
