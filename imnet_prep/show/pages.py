"""Render templates to HTML, and write reports to files.

Templates lie in the folder ``templates`` of a package. Every value is escaped, and an undefined name is an error. Pages
are readable without their script, in light and dark, from a width of 320 pixels on. Charts have a description and a
table of their numbers. A content security policy keeps a report from loading anything.
"""

import json
import os
import re
from functools import cache
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from imnet_prep.errors import RecordsError
from imnet_prep.files import open_plain, write_atomically
from imnet_prep.records.publish import refuse_inside_records

_PACKAGE = "imnet_prep.show"


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(_PACKAGE)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"grouped": _grouped, "counted": _counted, "bytes": _bytes, "json": _json}
    environment.tests["digest"] = lambda value: re.fullmatch("[0-9a-f]{16,64}", str(value)) is not None
    return environment


def render(template: str, package: str = _PACKAGE, **values: object) -> str:
    """Render a template of a package. It may use the templates of this package.

    Args:
        template: File name of the template.
        package: The package whose folder ``templates`` holds it.
        values: What the template shows. Text that is not valid Unicode, like a file name, gets question marks.
    """
    html = _environment(package).get_template(template).render(values)
    return html.encode("utf-8", "replace").decode()


def _grouped(value: object) -> object:
    """Format a number with commas, a float with four digits; return anything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 10_000 else f"{value:,.0f}"


def _counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2,000 classes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _json(value: object) -> str:
    """Format a value of a JSON document; text stays as it is."""
    return value if isinstance(value, str) else json.dumps(value)


def _bytes(size: float) -> str:
    """Format a number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def check_target(out: Path, *, force: bool) -> None:
    """Check, before a report is made, that it may be written to a path.

    Args:
        out: The file.
        force: Allow it to replace a file that is not a report.

    Raises:
        RecordsError: It lies in a records folder, its folder is not writable, something other than a file is there, or
            a file that is not a report, without ``force``.
    """
    refuse_inside_records(out)
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise RecordsError(f"{out}: cannot be written", expected="a folder that you may write in", got=str(out.parent))
    if not os.path.lexists(out):
        return
    opening = render("opening.html").encode()  # the same in every report of every version
    try:
        with open_plain(out) as file:
            known = file.read(len(opening)) == opening
    except OSError as error:
        raise RecordsError(f"{out}: cannot be replaced", got=error.strerror or str(error)) from error
    if not known and not force:
        raise RecordsError(f"{out}: is not a report, and stays", remedy="choose another --out, or add --force")


def write_page(out: Path, html: str) -> int:
    """Write a page to a path that :func:`check_target` allowed, and return its size in bytes.

    Raises:
        RecordsError: It cannot be written.
    """
    data = html.encode()
    try:
        write_atomically(out, data)
    except OSError as error:
        raise RecordsError(f"{out}: cannot be written", got=error.strerror or str(error)) from error
    return len(data)
