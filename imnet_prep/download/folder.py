"""The download folder between two runs: its locks, the workers' spools, and what a crash left.

Order of events for an image: whole and fsynced in the incoming folder, a line in its worker's spool, a committed row,
its final name. What a crash leaves between any two of them, :func:`recover` mends.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

from imnet_prep.download.journal import Journal, Outcome
from imnet_prep.download.options import FailReason
from imnet_prep.errors import DownloadError
from imnet_prep.files import file_digest

INCOMING = ".incoming"  # in the download folder: whole images that wait for their row, the spools, the locks
LOCK_NAME = "download.lock"
USERS_LOCK = "users.lock"
_STRAGGLERS_S = 20.0  # how long the workers of a killed run may take to notice


@contextmanager
def opened(out: Path) -> Iterator[Journal]:
    """Open the folder for this process alone.

    Raises:
        DownloadError: it cannot be written, or another process uses it.
    """
    incoming = out / INCOMING
    try:
        incoming.mkdir(parents=True, exist_ok=True)
        lock = (incoming / LOCK_NAME).open("ab")
    except OSError as error:
        raise DownloadError(f"cannot write to {out}", got=error.strerror or str(error)) from error
    with lock, (incoming / USERS_LOCK).open("ab") as users:
        if not _locked(lock):
            raise DownloadError(f"{out} is in use by another download", remedy="wait for it, or stop it")
        # The workers of a killed run notice at once, but may be inside a write.
        until = time.monotonic() + _STRAGGLERS_S
        while not _locked(users):
            if time.monotonic() > until:
                raise DownloadError(f"workers of an earlier run still use {out}", remedy="stop them")
            time.sleep(0.05)
        users.close()
        with closing(Journal(out)) as journal:
            yield journal


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def share_use(out: Path) -> IO[bytes]:
    """Return a file that, as long as it is open, makes the next run wait for this process."""
    users = (out / INCOMING / USERS_LOCK).open("ab")
    fcntl.flock(users, fcntl.LOCK_SH)
    return users


def spool_line(outcome: Outcome) -> bytes:
    """Return an outcome as one line of JSON."""
    return json.dumps(outcome._asdict(), ensure_ascii=True).encode() + b"\n"


def read_spool(spool: Path) -> list[Outcome]:
    """Read the results of a spool; a line that a crash cut is left out."""
    outcomes = []
    for line in spool.read_bytes().splitlines():
        with suppress(ValueError, TypeError):
            outcome = Outcome(**json.loads(line))
            outcomes.append(outcome._replace(reason=FailReason(outcome.reason) if outcome.reason else None))
    return outcomes


def recover(journal: Journal) -> None:
    """Mend what a crash left: spooled results, images without their name, files without their row.

    Every result that a worker had finished is taken over, provided that its file is whole by its digest.
    """
    incoming = journal.folder / INCOMING
    spools = sorted(incoming.glob("spool-*"))
    for spool in spools:
        whole = [one for one in read_spool(spool) if one.reason is not None or _is_whole(incoming / one.temp, one)]
        land(journal, journal.commit(whole))
    for path in incoming.iterdir():
        row = path.name.partition("-")[0]
        if row.isdigit():
            found = journal.place_of(int(row))
            if found and file_digest(path) == found[1]:
                land(journal, [(path.name, found[0])])
            else:
                path.unlink()
    for spool in spools:
        spool.unlink()
    for scratch in journal.folder.glob(".loading-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    bury(journal)


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
            source.rename(target)
        except FileNotFoundError:
            target.parent.mkdir(exist_ok=True)
            source.rename(target)


def bury(journal: Journal) -> None:
    """Delete the files whose rows no longer say ok."""
    for (path,) in journal.db.execute("SELECT path FROM doomed").fetchall():
        (journal.folder / path).unlink(missing_ok=True)
    journal.db.execute("DELETE FROM doomed")
