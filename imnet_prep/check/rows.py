"""Check one record: the part of ``verify --level decode`` that runs in worker processes."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from reprlib import repr as short
from typing import Any, NamedTuple, TypeGuard

from imnet_prep.errors import RecordsError
from imnet_prep.images.check import examine
from imnet_prep.images.perceptual_hash import SIDE, signature
from imnet_prep.records.check import Problem
from imnet_prep.records.folder import Row
from imnet_prep.records.mindrecord import NO_LABEL
from imnet_prep.records.record_list import RecordLine
from imnet_prep.types import ImageFault, name_fault, record_id

EQUAL, END, BASE = "equal", "end", "base"
SEPARATORS = re.compile(r"[/\\]+")
_Fault = tuple[str, str]  # kind and detail of a problem
_NOTHING = (0, 0, 0)  # the fingerprints of an image that does not decode


class Checked(NamedTuple):
    """The result of checking a record.

    Attributes:
        problems: The problems of the record.
        label: The stored label; :data:`~imnet_prep.records.mindrecord.NO_LABEL` where none can be read.
        fingerprints: Four uint64: record id, first 8 bytes of the image's SHA-256, and its 128-bit perceptual hash;
            zeros for what cannot be read.
        listed: Whether the record list has a valid line for this record.
    """

    problems: tuple[Problem, ...]
    label: int = NO_LABEL
    fingerprints: tuple[int, int, int, int] = (0, *_NOTHING)
    listed: bool = False


def names_agree(stored: str, listed: str, how: str) -> bool:
    """Compare a stored file_name with the one in the record list.

    Args:
        stored: The name in the data file.
        listed: The name in the record list.
        how: ``equal``; for adopted files ``end`` (``stored`` ends with ``listed``) or ``base`` (equal base names).
    """
    if how == EQUAL:
        return stored == listed
    parts, end = SEPARATORS.split(stored), listed.split("/")
    wanted = end if how == END else end[-1:]
    return parts[-len(wanted) :] == wanted


def check_row(row: Row, classes: Sequence[str], names: Mapping[str, str]) -> Checked:
    """Check the fields, label, name and image of a record, and compare them with its line of the record list.

    No bytes make it raise.

    Args:
        row: The record.
        classes: Class names in label order.
        names: How to compare stored names with listed ones, by split; see :func:`names_agree`.
    """
    try:
        rows, _ = len(row.opened), row.opened.header.image_field
    except RecordsError as error:
        return Checked((Problem("record", row.file, f"no row can be read: {error}"),) if row.row == 0 else ())
    if row.row >= rows:
        detail = "neither this row nor one after it is there"
        return Checked((Problem("record", row.file, detail, row.row),) if row.row == rows else ())
    try:
        line = row.line()
    except ValueError:  # reported once for the whole list
        line = None
    faults: list[_Fault] = []
    fields: dict[str, Any] = {}
    try:
        fields = row.fields
    except RecordsError as error:
        faults.append(("record", str(error)))
    else:
        faults += _field_faults(row, fields, line, classes, names[row.split])
    found = line.file_name if line else fields.get("file_name")
    name = None if name_fault(found) else str(found)
    image_prints = _NOTHING
    try:
        image_faults, image_prints = _check_image(row.image, line)
        faults += image_faults
    except RecordsError as error:
        faults.append(("record", str(error)))
    label = fields.get("label")
    problems = tuple(Problem(kind, row.file, " ".join(detail.split()), row.row, name) for kind, detail in faults)
    return Checked(
        problems,
        label if _is_label(label, classes) else NO_LABEL,
        (record_id(row.split, name) if name else 0, *image_prints),
        line is not None,
    )


def _is_label(label: object, classes: Sequence[str]) -> TypeGuard[int]:
    return type(label) is int and -1 <= label < len(classes)


def _field_faults(
    row: Row, fields: dict[str, Any], line: RecordLine | None, classes: Sequence[str], how: str
) -> Iterator[_Fault]:
    stored, label = fields.get("file_name"), fields.get("label")
    name = line.file_name if line else stored if how == EQUAL else None
    if "file_name" in row.opened.header.fields:
        if fault := name_fault(stored):
            yield "name", f"{fault}: {short(stored)}"
        elif line and not names_agree(str(stored), line.file_name, how):
            yield "name", f"expected {line.file_name!r:.200}, got {stored!r:.200}"
    if not _is_label(label, classes):
        yield "label", f"label {short(label)} is not one of 0 to {len(classes) - 1}"
    elif line and label != line.label:
        yield "label", f"expected {line.label}, got {label}"
    elif label == -1 and row.split != "test":
        yield "label", "no label"
    elif label >= 0 and isinstance(name, str) and not name.startswith(f"{classes[label]}/"):
        known = any(name.startswith(f"{class_name}/") for class_name in classes)
        kind, says = ("label", "another class") if known else ("name", "no class of the manifest")
        yield kind, f"label {label} is {classes[label]}, the name {name!r:.200} says {says}"


def _check_image(image: bytes, line: RecordLine | None) -> tuple[list[_Fault], tuple[int, int, int]]:
    """Return the faults of an image, and its fingerprints."""
    digest = hashlib.sha256(image).digest()
    changed = line is not None and digest != bytes.fromhex(line.sha256)
    try:
        seen = examine(image, SIDE)
    except ImageFault as fault:
        return [("image", f"{fault.reason}: {fault.detail}" + ("; the bytes changed" if changed else ""))], _NOTHING
    except MemoryError:
        return [("image", "not enough memory to decode it")], _NOTHING
    faults = []
    if changed:
        faults.append(("digest", f"decodes, but is not what was stored: SHA-256 {digest.hex()[:12]}"))
    if line and (seen.width, seen.height) != (line.width, line.height):
        faults.append(("image", f"expected {line.width} x {line.height} pixels, got {seen.width} x {seen.height}"))
    low, high = signature(seen.grey, seen.width, seen.height).tolist()
    return faults, (int.from_bytes(digest[:8], "little"), low, high)
