"""Read URL lists: each line is a class, an id and a URL, or is malformed for a reason. Nothing is guessed.

These forms are told apart line by line::

    n00004475_6590<TAB>http://...     fall11_urls.txt and its siblings: id and URL
    n00004475_6590 http://...         the per-synset lists, CRLF and blank lines included
    n00004475 http://...              class and URL; the id is made from the URL's digest
    http://...                        URL alone, with a class given for all such lines

Source: the list files of image-net.org.
"""

import bz2
import gzip
import hashlib
import lzma
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from imnet_prep.download.urls import BadUrl, normalise_url
from imnet_prep.errors import DownloadError
from imnet_prep.files import is_possible_name

MAX_LINE_BYTES = 65536  # a longer line is malformed, and skipped
_CHUNK = 1 << 20
_ID = re.compile(rb"(n\d{8})_[0-9A-Za-z][0-9A-Za-z_-]{0,63}")
_TAB_ID = re.compile(rb"([A-Za-z0-9][A-Za-z0-9._-]{0,99})_[0-9]{1,20}")
_NAME = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_URL_START = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*:/?/?", re.IGNORECASE)
_BOMS_16 = (b"\xff\xfe", b"\xfe\xff")
_LONE_CR = re.compile(rb"\r(?!\n)")
_COMPRESSED: dict[bytes, tuple[str, Any]] = {
    b"\x1f\x8b": ("gzip", gzip.open), b"BZh": ("bzip2", bz2.open), b"\xfd7zXZ\x00": ("xz", lzma.open),
}  # fmt: skip
_NOT_READ = {b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"%PDF": "a PDF"}
OURS = (
    "failures.jsonl",
    "bad_lines.jsonl",
    "journal.sqlite",
)  # files of the download folder, and SQLite's beside the last


class Line(NamedTuple):
    """A usable line: ``wnid`` is the class folder, ``name`` the file's stem, ``url`` normalised."""

    wnid: str
    name: str
    url: str


def is_class_name(name: str) -> bool:
    """Return whether a class can be a folder name, on any file system and beside the files of the download folder."""
    fits = bool(_NAME.fullmatch(name.encode("utf-8", "replace"))) and is_possible_name(name, windows=True)
    return fits and not name.lower().startswith(OURS)


def parse_line(raw: bytes, wnid: str | None) -> Line | None:
    """Read one line without its newline.

    Args:
        raw: The bytes.
        wnid: Class of a line that names none.

    Returns:
        The line; None for a blank one.

    Raises:
        BadUrl: The line is malformed; the message says why.
    """
    if len(raw) > MAX_LINE_BYTES:
        raise BadUrl("line too long")
    raw = raw.strip(b" \t\r\x0b\x0c")
    if not raw:
        return None
    if b"\x00" in raw:
        raise BadUrl("NUL byte")
    head = raw.partition(b" ")[0].partition(b"\t")[0]
    rest = raw[len(head) :]
    if _URL_START.match(head):
        if b"\t" in raw:
            raise BadUrl("text after the URL (of a table, name the column with --url-column)")
        url = normalise_url(raw)
        if wnid is None:
            raise BadUrl("no class (give --wnid)")
        return _named(wnid, url)
    if not rest:
        raise BadUrl("no URL")
    url = normalise_url(rest)
    match = _ID.fullmatch(head) or (_TAB_ID.fullmatch(head) if rest.startswith(b"\t") else None)
    name = (match[1] if match else head).decode("ascii", "replace")
    if not (match or _NAME.fullmatch(head)) or not is_class_name(name):
        raise BadUrl("neither an id nor a class before the URL")
    return Line(name, head.decode("ascii"), url) if match else _named(name, url)


def line_of(url: str, class_name: str, name: str, wnid: str | None) -> Line:
    """Make a line of the values of a table's row.

    Args:
        url: The URL.
        class_name: Its class, or empty for ``wnid``.
        name: Its id, or empty.
        wnid: Class of rows that name none.

    Raises:
        BadUrl: The row is malformed; the message says why.
    """
    if not url:
        raise BadUrl("no URL")
    found, class_name = normalise_url(url.encode("utf-8", "surrogateescape")), class_name or wnid or ""
    if not class_name:
        raise BadUrl("no class (give --wnid or --class-column)")
    if not is_class_name(class_name):
        raise BadUrl("the class cannot be a folder name")
    if not name:
        return _named(class_name, found)
    if not is_class_name(name):
        raise BadUrl("the id cannot be a file name")
    return Line(class_name, name, found)


def _named(wnid: str, url: str) -> Line:
    """Make an id for a URL without one. It does not depend on the line's place in the list."""
    return Line(wnid, f"{wnid}_{hashlib.sha256(url.encode()).hexdigest()[:16]}", url)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError of reading a URL list into an error for the user.

    Raises:
        DownloadError: The list cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise DownloadError(f"cannot read URL list {path}", got=error.strerror or str(error)) from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes without the newline) of a list; see :func:`read_blocks`."""
    with opened_list(path) as file:
        for first, block in read_blocks(file):
            yield from enumerate(block.split(b"\n")[:-1], first)


@contextmanager
def lists_of(paths: Sequence[Path], out: Path) -> Iterator[tuple[Path, ...]]:
    """Put a file in the place of ``-``, standard input, which is read to its end."""
    if Path("-") not in paths:
        yield tuple(paths)
        return
    with tempfile.TemporaryDirectory(prefix=".loading-", dir=out) as folder:
        copy = Path(folder) / "stdin"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield tuple(copy if path == Path("-") else path for path in paths)


@contextmanager
def opened_list(path: Path) -> Iterator[IO[bytes]]:
    """Open a list, plain or compressed with gzip, bzip2 or xz, whatever its name.

    Raises:
        DownloadError: The list is missing, not readable, UTF-16, or of a form that is not read; or it turns out to be
            damaged while it is read.
    """
    with readable(path), path.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        if found := next((what for start, what in _NOT_READ.items() if magic.startswith(start)), None):
            raise DownloadError(f"URL list {path} is {found}", expected="text, plain or gzip, bzip2 or xz; or Parquet")
        what, unpack = next((one for start, one in _COMPRESSED.items() if magic.startswith(start)), ("", None))
        try:
            plain: Any = file if unpack is None else unpack(file)
            if magic.startswith(_BOMS_16):
                raise DownloadError(f"URL list {path} is UTF-16", remedy="convert it: iconv -f UTF-16 -t UTF-8")
            yield plain
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if unpack is None or getattr(error, "errno", None) is not None:
                raise
            raise DownloadError(
                f"URL list {path} is damaged {what}",
                got=str(error),
                remedy="fetch it again; its lines were not taken in",
            ) from error


def read_blocks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, from 1; whole lines, each with its newline) of a list, in flat memory.

    LF, CRLF and CR end a line. Of a line longer than a block, the first ``MAX_LINE_BYTES + 1`` bytes are yielded.
    """
    number, rest, skipping = 1, b"", False
    while chunk := file.read(_CHUNK):
        if number == 1 and not rest:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        if b"\r" in chunk:
            while chunk.endswith(b"\r") and (more := file.read(1)):  # LF, or the first byte of a line
                chunk += more
            chunk = _LONE_CR.sub(b"\n", chunk)
        if skipping:  # the tail of an overlong line that was already yielded
            _, newline, chunk = chunk.partition(b"\n")
            skipping = not newline
        block, newline, rest = (rest + chunk).rpartition(b"\n")
        if newline:
            yield number, block + newline
            number += block.count(b"\n") + 1
        if len(rest) > MAX_LINE_BYTES:
            yield number, rest[: MAX_LINE_BYTES + 1] + b"\n"
            number, rest, skipping = number + 1, b"", True
    if rest:
        yield number, rest + b"\n"


def read_wnids(path: Path) -> frozenset[str]:
    """Read the classes to keep: the first word of each line that is neither blank nor a ``#`` comment.

    Raises:
        DownloadError: The file cannot be read, or has no class.
    """
    found = {line.split()[0] for _, line in read_lines(path) if line.strip() and not line.lstrip().startswith(b"#")}
    if not found:
        raise DownloadError(f"no classes in {path}", expected="one wnid a line")
    return frozenset(name.decode("utf-8", "replace") for name in found)
