"""Lists into the journal: 14 million lines at flat memory.

Rows are appended in list order (no index to keep up meanwhile); repeated URLs and ids are found afterwards by hashes
that are partitioned on disk and sorted one partition at a time; the indexes are then built by one external sort each.
The sequential meaning is kept: a line is repeated if its URL or its id stands in an earlier line that was not itself
repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.download.journal import Journal
from imnet_prep.download.urllist import MAX_LINE_BYTES, Malformed, parse_line, read_blocks, readable
from imnet_prep.download.urls import host_key, host_of
from imnet_prep.errors import DownloadError
from imnet_prep.files import file_digest
from imnet_prep.types import Progress, ProgressCallback

log = logging.getLogger(__name__)
_BATCH = 50_000  # rows an insert
_PARTS = 64  # partitions of the hash space: 14.2 M rows make 5 MB each
_HOST_CACHE = 50_000
_SHOWN_BYTES = 500  # of a bad line, kept for the listing
# The common line in four groups; any other line, in the fifth, goes through parse_line. Both give the same (tested).
_LINES = re.compile(
    r"(?:((n\d{8})_[0-9A-Za-z][0-9A-Za-z_-]{0,63})[\t ]"
    r"(https?://([a-z0-9.-]+)/[A-Za-z0-9\-._~:/?@!$&'()*+,;=]*)\r?|([^\n]*))\n",
    re.ASCII,
)
_FAST_URL = 2000  # characters; a longer URL takes the careful way
_PAIR = np.dtype([("url", "<i8"), ("name", "<i8"), ("row", "<i8")])


def take_in(
    journal: Journal,
    lists: tuple[Path, ...],
    wnid: str | None,
    wnids: frozenset[str] | None,
    progress: ProgressCallback | None,
) -> None:
    """Bring the journal up to the lists: one that was taken in before, unchanged, is only recognised.

    Raises:
        DownloadError: a list that cannot be read; what it had brought is taken out again.
    """
    _drop_unfinished(journal)
    classes = hashlib.sha256("\n".join(sorted(wnids)).encode()).hexdigest() if wnids is not None else None
    shape = json.dumps([wnid, classes])
    for path in lists:
        with readable(path):
            stat = path.stat()
        place = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        if journal.db.execute(
            "SELECT 1 FROM lists WHERE path = ? AND size = ? AND mtime_ns = ? AND options = ? AND loaded = 1",
            (*place, shape),
        ).fetchone():
            continue
        with readable(path):
            content = (file_digest(path), shape)
        if journal.db.execute(
            "UPDATE lists SET path = ?, size = ?, mtime_ns = ? WHERE sha256 = ? AND options = ? AND loaded = 1"
            " RETURNING id",
            (*place, *content),
        ).fetchall():
            continue
        log.info("reading %s", path)
        journal.db.execute("DROP INDEX IF EXISTS pending_by_host")  # a bulk load would write it at random places
        try:
            _Load(journal, path, wnid, wnids, progress).run((*place, *content))
        except DownloadError:
            _drop_unfinished(journal)
            journal.build_indexes()
            raise
    journal.build_indexes()


def _drop_unfinished(journal: Journal) -> None:
    """Take out a list whose load was cut short: none of its rows was ever handed out."""
    with journal.transaction():
        journal.db.execute("DELETE FROM urls WHERE row >= (SELECT min(first_row) FROM lists WHERE loaded = 0)")
        journal.db.execute("DELETE FROM bad_lines WHERE list IN (SELECT id FROM lists WHERE loaded = 0)")
        journal.db.execute("DELETE FROM lists WHERE loaded = 0")


@dataclass(slots=True)
class _Load:
    """The load of one list."""

    journal: Journal
    path: Path
    wnid: str | None
    wnids: frozenset[str] | None
    progress: ProgressCallback | None

    def run(self, key: tuple[str, int, int, str, str]) -> None:
        db = self.journal.db
        number, first_row = db.execute(
            "INSERT INTO lists (path, size, mtime_ns, sha256, options, first_row) VALUES (?, ?, ?, ?, ?,"
            " max((SELECT coalesce(max(row), 0) + 1 FROM urls),"
            " (SELECT coalesce(max(first_row + lines), 1) FROM lists))) RETURNING id, first_row",
            key,
        ).fetchone()
        db.execute("PRAGMA synchronous = NORMAL")
        try:
            with tempfile.TemporaryDirectory(prefix=".loading-", dir=self.journal.folder) as scratch:
                finder = RepeatFinder(Path(scratch))
                earlier = db.execute("SELECT row, name, url FROM urls ORDER BY row")
                while rows := earlier.fetchmany(_BATCH):
                    finder.add(*(list(column) for column in zip(*rows, strict=True)))
                lines, kept, malformed, unwanted = self._insert(number, first_row, finder)
                repeated = finder.repeated(first_row)
            self._list_repeats(number, first_row, repeated)
        finally:
            db.execute("PRAGMA synchronous = FULL")
        with self.journal.transaction():
            db.execute(
                "UPDATE lists SET loaded = 1, lines = ?, malformed = ?, repeated = ?, unwanted = ? WHERE id = ?",
                (lines, malformed, len(repeated), unwanted, number),
            )
            self.journal.count({"requested": kept - len(repeated)})

    def _insert(self, number: int, first_row: int, finder: RepeatFinder) -> tuple[int, int, int, int]:
        db = self.journal.db
        line_no = kept = malformed = unwanted = 0
        for batch, bad, line_no, skipped in self._batches(number, first_row):
            with self.journal.transaction():
                db.executemany("INSERT INTO urls (row, wnid, name, url, host) VALUES (?, ?, ?, ?, ?)", batch)
                db.executemany("INSERT INTO bad_lines VALUES (?, ?, 'malformed', ?, ?)", bad)
            finder.add([item[0] for item in batch], [item[2] for item in batch], [item[3] for item in batch])
            kept, malformed, unwanted = kept + len(batch), malformed + len(bad), unwanted + skipped
            if self.progress:
                self.progress(Progress(line_no, None, unit="lines", counts=(("malformed", malformed),)))
        return line_no, kept, malformed, unwanted

    def _batches(self, number: int, first_row: int) -> Iterator[tuple[list[Any], list[Any], int, int]]:
        """Yield (rows, malformed lines, last line number, lines of classes not wanted), a block at a time."""
        hosts: dict[str, int] = {}
        wnids = self.wnids
        for first_line, block in read_blocks(self.path):
            rows: list[tuple[int, str, str, str, int]] = []
            bad: list[tuple[int, int, str, str]] = []
            unwanted = 0
            for row, (name, wnid, url, host, other) in enumerate(
                _LINES.findall(block.decode("latin-1")), first_row + first_line - 1
            ):
                key = hosts.get(host)
                if key is None or len(url) > _FAST_URL:
                    if len(hosts) >= _HOST_CACHE:
                        hosts.clear()
                    raw = other.encode("latin-1") if other or not url else f"{name} {url}".encode("latin-1")
                    parsed = Malformed("line too long") if len(raw) > MAX_LINE_BYTES else parse_line(raw, self.wnid)
                    if isinstance(parsed, Malformed):
                        bad.append((number, row - first_row + 1, parsed.why, _shown(raw)))
                        continue
                    if parsed is None:
                        continue
                    key = host_key(host_of(parsed.url))
                    if host and parsed.url == url:
                        hosts[host] = key
                    name, wnid, url = parsed.name, parsed.wnid, parsed.url  # noqa: PLW2901
                if wnids is not None and wnid not in wnids:
                    unwanted += 1
                    continue
                rows.append((row, wnid, name, url, key))
            yield rows, bad, row - first_row + 1, unwanted

    def _list_repeats(self, number: int, first_row: int, repeated: NDArray[np.int64]) -> None:
        """Move repeated lines out of ``urls`` into ``bad_lines``."""
        db = self.journal.db
        for start in range(0, len(repeated), _BATCH):
            rows = [(row,) for row in repeated[start : start + _BATCH].tolist()]
            with self.journal.transaction():
                db.executemany(
                    f"INSERT INTO bad_lines SELECT {number}, row - {first_row} + 1, 'repeated',"
                    " 'URL or id in an earlier line', name || ' ' || url FROM urls WHERE row = ?",
                    rows,
                )
                db.executemany("DELETE FROM urls WHERE row = ?", rows)


def _shown(raw: bytes) -> str:
    """Return a bad line for the listing: printable, bounded, and without credentials."""
    raw = re.sub(rb"(//)[^/\s@]*@", rb"\1***@", raw[:_SHOWN_BYTES])
    return raw.decode("utf-8", "backslashreplace").strip()


class RepeatFinder:
    """Finds rows whose URL or name was seen in an earlier row, by 64-bit hashes, a partition at a time.

    Memory is one partition plus the rows whose URL *or* name, but not both, is shared. Two different strings fall
    together with a probability of 1e-5 in all of 14.2 million lines.
    """

    def __init__(self, scratch: Path) -> None:
        self._by_url = _Partitions(scratch, "url")
        self._by_name = _Partitions(scratch, "name")

    def add(self, rows: list[int], names: list[str], urls: list[str]) -> None:
        """Take rows, in ascending order."""
        pairs = np.empty(len(rows), _PAIR)
        pairs["row"], pairs["name"], pairs["url"] = rows, [hash(name) for name in names], [hash(url) for url in urls]
        self._by_url.write(pairs)

    def repeated(self, first_row: int) -> NDArray[np.int64]:
        """Return the repeated rows from ``first_row`` on, ascending, int64 (N,)."""
        flagged: list[NDArray[np.int64]] = []
        shared: list[NDArray[Any]] = []
        for part in self._by_url.read():
            pairs = part[np.lexsort((part["row"], part["name"], part["url"]))]
            same_url = pairs["url"][1:] == pairs["url"][:-1]
            again = np.zeros(len(pairs), np.bool_)
            again[1:] = same_url & (pairs["name"][1:] == pairs["name"][:-1])
            flagged.append(pairs["row"][again])
            pairs = pairs[~again]
            shared.append(pairs[_in_run(pairs["url"])])
            self._by_name.write(pairs)
        for part in self._by_name.read():
            pairs = part[np.argsort(part["name"], kind="stable")]
            shared.append(pairs[_in_run(pairs["name"])])
        rows = np.concatenate([*flagged, _replay(np.concatenate(shared))])
        return np.sort(rows[rows >= first_row])


def _in_run(keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each of the sorted keys whether a neighbour is equal."""
    same = np.zeros(len(keys) + 1, np.bool_)  # as the key before it; the two ends have no such neighbour
    same[1:-1] = keys[1:] == keys[:-1]
    return same[1:] | same[:-1]


def _replay(pairs: NDArray[Any]) -> NDArray[np.int64]:
    """Walk the rows that share one key with another in order: first come, first kept."""
    pairs = np.unique(pairs)
    urls: set[int] = set()
    names: set[int] = set()
    out: list[int] = []
    for url, name, row in pairs[np.argsort(pairs["row"], kind="stable")].tolist():
        if url in urls or name in names:
            out.append(row)
        else:
            urls.add(url)
            names.add(name)
    return np.array(out, np.int64)


class _Partitions:
    """Hash partitions of rows, appended to files."""

    def __init__(self, scratch: Path, key: str) -> None:
        self._key = key
        self._files = [(scratch / f"{key}-{part:02d}").open("wb") for part in range(_PARTS)]

    def write(self, pairs: NDArray[Any]) -> None:
        part = pairs[self._key].view(np.uint64) >> np.uint64(64 - 6)
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(_PARTS + 1, dtype=np.uint64))
        pairs = pairs[order]
        for index, file in enumerate(self._files):
            file.write(pairs[bounds[index] : bounds[index + 1]].tobytes())

    def read(self) -> Iterator[NDArray[Any]]:
        for file in self._files:
            file.close()
            path = Path(file.name)
            yield np.frombuffer(path.read_bytes(), _PAIR)
            path.unlink()
