"""The parts that the reports are made of: pages, tables, bars, curves, pictures. Every text is escaped here.

Plain HTML that reads without its script, in light and dark, from 320 pixels on. Charts are pictures with a description,
and a table of their numbers beside them. A content security policy keeps the page from fetching anything.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError
from imnet_prep.files import open_plain, write_atomically
from imnet_prep.records.publish import refuse_inside_records

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
_OPENING = (  # of every report since the first: they are told from other files by it
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
)
THUMB_QUALITY = 70


class Html(str):
    """Text that is HTML already; any other text is escaped."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape a value, unless it is HTML."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    """Put parts one after the other."""
    return Html("".join(text(part) for part in parts))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """Make an element; ``class_`` is class, ``aria_label`` is aria-label; attributes that are None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{join(content)}</{name}>")


def page(title: str, sections: Sequence[tuple[str, str, Html]], lead: Html, *, footer: str) -> str:
    """Make a whole page.

    Args:
        title: Of the page.
        sections: (id, heading, content); they are linked from the top.
        lead: What stands under the title.
        footer: What made it.
    """
    links = join(tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, heading, _ in sections)
    body = join(
        tag(
            "section",
            tag("h2", heading, id=f"{anchor}-heading"),
            content,
            id=anchor,
            aria_labelledby=f"{anchor}-heading",
        )
        for anchor, heading, content in sections
    )
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return (
        f'{_OPENING}<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f"<header><h1>{escape(title)}</h1>{lead}</header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        f'<main id="main" tabindex="-1">\n{body}</main>\n<footer><p>{escape(footer)}</p></footer>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def check_target(out: Path, *, force: bool) -> None:
    """Check, before the work of a report, that it may be written to a path.

    Args:
        out: The file.
        force: Let it replace a file that no report wrote.

    Raises:
        RecordsError: It is another kind of file, lies in a records folder, is no folder's to write in, or is not a
            report without ``force``.
    """
    refuse_inside_records(out)
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise RecordsError(f"{out}: cannot be written", expected="a folder that you may write in", got=str(out.parent))
    if not os.path.lexists(out):
        return
    try:
        with open_plain(out) as file:
            known = file.read(len(_OPENING)) == _OPENING.encode()
    except OSError as error:
        raise RecordsError(f"{out}: cannot be replaced", got=error.strerror or str(error)) from error
    if not known and not force:
        raise RecordsError(f"{out}: is not a report, and stays", remedy="choose another --out, or add --force")


def write_page(out: Path, html: str) -> int:
    """Write a page whose target was checked; return its bytes.

    Raises:
        RecordsError: It cannot be written.
    """
    data = html.encode("utf-8", "replace")
    try:
        write_atomically(out, data)
    except OSError as error:
        raise RecordsError(f"{out}: cannot be written", got=error.strerror or str(error)) from error
    return len(data)


def facts(rows: Iterable[tuple[str, object]]) -> Html:
    """Return a list of names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows), class_="facts")


def tiles(rows: Iterable[tuple[str, object]]) -> Html:
    """Return a few large numbers."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in rows), class_="tiles")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table that scrolls sideways inside itself; numbers (int, float) are set to the right."""
    body = join(tag("tr", *(_cell(value, first=place == 0) for place, value in enumerate(row))) for row in rows)
    columns = tag("tr", *(tag("th", name, scope="col") for name in head))
    made = tag("table", tag("caption", caption), tag("thead", columns), tag("tbody", body))
    return tag("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(value: object, *, first: bool) -> Html:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    shown = f"{value:,}" if isinstance(value, int) and number else f"{value:,.4g}" if number else value
    return tag("th", shown, scope="row") if first else tag("td", shown, class_="number" if number else None)


def details(summary: str, *content: object) -> Html:
    """Return something to unfold."""
    return tag("details", tag("summary", summary), *content)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a chart: what it stands for, and how much."""

    name: str
    value: float


def bars(caption: str, bars: Sequence[Bar], ends: tuple[str, str, str], *, unit: str = "images") -> Html:
    """Return a bar chart, with its numbers to unfold.

    Args:
        caption: What it shows.
        bars: From left to right.
        ends: Texts under the left end, the middle and the right end.
        unit: What is counted.
    """
    most = max((bar.value for bar in bars), default=0) or 1
    drawn = join(
        tag("i", style=f"height:{100 * bar.value / most:.4g}%", title=f"{bar.name}: {bar.value:,.6g} {unit}")
        for bar in bars
    )
    largest = max(bars, key=lambda bar: bar.value, default=Bar("", 0))
    label = f"{caption}. {len(bars)} bars; the highest is {largest.name} with {largest.value:,.6g} {unit}."
    counted = [(bar.name, int(bar.value) if float(bar.value).is_integer() else bar.value) for bar in bars]
    return tag(
        "figure",
        tag("figcaption", caption),
        tag("div", drawn, class_="bars", role="img", aria_label=label),
        tag("div", *(tag("span", end) for end in ends), class_="axis", aria_hidden="true"),
        details("As a table", table(caption, ("range", unit), counted)),
        class_="chart",
    )


def histogram(caption: str, values: NDArray[np.float64], *, unit: str = "", log: bool = False, bins: int = 32) -> Html:
    """Count values in bins of equal width (of equal ratio where ``log``)."""
    if not len(values):
        return tag("p", f"{caption}: nothing to count.")
    low, high = float(values.min()), float(values.max())
    if high <= low:
        low, high = low * 0.95 - 0.5 * (low == 0), high * 1.05 + 0.5 * (high == 0)
    edges = np.geomspace(max(low, 1e-9), high, bins + 1) if log else np.linspace(low, high, bins + 1)
    edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
    counts, _ = np.histogram(values, edges)
    named = [
        Bar(f"{_short(a)} to {_short(b)}{unit}", float(count))
        for a, b, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    left, middle, right = (_short(edge) + unit for edge in edges[[0, len(edges) // 2, -1]])
    return bars(caption, named, (left, middle, right))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve: its name, and (x, y) points; ``style`` 1 to 4 chooses colour and dashes."""

    name: str
    style: int
    points: tuple[tuple[float, float], ...]


def curves(
    caption: str,
    lines: Sequence[Curve],
    *,
    low: float | None = None,
    high: float | None = None,
    x_name: str = "epoch",
) -> Html:
    """Return curves over a common x, with their numbers to unfold."""
    points = [point for line in lines for point in line.points]
    if not points:
        return tag("p", f"{caption}: nothing was recorded.")
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0 = min(y for _, y in points) if low is None else low
    y1 = max(y for _, y in points) if high is None else high
    wide, tall = (x1 - x0) or 1.0, (y1 - y0) or 1.0
    drawn = []
    for line in lines:
        places = [(1000 * (x - x0) / wide, 400 - 400 * (y - y0) / tall) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(Html(f'<polyline class="line{line.style}" points="{path}"/>'))
        drawn += [Html(f'<path class="line{line.style} dot" d="M{x:.1f},{y:.1f}h0"/>') for x, y in places[-1:]]
    said = "; ".join(
        f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines if line.points
    )
    svg = Html(
        f'<svg viewBox="-4 -4 1008 408" preserveAspectRatio="none" role="img" aria-label="{escape(caption)}: '
        f'{escape(said)}">{join(drawn)}</svg>'
    )
    columns = [dict(line.points) for line in lines]
    rows = [(f"{x:g}", *(column.get(x, "") for column in columns)) for x in sorted({x for x, _ in points})]
    legend = join(tag("li", tag("span", "", class_=f"key line{line.style}"), line.name) for line in lines)
    return tag(
        "figure",
        tag("figcaption", caption),
        tag("ul", legend, class_="legend"),
        tag("div", tag("span", f"{y1:.4g}"), tag("span", f"{y0:.4g}"), class_="scale", aria_hidden="true"),
        tag("div", svg, class_="plot"),
        tag("div", tag("span", f"{x_name} {x0:g}"), tag("span", f"{x1:g}"), class_="axis", aria_hidden="true"),
        details("As a table", table(caption, (x_name, *(line.name for line in lines)), rows)),
        class_="chart curves",
    )


def thumbnail(pixels: NDArray[np.uint8], side: int) -> bytes:
    """Shrink BGR or grey pixels to at most ``side`` and encode them as a small JPEG."""
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, THUMB_QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    return bytes(cv2.imencode(".jpg", pixels, options)[1])


def picture(data: bytes, alt: str, caption: object = "", *, side: int = 96) -> Html:
    """Return a small picture with its text alternative and a caption."""
    image = Html(
        f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}" width="{side}" '
        f'height="{side}" loading="lazy">'
    )
    return tag("figure", image, tag("figcaption", caption) if caption else "", class_="thumb")
