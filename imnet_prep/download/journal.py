"""The journal: one SQLite row per URL, so that every URL is accounted for and a run can be resumed anywhere.

A file gets its final name only after the journal says ``ok`` with its digest: results are committed first (WAL,
synchronous FULL), and files renamed afterwards. See docs/journal.md for the columns and the crash cases.
"""

import itertools
import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from imnet_prep.download.options import FailReason
from imnet_prep.errors import DownloadError

JOURNAL_NAME = "journal.sqlite"
FORMAT_VERSION = "1"
PENDING, OK, FAILED, ELSEWHERE = 0, 1, 2, 3  # the last is of another part of a divided list
_CACHE_KIB = 48 * 1024
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lists (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    options TEXT NOT NULL, loaded INTEGER NOT NULL DEFAULT 0, first_row INTEGER NOT NULL,
    lines INTEGER NOT NULL DEFAULT 0, malformed INTEGER NOT NULL DEFAULT 0,
    repeated INTEGER NOT NULL DEFAULT 0, unwanted INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS bad_lines (
    list INTEGER NOT NULL, line INTEGER NOT NULL, kind TEXT NOT NULL, why TEXT NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (list, line)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS urls (
    row INTEGER PRIMARY KEY, wnid TEXT NOT NULL, name TEXT NOT NULL, url TEXT NOT NULL, host INTEGER NOT NULL,
    state INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, status INTEGER, final_url TEXT,
    ext TEXT, bytes INTEGER, sha256 BLOB, stored_bytes INTEGER, stored_sha256 BLOB, width INTEGER, height INTEGER,
    flat INTEGER, reason TEXT, transient INTEGER, detail TEXT, time REAL);
CREATE TABLE IF NOT EXISTS counts (key TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS placeholders (sha256 BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS doomed (path TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_LATER = "CREATE TABLE IF NOT EXISTS meta_of_urls (row INTEGER PRIMARY KEY, json TEXT NOT NULL);"  # not in old journals
INDEXES = (  # made one after the other, by an external sort each
    "CREATE INDEX IF NOT EXISTS pending_by_host ON urls (host) WHERE state = 0;"
    " CREATE INDEX IF NOT EXISTS by_digest ON urls (sha256) WHERE state = 1;"
)
PLACE = "wnid || '/' || name || '.' || ext"  # of an image in the folder
DIGEST = "lower(hex(coalesce(stored_sha256, sha256)))"  # of its file
_FINISH = (  # takes the fields of an Outcome, the digests as bytes
    f"UPDATE urls SET state = iif(:reason IS NULL, {OK}, {FAILED}), attempts = :attempts, status = :status,"
    " final_url = nullif(nullif(:final_url, url), ''), ext = nullif(:ext, ''), bytes = nullif(:size_bytes, 0),"
    " sha256 = nullif(:sha256, x''), stored_bytes = :stored_bytes, stored_sha256 = nullif(:stored_sha256, x''),"
    " width = nullif(:width, 0), height = nullif(:height, 0), flat = iif(:reason IS NULL, :flat, NULL),"
    " reason = :reason, transient = iif(:reason IS NULL, NULL, :transient), detail = nullif(:detail, ''),"
    f" time = :time_s WHERE row = :row AND state = 0 RETURNING {PLACE}"
)

_PENDING_AGAIN = (
    "UPDATE urls SET state = 0, attempts = 0, status = NULL, final_url = NULL, bytes = NULL, sha256 = NULL,"
    " reason = NULL, transient = NULL, detail = NULL, time = NULL"
)


@dataclass(frozen=True, slots=True)
class Finished:
    """An image that a download folder holds.

    Attributes:
        path: The file, relative to the folder, with ``/``.
        wnid: Its class. name: Its id, the file's stem.
        url: The list's URL (credentials never kept). final_url: Where redirects led; the same without any.
        status: HTTP status of the answer that held the image.
        sha256: Hex digest of the file. size_bytes: Its size. width, height: In pixels.
        source_sha256: Hex digest of the bytes as they came; differs from ``sha256`` only after ``--short-side``.
        meta: What the list's other columns say, a JSON object as text, or empty.
    """

    path: str
    wnid: str
    name: str
    url: str
    final_url: str
    status: int
    sha256: str
    size_bytes: int
    width: int
    height: int
    source_sha256: str
    meta: str = ""


class Outcome(NamedTuple):
    """How a URL ended, as the worker reports it to the journal. Its fields are the keys of a spool's JSON lines.

    Attributes:
        row: The URL's row.
        reason: Why it failed, or None for an image.
        transient: Whether a later run may succeed (only with a reason).
        attempts: Attempts made, this one included.
        status: Last HTTP status, or None.
        final_url: URL of the last answer.
        detail: One line for the user.
        ext, size_bytes, sha256 (hex), width, height, flat: The image as it came.
        answered: Whether there was an HTTP answer (for the circuit breaker).
        retry_after_s: The pause that the server asked for, or None.
        stored_bytes, stored_sha256: The file, if it was re-encoded; else None.
        temp: Name of the image's file in the incoming folder.
        time_s: Unix time of the end.
    """

    row: int
    reason: FailReason | None
    transient: bool = False
    attempts: int = 0
    status: int | None = None
    final_url: str = ""
    detail: str = ""
    ext: str = ""
    size_bytes: int = 0
    sha256: str = ""
    width: int = 0
    height: int = 0
    flat: bool = False
    stored_bytes: int | None = None
    stored_sha256: str | None = None
    temp: str = ""
    time_s: float = 0.0
    answered: bool = True
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of all URLs. ``requested == ok + sum(failed.values()) + pending`` always holds.

    ``elsewhere`` are the URLs of other parts of a divided list.
    """

    requested: int
    ok: int
    failed: dict[str, int]
    pending: int
    malformed: int
    repeated: int
    bytes: int
    elsewhere: int = 0


def read_finished(folder: Path) -> Iterator[Finished]:
    """Yield every image of a download folder, in list order, from its journal alone (the files are not opened).

    Raises:
        DownloadError: The folder has no journal, or one that cannot be used.
    """
    path = folder / JOURNAL_NAME
    with closing(_open_to_read(path)) as connection:
        try:
            _check_version(connection, path)
            has_meta = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta_of_urls'").fetchone()
            meta = "coalesce((SELECT json FROM meta_of_urls WHERE row = urls.row), '')" if has_meta else "''"
            rows = connection.execute(
                f"SELECT {PLACE}, wnid, name, url, coalesce(final_url, url), status, {DIGEST},"
                f" coalesce(stored_bytes, bytes), width, height, lower(hex(sha256)), {meta}"
                " FROM urls WHERE state = 1 ORDER BY row"
            )
            yield from itertools.starmap(Finished, rows)
        except sqlite3.DatabaseError as error:
            raise _damaged(path, error) from error


def _open_to_read(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise DownloadError(f"{path.parent} is not a download folder", expected=f"a {path.name} in it")
    uri = path.resolve().as_uri()
    try:
        connection = sqlite3.connect(f"{uri}?mode=ro", uri=True)
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError:  # a read-only file system: WAL's side files cannot be made there
        return sqlite3.connect(f"{uri}?immutable=1", uri=True)


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    found = connection.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    if found is None or found[0] != FORMAT_VERSION:
        raise DownloadError(
            f"journal {path} has another format",
            expected=f"version {FORMAT_VERSION}",
            got=found[0] if found else "none",
        )


def _damaged(path: Path, error: Exception) -> DownloadError:
    return DownloadError(f"journal {path} cannot be used", got=str(error), remedy="start over in another folder")


class Journal:
    """The journal, open for writing by one process (which holds the folder's lock)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / JOURNAL_NAME
        try:
            self.db = sqlite3.connect(path, isolation_level=None)
            pragmas = ("journal_mode = WAL", "synchronous = FULL", f"cache_size = -{_CACHE_KIB}")
            self.db.executescript("".join(f"PRAGMA {pragma};" for pragma in pragmas))
            if self.db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None:
                version = f"INSERT OR IGNORE INTO meta VALUES ('format', '{FORMAT_VERSION}');"
                self.db.executescript(f"BEGIN; {_SCHEMA} {version} {INDEXES} COMMIT;")
            _check_version(self.db, path)
            self.db.executescript(_LATER)
        except sqlite3.DatabaseError as error:
            raise _damaged(path, error) from error

    def close(self) -> None:
        """Fold the WAL back and close."""
        self.db.close()

    def belongs_to(self, part: tuple[int, int] | None) -> None:
        """Note the part of a divided list that this folder takes.

        Raises:
            DownloadError: It takes another one.
        """
        asked = "/".join(map(str, part)) if part else "all"
        begun = self.db.execute("SELECT value FROM meta WHERE key = 'part'").fetchone()
        is_new = self.db.execute("SELECT 1 FROM lists").fetchone() is None
        known = begun[0] if begun else asked if is_new else "all"
        if known != asked:
            what = f"{self.folder} takes another part of its lists"
            raise DownloadError(what, expected=f"--part {known}", got=f"--part {asked}", remedy="choose another --out")
        if not begun and part:
            self.db.execute("INSERT INTO meta VALUES ('part', ?)", (asked,))

    def hosts_with_pending(self) -> list[tuple[int, int]]:
        """Return (host key, pending URLs), largest first: the longest queues start earliest."""
        return self.db.execute(
            "SELECT host, count(*) FROM urls WHERE state = 0 GROUP BY host ORDER BY count(*) DESC, host"
        ).fetchall()

    def pending_of(self, host: int, after_row: int, limit: int) -> list[tuple[int, str, int]]:
        """Return the next (row, URL, attempts) of a host, in row order."""
        return self.db.execute(
            "SELECT row, url, attempts FROM urls INDEXED BY pending_by_host"
            " WHERE state = 0 AND host = ? AND row > ? ORDER BY row LIMIT ?",
            (host, after_row, limit),
        ).fetchall()

    def totals(self) -> Totals:
        """Count all URLs by how they stand, from counters kept in the same transactions as the rows."""
        counts: Counter[str] = Counter(dict(self.db.execute("SELECT key, n FROM counts")))
        failed = {
            key.removeprefix("failed:"): n for key, n in sorted(counts.items()) if key.startswith("failed:") and n
        }
        malformed, repeated = self.db.execute(
            "SELECT coalesce(sum(malformed), 0), coalesce(sum(repeated), 0) FROM lists WHERE loaded = 1"
        ).fetchone()
        pending = counts["requested"] - counts["ok"] - sum(failed.values())
        return Totals(
            counts["requested"],
            counts["ok"],
            failed,
            pending,
            malformed,
            repeated,
            counts["bytes"],
            counts["elsewhere"],
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything that is written inside, or nothing."""
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            yield

    def finish(self, outcome: Outcome) -> str | None:
        """Write the end of a URL, within a transaction.

        Returns:
            The final relative path of an image, or None: for a failure, and for a row that has already ended (it was
            found again after a crash), which is left as it is.
        """
        digests = {
            "sha256": bytes.fromhex(outcome.sha256),
            "stored_sha256": bytes.fromhex(outcome.stored_sha256 or ""),
        }
        found = self.db.execute(_FINISH, outcome._asdict() | digests).fetchone()
        if found and outcome.reason:
            self.count({f"failed:{outcome.reason}": 1})
        elif found:
            self.count({"ok": 1, "bytes": outcome.size_bytes})
            return str(found[0])
        return None

    def count(self, counts: Mapping[str, int]) -> None:
        """Add to the counters, within a transaction that changes the rows."""
        self.db.executemany(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET n = n + excluded.n", counts.items()
        )

    def fail_host(self, host: int, reason: FailReason, detail: str, but: Collection[int]) -> int:
        """Fail the pending URLs of a host, transiently, but for some rows; return their number."""
        with self.transaction():
            changed = self.db.execute(
                "UPDATE urls SET state = 2, reason = ?, transient = 1, detail = ?, time = ?"
                f" WHERE state = 0 AND host = ? AND row NOT IN ({', '.join(map(str, but))})",
                (reason, detail, time.time(), host),
            ).rowcount
            self.count({f"failed:{reason}": changed})
        return changed

    def images_by_class(self) -> list[tuple[str, int]]:
        """Return (class, images)."""
        return self.db.execute("SELECT wnid, count(*) FROM urls WHERE state = 1 GROUP BY wnid").fetchall()

    def reset_missing(self, files: Mapping[str, Container[str]]) -> int:
        """Make images of some classes pending again that are not among the files there, and return their number."""
        if not files:
            return 0
        images = self.db.execute("SELECT row, bytes, wnid, name || '.' || ext FROM urls WHERE state = 1")
        gone = [(row, size) for row, size, wnid, name in images if wnid in files and name not in files[wnid]]
        with self.transaction():
            self.db.executemany(f"{_PENDING_AGAIN} WHERE row = ?", [(row,) for row, _ in gone])
            self.count({"ok": -len(gone), "bytes": -sum(size for _, size in gone)})
        return len(gone)

    def reset_failed(self, lifted: Iterable[FailReason] = ()) -> int:
        """Make the URLs pending again that failed transiently or for a lifted reason, and return their number."""
        reasons = ", ".join(f"'{reason.value}'" for reason in lifted)
        failed = f"state = 2 AND (transient = 1 OR reason IN ({reasons}))"
        with self.transaction():
            counts = f"SELECT 'failed:' || reason, -count(*) FROM urls WHERE {failed} GROUP BY reason"
            self.count(dict(self.db.execute(counts)))
            return self.db.execute(f"{_PENDING_AGAIN} WHERE {failed}").rowcount
