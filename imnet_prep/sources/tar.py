"""Walk a tar by its headers: bodies are seeked over, nothing is unpacked, and a hostile archive cannot do harm.

Python's tarfile keeps every member it has seen and follows what headers say; here a million members cost no memory, a
tar inside a tar is a byte range, and a lie is reported instead of believed.

Source: POSIX.1-2001 pax interchange format; GNU tar manual, "Basic Tar Format"; base-256 numbers as in GNU tar.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
_MAX_META_BYTES = 1 << 20  # a long name or pax header beyond a MiB is an attack
_SEARCH_BYTES = 1 << 20
_ZERO = bytes(BLOCK)
_REGULAR = b"0\x007"
_WITHOUT_BODY = b"123456"  # links, devices, folders, FIFOs: their size field counts nothing


class Kind(enum.Enum):
    """What a member is."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    DEVICE = "device or FIFO"
    SPARSE = "sparse file"
    OTHER = "member of unknown type"


@dataclass(frozen=True, slots=True)
class Member:
    """A member: its name as written (undecodable bytes as surrogates), and its body's place in the outermost file."""

    name: str
    kind: Kind
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as a tar should be.

    Attributes:
        name: The member concerned, or empty.
        detail: What is wrong.
        last: Nothing after it could be read.
    """

    name: str
    detail: str
    last: bool


@dataclass(slots=True)
class _Extra:
    """What extension headers say of the next member."""

    name: bytes | None = None
    size_bytes: int | None = None
    sparse: bool = False


def walk(descriptor: int, start: int, end: int, *, suffix: bytes = b"") -> Iterator[Member | Damage]:
    """Yield the members between two offsets, in their order.

    Args:
        descriptor: The outermost file.
        start: First byte of the tar.
        end: One past its last byte.
        suffix: After damage, go on at the next header whose name ends so: in a tar of tars, ``.tar``, lest an inner
            header be taken for an outer one.

    Yields:
        Members, and damage where there is some.
    """
    at, extra, common = start, _Extra(), _Extra()
    while True:
        header = os.pread(descriptor, BLOCK, at) if at + BLOCK <= end else b""
        if len(header) < BLOCK:
            yield Damage("", f"no end-of-archive block: the archive ends at byte {min(at, end) - start}", last=True)
            return
        if header == _ZERO:
            return
        if not is_header(header):
            found = _next_header(descriptor, at + BLOCK, end, suffix)
            yield Damage("", f"no tar header at byte {at - start}", last=found is None)
            if found is None:
                return
            at, extra = found, _Extra()
            continue
        member, after, fault = _parse(descriptor, header, at, extra, common)
        if fault or after > end:
            found = _next_header(descriptor, at + BLOCK, end, suffix)
            fault = fault or f"says {member.size_bytes} bytes, only {max(0, end - member.offset)} are left"
            yield Damage(member.name, fault, last=found is None)
            if found is None:
                return
            at, extra = found, _Extra()
            continue
        flag = header[156:157]
        if flag in (b"L", b"K", b"x", b"g", b"X"):
            target = common if flag == b"g" else extra
            _extend(target, flag, os.pread(descriptor, member.size_bytes, member.offset))
        else:
            yield member
            extra = _Extra()
        at = after


def is_header(block: bytes) -> bool:
    """Tell by its checksum whether a block is a tar header."""
    field = block[148:156].split(b"\x00")[0].strip()
    if not field or not field.isdigit() or len(block) < BLOCK:
        return False
    try:
        wanted = int(field, 8)
    except ValueError:
        return False
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if total == wanted:
        return True
    return total - 256 * sum(byte >= 128 for byte in block[:148] + block[156:]) == wanted  # old tars: signed bytes


def _number(field: bytes) -> int | None:
    """Read an octal or base-256 number; None where it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\x00")[0].strip()
    if not text:
        return 0
    try:
        return int(text, 8) if text.isdigit() else None
    except ValueError:
        return None


def _parse(descriptor: int, header: bytes, at: int, extra: _Extra, common: _Extra) -> tuple[Member, int, str]:
    """Give the member, where the next header is, and what is wrong with this one (or an empty string)."""
    flag = header[156:157]
    raw = header[:100].split(b"\x00")[0]
    if header[257:263] == b"ustar\x00" and header[345]:
        raw = header[345:500].split(b"\x00")[0] + b"/" + raw
    extends = flag in (b"L", b"K", b"x", b"g", b"X")
    name_bytes = raw if extends else (extra.name or common.name or raw)
    name = name_bytes.decode("utf-8", "surrogateescape")
    size = _number(header[124:136])
    if size is None:
        return Member(name, Kind.OTHER, at + BLOCK, 0), at + BLOCK, "its size is not a number"
    if not extends and extra.size_bytes is not None:
        size = extra.size_bytes
    if extends and size > _MAX_META_BYTES:
        return Member(name, Kind.OTHER, at + BLOCK, size), at + BLOCK, f"an extension header of {size} bytes"
    kind = _kind(flag, name, sparse=extra.sparse and not extends)
    body = at + BLOCK
    if flag == b"S":
        more = header[482]
        while more and len(block := os.pread(descriptor, BLOCK, body)) == BLOCK:
            more, body = block[504], body + BLOCK
    stored = 0 if flag in _WITHOUT_BODY and flag else size
    after = body + (stored + BLOCK - 1) // BLOCK * BLOCK
    return Member(name, kind, body, size if kind is Kind.FILE or extends else stored), after, ""


def _kind(flag: bytes, name: str, *, sparse: bool) -> Kind:
    if sparse or flag == b"S":
        return Kind.SPARSE
    if flag in _REGULAR:
        return Kind.FOLDER if name.endswith("/") else Kind.FILE
    return {
        b"1": Kind.LINK,
        b"2": Kind.LINK,
        b"5": Kind.FOLDER,
        b"3": Kind.DEVICE,
        b"4": Kind.DEVICE,
        b"6": Kind.DEVICE,
    }.get(flag, Kind.OTHER)


def _extend(extra: _Extra, flag: bytes, body: bytes) -> None:
    if flag == b"L":
        extra.name = body.split(b"\x00")[0]
    elif flag in (b"x", b"g", b"X"):
        for key, value in _pax_records(body):
            if key == b"path":
                extra.name = value
            elif key == b"size" and value.isdigit():
                extra.size_bytes = int(value)
            elif key.startswith(b"GNU.sparse."):
                extra.sparse = True


def _pax_records(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Split ``"<length> <key>=<value>\\n"`` records; stop at the first that is not one."""
    at = 0
    while at < len(body):
        head, space, _ = body[at : at + 20].partition(b" ")
        if not space or not head.isdigit() or int(head) <= len(head) + 1 or at + int(head) > len(body):
            return
        record = body[at + len(head) + 1 : at + int(head) - 1]
        key, equals, value = record.partition(b"=")
        if not equals:
            return
        yield key, value
        at += int(head)


def _next_header(descriptor: int, at: int, end: int, suffix: bytes) -> int | None:
    """Search block by block for the next ustar header whose name ends in ``suffix``."""
    while at + BLOCK <= end:
        chunk = os.pread(descriptor, min(_SEARCH_BYTES, end - at), at)
        if len(chunk) < BLOCK:
            return None
        for place in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[place + 257 : place + 262] == b"ustar":
                block = chunk[place : place + BLOCK]
                if block[:100].rstrip(b"\x00").endswith(suffix) and is_header(block):
                    return at + place
        at += len(chunk) // BLOCK * BLOCK
    return None


def member_fault(name: str) -> str:
    """Say why a member's name is hostile; empty where it is not. Nothing is ever written under it, but it is a lie."""
    if name.startswith("/"):
        return "its name is an absolute path"
    if ".." in name.split("/"):
        return "its name leads out of the archive (..)"
    return ""


def clean_parts(name: str) -> list[str]:
    """Split a member's name into its parts, without ``.`` and empty ones."""
    return [part for part in name.split("/") if part not in ("", ".")]
