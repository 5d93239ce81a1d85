"""Read URL lists that are tables: CSV, TSV, JSON lines and Parquet, by the names of their columns.

The other columns, such as a caption, are kept with each row.
"""

import csv
import io
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from imnet_prep.download.options import BY_NAME, Columns
from imnet_prep.errors import DownloadError

MAX_LINE_BYTES = 1 << 20  # of JSON lines; the cells of a CSV have 128 KiB at most, by Python's csv
_GUESSES = {"url": ("url", "image_url"), "class": ("wnid", "label", "class"), "id": ("id", "image_id")}
_LONE_SURROGATE = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")  # the others stand for bytes that are not UTF-8
_PARQUET_ROWS = 10_000
_QUOTED = re.compile(r'"((?:[^"]|"")*+)"(?:(\t)(.*)|[\r\n]*\Z)', re.DOTALL)
_CELL_LINES = 100  # of a cell in quotation marks, in a TSV


class Row(NamedTuple):
    """A row of a table: its number from 1, the header counted, and its values as text; ``meta`` is the rest."""

    number: int
    url: str
    class_name: str
    name: str
    meta: dict[str, Any]


class Table(NamedTuple):
    """A list that is a table.

    Attributes:
        form: What it is, for messages.
        columns: The names of all columns.
        chosen: The column of URL, class and id; None where there is none.
        rows: Its rows, read as they are asked for.
    """

    form: str
    columns: tuple[str, ...]
    chosen: Columns
    rows: Iterator[Row]

    def described(self) -> str:
        """Return which column is taken for what."""
        pairs = (("URL", self.chosen.url), ("class", self.chosen.class_name), ("id", self.chosen.name))
        taken = ", ".join(f"{what} from {column}" for what, column in pairs if column is not None)
        rest = [
            name for name in self.columns if name not in (self.chosen.url, self.chosen.class_name, self.chosen.name)
        ]
        return f"{self.form}: {taken}" + (f"; kept as meta: {', '.join(rest[:10])}" if rest else "")


def read_table(path: Path, file: IO[bytes], columns: Columns) -> Table | None:
    """Recognize a table by its content.

    Args:
        path: The list; its name tells a CSV without a header.
        file: It, decompressed, at its first byte.
        columns: The columns that the user has named.

    Returns:
        The table, or None for a list of lines.

    Raises:
        DownloadError: It is a table, and the column of its URLs is not known.
    """
    start = file.read(1 << 16)
    if start.startswith(b"PAR1"):
        return _parquet(path, columns)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    named = columns != BY_NAME
    if text.startswith(b"{"):
        if not text.partition(b"\n")[0][1:].strip():  # such as the notes that img2dataset writes beside an image
            what = f"URL list {path} is a JSON object over several lines"
            raise DownloadError(what, expected="an object per line", remedy="write each on one line (jq -c .)")
        return _json_lines(path, _again(start, file), columns)
    if text.startswith(b"[") and not text.startswith((b"[http", b"[HTTP")):
        remedy = "write one object per line (jq -c '.[]')"
        raise DownloadError(f"URL list {path} is a JSON array", expected="an object per line", remedy=remedy)
    first = text.partition(b"\n")[0].partition(b"\r")[0].decode("utf-8", "replace")
    stem = path.name.lower().removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
    tab = "\t" in first and (not stem.endswith(".csv"))
    header = next(csv.reader([first], delimiter="\t" if tab else ","), [])
    known = {cell.strip().lower() for cell in header} & {*_GUESSES["url"], (columns.url or "").lower()}
    if not known and not named and not (stem.endswith(".csv") or (tab and _is_captions(header))):
        return None
    return _separated(path, _again(start, file), "\t" if tab else ",", columns)


def _is_captions(cells: Sequence[str]) -> bool:
    """Return whether the first line is no "id<TAB>url", but has a URL and something else."""
    urls = [place for place, cell in enumerate(cells) if re.match(r"https?://", cell.strip(), re.IGNORECASE)]
    return bool(urls) and (urls[0] == 0 or " " in cells[0].strip())


def _again(start: bytes, file: IO[bytes]) -> IO[bytes]:
    """Return a file from its first byte on, of which some has been read."""
    return io.BufferedReader(_Joined(start, file))


class _Joined(io.RawIOBase):
    def __init__(self, start: bytes, file: IO[bytes]) -> None:
        self._start, self._file = start, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start[: len(buffer)] or self._file.read(len(buffer))
        self._start = self._start[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _choose(path: Path, form: str, names: Sequence[str], columns: Columns) -> Columns:
    """Return the columns to take: those that the user has named, else those whose names say it."""
    by_lower = {name.strip().lower(): name for name in reversed(names)}

    def pick(wanted: str | None, kind: str) -> str | None:
        if wanted is not None:
            if wanted not in names:
                raise DownloadError(f"URL list {path} ({form}) has no column {wanted}", got=_listed(names))
            return wanted
        return next((by_lower[guess] for guess in _GUESSES[kind] if guess in by_lower), None)

    chosen = Columns(pick(columns.url, "url"), pick(columns.class_name, "class"), pick(columns.name, "id"))
    if chosen.url is None:
        raise DownloadError(
            f"URL list {path} is a table ({form}) without a column that is called url",
            got=_listed(names),
            remedy="name the column with --url-column; without a header, give its number from 1",
        )
    return chosen


def _listed(names: Sequence[str]) -> str:
    return "columns " + ", ".join(repr(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")


def _text(value: Any) -> str:
    """Return a value as text; a lone surrogate, which JSON can write, is no character."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else _LONE_SURROGATE.sub("\ufffd", str(value).strip())


def _row(number: int, values: Mapping[str, Any], chosen: Columns) -> Row:
    taken = (chosen.url, chosen.class_name, chosen.name)
    meta = {name: value for name, value in values.items() if name not in taken and value not in (None, "")}
    url, class_name, name = (_text(values.get(one)) if one is not None else "" for one in taken)
    return Row(number, url, class_name, name, meta)


def _separated(path: Path, file: IO[bytes], delimiter: str, columns: Columns) -> Table:
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    form = "CSV" if delimiter == "," else "TSV"
    reader = _comma_separated(path, text) if delimiter == "," else _tab_separated(text)
    first = next(reader, [])
    names = [cell.strip() or str(place) for place, cell in enumerate(first, 1)]  # pandas does not name its index
    numbers = [name for name in (columns.url, columns.class_name, columns.name) if name is not None]
    is_header = not any(re.match(r"https?://", cell.strip(), re.IGNORECASE) for cell in first)
    in_header = is_header and bool(set(numbers) & set(names))
    records: Iterable[tuple[int, list[str]]] = enumerate(reader, 2)
    if numbers and all(name.isascii() and name.isdigit() for name in numbers) and not in_header:
        names, records = [str(place + 1) for place in range(len(first))], enumerate(chain([first], reader), 1)
    chosen = _choose(path, form, names, columns)
    rows = (_row(number, dict(zip(names, cells, strict=False)), chosen) for number, cells in records if cells)
    return Table(form, tuple(names), chosen, rows)


def _comma_separated(path: Path, text: io.TextIOWrapper) -> Iterator[list[str]]:
    reader = csv.reader(text, strict=True)  # an open quotation mark would hide lines
    try:
        yield from reader
    except csv.Error as error:
        got, remedy = (
            f"line {reader.line_num}: {error}",
            'close quotation marks, and double those inside of a cell ("")',
        )
        raise DownloadError(f"URL list {path} is a damaged CSV", got=got, remedy=remedy) from error


def _tab_separated(text: io.TextIOWrapper) -> Iterator[list[str]]:
    """Split lines at tabs. A cell may be in quotation marks, as pandas writes one with line ends or marks inside.

    Other programs write captions as they are. A mark that begins no such cell is therefore a character like any other,
    and what is in marks may have line ends or tabs, but not both: it hides no line that has a URL.
    """
    ahead: deque[str] = deque()

    def read() -> str:
        return ahead.popleft() if ahead else text.readline(MAX_LINE_BYTES)

    while line := read():
        cells: list[str] = []
        rest: str | None = line if line.strip("\r\n") else None
        while rest is not None:
            quoted = _quoted_cell(rest, read, ahead) if rest.startswith('"') else None
            if quoted is None:
                cell, tab, after = rest.partition("\t")
                cells.append(cell if tab else cell.rstrip("\r\n"))
            else:
                cell, tab, after = quoted
                cells.append(cell)
            rest = after if tab else None
        yield cells


def _quoted_cell(rest: str, read: Callable[[], str], ahead: deque[str]) -> tuple[str, str, str] | None:
    """Return a cell in quotation marks that begins here, the tab after it and the rest; None for any other cell.

    Args:
        rest: The rest of a line.
        read: Returns the next line, which such a cell may go on in.
        ahead: Takes the lines back that are not of the cell.
    """
    lines = [rest]
    while sum(line.count('"') for line in lines) % 2 and "\t" not in lines[-1] and len(lines) < _CELL_LINES:
        if not (line := read()):
            break
        lines.append(line)
    found = _QUOTED.match("".join(lines))
    if found is None or (len(lines) > 1 and "\t" in found[1]):
        ahead.extendleft(reversed(lines[1:]))
        return None
    return found[1].replace('""', '"'), found[2] or "", found[3] or ""


def _json_lines(path: Path, file: IO[bytes], columns: Columns) -> Table:
    """Take the columns from the first objects."""
    lines = enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1)

    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in lines:
            if not line.strip():
                continue
            try:
                found = json.loads(line, parse_constant=lambda _: None)  # NaN is not JSON
            except (ValueError, RecursionError):
                found = None
            yield number, found if isinstance(found, dict) else {}

    parsed = objects()
    head = list(islice(parsed, 100))
    names = tuple(dict.fromkeys(name for _, one in head for name in one))
    chosen = _choose(path, "JSON lines", names, columns)
    rows = (_row(number, one, chosen) for number, one in chain(head, parsed))
    return Table("JSON lines", names, chosen, rows)


def _parquet(path: Path, columns: Columns) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        remedy = "pip install 'imnet-prep[parquet]'"
        raise DownloadError(f"URL list {path} is Parquet, which needs pyarrow", remedy=remedy) from error
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DownloadError(f"URL list {path} is damaged Parquet", got=str(error)[:200]) from error
    fields = [one for one in file.schema_arrow if not pa.types.is_nested(one.type) or one.name == columns.url]
    chosen = _choose(path, "Parquet", [one.name for one in fields], columns)
    taken = (chosen.url, chosen.class_name, chosen.name)
    names = [one.name for one in fields if one.name in taken or not _is_binary(pa, one.type)]

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in file.iter_batches(_PARQUET_ROWS, columns=names):
                for values in batch.to_pylist():
                    number += 1
                    yield _row(number, {name: _plain(value) for name, value in values.items()}, chosen)
        except (pa.ArrowException, OSError) as error:
            raise DownloadError(f"URL list {path} is damaged Parquet", got=str(error)[:200]) from error

    return Table("Parquet", tuple(names), chosen, rows())


def _is_binary(pa: Any, kind: Any) -> bool:
    """Return whether a column holds bytes, such as the images themselves, which are no words about them."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):  # how pandas writes a missing value
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
