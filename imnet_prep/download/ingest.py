"""Read URL lists into the journal: 14 million lines at flat memory.

Rows are appended in list order, without an index to maintain meanwhile. Repeated URLs and ids are then found by hashes,
which are partitioned on disk and sorted one partition at a time. The indexes are built last, by one external sort each.
The result is that of reading line by line: a line is repeated if its URL or its id stands in an earlier line that was
not itself repeated.
"""

import hashlib
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imnet_prep.download.journal import ELSEWHERE, INDEXES, Journal
from imnet_prep.download.options import BY_NAME, Columns
from imnet_prep.download.tables import Table, read_table
from imnet_prep.download.urllist import Line, line_of, opened_list, parse_line, read_blocks, readable
from imnet_prep.download.urls import BadUrl, host_key, host_of, normalise_url
from imnet_prep.errors import DownloadError
from imnet_prep.files import file_digest
from imnet_prep.types import Progress, ProgressCallback

log = logging.getLogger(__name__)
_BATCH = 50_000  # rows an insert
_SURROGATE = re.compile("[\ud800-\udfff]")
_PARTS = 64  # partitions of the hash space: 14.2 M rows make 5 MB each
_SHOWN_BYTES = 500  # of a bad line, kept for the listing
# The common line in four groups. Any other line, in the fifth, goes through parse_line. A test compares the two ways.
_LINES = re.compile(
    r"(?:((n\d{8})_[0-9A-Za-z][0-9A-Za-z_-]{0,63})[\t ]"
    r"(https?://([a-z0-9.-]+)/[A-Za-z0-9\-._~:/?@!$&'()*+,;=]*)\r?|([^\n]*))\n",
    re.ASCII,
)
_FAST_URL = 2000  # characters; a longer URL goes through parse_line
_PAIR = np.dtype([("url", "<i8"), ("name", "<i8"), ("row", "<i8")])


def take_in(
    journal: Journal,
    lists: tuple[Path, ...],
    wnid: str | None,
    wnids: frozenset[str] | None,
    progress: ProgressCallback | None,
    columns: Columns = BY_NAME,
    part: tuple[int, int] | None = None,
) -> None:
    """Read lists into the journal. A list that was read before, and has not changed, is only recognised.

    Args:
        journal: Where the rows go.
        lists: Lines or tables, plain or compressed.
        wnid: Class of lines that name none.
        wnids: Classes to keep, or None for all.
        progress: Called with the lines read.
        columns: Which columns of a table to take.
        part: (I, N): leave the hosts that do not fall to part I of N to others.

    Raises:
        DownloadError: A list cannot be read, or none of its lines can be used; its rows are taken out again.
    """
    _drop_unfinished(journal)
    classes = hashlib.sha256("\n".join(sorted(wnids)).encode()).hexdigest() if wnids is not None else None
    shape = json.dumps([wnid, classes, *([astuple(columns)] if columns != BY_NAME else [])])
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
            _load(journal, path, (*place, *content), wnid, wnids, progress, columns, part)
        except DownloadError:
            _drop_unfinished(journal)
            journal.db.executescript(INDEXES)
            raise
    journal.db.executescript(INDEXES)


def _drop_unfinished(journal: Journal) -> None:
    """Take out a list whose load was cut short. None of its rows was ever fetched."""
    with journal.transaction():
        journal.db.execute("DELETE FROM urls WHERE row >= (SELECT min(first_row) FROM lists WHERE loaded = 0)")
        journal.db.execute("DELETE FROM meta_of_urls WHERE row >= (SELECT min(first_row) FROM lists WHERE loaded = 0)")
        journal.db.execute("DELETE FROM bad_lines WHERE list IN (SELECT id FROM lists WHERE loaded = 0)")
        journal.db.execute("DELETE FROM lists WHERE loaded = 0")


def _load(
    journal: Journal,
    path: Path,
    key: tuple[str, int, int, str, str],
    wnid: str | None,
    wnids: frozenset[str] | None,
    progress: ProgressCallback | None,
    columns: Columns,
    part: tuple[int, int] | None,
) -> None:
    """Read one list."""
    db, lines, counts = journal.db, 0, Counter[str]()
    number, first_row = db.execute(
        "INSERT INTO lists (path, size, mtime_ns, sha256, options, first_row) VALUES (?, ?, ?, ?, ?,"
        " max((SELECT coalesce(max(row), 0) + 1 FROM urls),"
        " (SELECT coalesce(max(first_row + lines), 1) FROM lists))) RETURNING id, first_row",
        key,
    ).fetchone()
    db.execute("PRAGMA synchronous = NORMAL")
    held = ExitStack()
    try:
        finder = held.enter_context(closing(RepeatFinder(journal.folder)))
        earlier = db.execute("SELECT row, name, url FROM urls ORDER BY row")
        while rows := earlier.fetchmany(_BATCH):
            finder.add(*zip(*rows, strict=True))
        for batch in _batches(path, first_row, wnid, wnids, columns):
            with journal.transaction():
                db.executemany("INSERT INTO urls (row, wnid, name, url, host) VALUES (?, ?, ?, ?, ?)", batch.rows)
                db.executemany("INSERT INTO meta_of_urls VALUES (?, ?)", batch.meta)
                db.executemany(
                    f"INSERT INTO bad_lines VALUES ({number}, ? - {first_row} + 1, 'malformed', ?, ?)", batch.bad
                )
            finder.add([one[0] for one in batch.rows], [one[2] for one in batch.rows], [one[3] for one in batch.rows])
            lines = batch.lines
            counts.update(kept=len(batch.rows), malformed=len(batch.bad), unwanted=batch.unwanted)
            if progress:
                progress(Progress(lines, None, unit="lines", counts=(("malformed", counts["malformed"]),)))
        if not counts["kept"] and not counts["unwanted"]:
            raise _useless(journal, path, number)
        repeated = finder.repeated(first_row)
        _list_repeats(journal, number, first_row, repeated)
    finally:
        held.close()
        db.execute("PRAGMA synchronous = FULL")
    with journal.transaction():
        db.execute(
            "UPDATE lists SET loaded = 1, lines = ?, malformed = ?, repeated = ?, unwanted = ? WHERE id = ?",
            (lines, counts["malformed"], len(repeated), counts["unwanted"], number),
        )
        elsewhere = 0
        if part is not None:  # repeats have been found over all parts, as on one machine
            elsewhere = db.execute(
                f"UPDATE urls SET state = {ELSEWHERE} WHERE row >= ? AND host % ? != ?",
                (first_row, part[1], part[0] - 1),
            ).rowcount
        journal.count({"requested": counts["kept"] - len(repeated) - elsewhere, "elsewhere": elsewhere})


class _Batch(NamedTuple):
    """Some lines of a list: how many have been read with them, their rows, the ``meta`` of rows, and the bad ones."""

    lines: int
    rows: list[tuple[int, str, str, str, int]]
    meta: list[tuple[int, str]]
    bad: list[tuple[int, str, str]]
    unwanted: int


def _batches(
    path: Path, first_row: int, wnid: str | None, wnids: frozenset[str] | None, columns: Columns
) -> Iterator[_Batch]:
    """Read a list of lines, or a table."""
    with opened_list(path) as file:
        table = read_table(path, file, columns)
        if table is not None:
            log.info("%s is %s", path, table.described())
            yield from _table_batches(table, first_row, wnid, wnids)
            return
    if columns != BY_NAME:
        raise DownloadError(f"URL list {path} is no table", remedy="leave out --url-column and its like")
    with opened_list(path) as file:
        for first_line, block in read_blocks(file):
            rows, bad, unwanted = _parse(block, first_row + first_line - 1, wnid, wnids)
            yield _Batch(first_line + block.count(b"\n") - 1, rows, [], bad, unwanted)


def _table_batches(table: Table, first_row: int, wnid: str | None, wnids: frozenset[str] | None) -> Iterator[_Batch]:
    while found := list(islice(table.rows, _BATCH)):
        wanted = [one for one in found if wnids is None or (one.class_name or wnid) in wnids]
        batch = _Batch(found[-1].number, [], [], [], len(found) - len(wanted))
        for one in wanted:
            row = first_row + one.number - 1
            try:
                line = line_of(one.url, one.class_name, one.name, wnid)
            except BadUrl as error:
                batch.bad.append((row, str(error), _shown(" ".join(one[1:4]).encode("utf-8", "replace"))))
                continue
            batch.rows.append((row, *line, host_key(host_of(line.url))))
            if one.meta:
                text = json.dumps(one.meta, ensure_ascii=False)  # bytes that are not UTF-8 become U+FFFD
                batch.meta.append((row, _SURROGATE.sub("\ufffd", text)))
        yield batch


def _useless(journal: Journal, path: Path, number: int) -> DownloadError:
    """Return the error for a list of which no line can be used."""
    found = journal.db.execute(
        "SELECT why, count(*), min(line), text FROM bad_lines WHERE list = ? GROUP BY why ORDER BY 2 DESC", (number,)
    ).fetchone()
    if found is None:
        return DownloadError(f"URL list {path} is empty", expected='lines such as "n01440764 http://..."')
    why, count, line, text = found
    return DownloadError(
        f"no line of URL list {path} can be used",
        expected='"id<TAB>url", "id url", "wnid url", a URL alone with --wnid, or a table with a column url',
        got=f"line {line}: {text[:80]!r}; {count} lines: {why}",
    )


def _parse(
    block: bytes, first_row: int, wnid: str | None, wnids: frozenset[str] | None
) -> tuple[list[tuple[int, str, str, str, int]], list[tuple[int, str, str]], int]:
    """Return the rows of a block of lines, its malformed ones (row, why, text), and the number of unwanted ones."""
    rows, bad, unwanted = [], [], 0
    for row, (name, found_wnid, url, host, other) in enumerate(_LINES.findall(block.decode("latin-1")), first_row):
        key = _fast_key(host) if len(url) <= _FAST_URL else None
        line = Line(found_wnid, name, url)
        if key is None:
            raw = (other if other or not url else f"{name} {url}").encode("latin-1")
            try:
                parsed = parse_line(raw, wnid)
            except BadUrl as error:
                bad.append((row, str(error), _shown(raw)))
                continue
            if parsed is None:
                continue
            line, key = parsed, host_key(host_of(parsed.url))
        if wnids is None or line.wnid in wnids:
            rows.append((row, *line, key))
        else:
            unwanted += 1
    return rows, bad, unwanted


@lru_cache(50_000)
def _fast_key(host: str) -> int | None:
    """Return the key of a host name that normalising leaves as it is, else None."""
    try:
        normalise_url(f"http://{host}/".encode())
    except BadUrl:
        return None
    return host_key(host)


def _list_repeats(journal: Journal, number: int, first_row: int, repeated: NDArray[np.int64]) -> None:
    """Move repeated lines out of ``urls`` into ``bad_lines``."""
    for start in range(0, len(repeated), _BATCH):
        rows = [(row,) for row in repeated[start : start + _BATCH].tolist()]
        with journal.transaction():
            journal.db.executemany(
                f"INSERT INTO bad_lines SELECT {number}, row - {first_row} + 1, 'repeated',"
                " 'URL or id in an earlier line', name || ' ' || url FROM urls WHERE row = ?",
                rows,
            )
            journal.db.executemany("DELETE FROM urls WHERE row = ?", rows)


def _shown(raw: bytes) -> str:
    """Return a bad line for the listing: printable, bounded, and without credentials."""
    raw = re.sub(rb"(:/{0,2})\S*@", rb"\1***@", raw[:_SHOWN_BYTES])
    return raw.decode("utf-8", "backslashreplace").strip()


class RepeatFinder:
    """Find rows whose URL or name was seen in an earlier row, by 64-bit hashes, a partition at a time.

    Memory is one partition plus the rows whose URL *or* name, but not both, is shared. Two different strings have the
    same hash with a probability of 1e-5 in all of 14.2 million lines.
    """

    def __init__(self, folder: Path) -> None:
        self._by_url, self._by_name = _Partitions(folder, "url"), _Partitions(folder, "name")

    def close(self) -> None:
        """Close the files, which deletes them."""
        for partitions in (self._by_url, self._by_name):
            partitions.close()

    def add(self, rows: Sequence[int], names: Sequence[str], urls: Sequence[str]) -> None:
        """Take rows, in ascending order."""
        pairs = np.empty(len(rows), _PAIR)
        pairs["row"], pairs["name"], pairs["url"] = (
            rows,
            [hash(name.lower()) for name in names],
            [hash(url) for url in urls],
        )
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
    """Return for each of the sorted keys whether a neighbour is equal."""
    same = np.zeros(len(keys) + 1, np.bool_)  # as the key before it; the two ends have no such neighbour
    same[1:-1] = keys[1:] == keys[:-1]
    return same[1:] | same[:-1]


def _replay(pairs: NDArray[Any]) -> NDArray[np.int64]:
    """Return the repeated rows among those that share a key with another: in order, first come, first kept."""
    urls: set[int] = set()
    names: set[int] = set()
    out: list[int] = []
    for row, (url, name) in sorted({row: (url, name) for url, name, row in pairs.tolist()}.items()):
        if url in urls or name in names:
            out.append(row)
        else:
            urls.add(url)
            names.add(name)
    return np.array(out, np.int64)


class _Partitions:
    """Rows in temporary files, partitioned by the hash of a key."""

    def __init__(self, folder: Path, key: str) -> None:
        self._key = key
        self._files = [tempfile.TemporaryFile(dir=folder) for _ in range(_PARTS)]  # noqa: SIM115, read() closes them

    def write(self, pairs: NDArray[Any]) -> None:
        part = pairs[self._key].view(np.uint64) >> np.uint64(64 - 6)
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(1, _PARTS, dtype=np.uint64))
        for file, piece in zip(self._files, np.split(pairs[order], bounds), strict=True):
            file.write(piece.tobytes())

    def close(self) -> None:
        for file in self._files:
            file.close()

    def read(self) -> Iterator[NDArray[Any]]:
        for file in self._files:
            with file:
                file.seek(0)
                yield np.frombuffer(file.read(), _PAIR)
