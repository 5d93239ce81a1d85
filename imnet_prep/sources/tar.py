"""Walk a tar by its headers: bodies are seeked over, nothing is unpacked, and a hostile archive cannot do harm.

Python's tarfile keeps every member it has seen and follows what headers say; here a million members cost no memory, a
tar inside a tar is a byte range, and a lie is reported instead of believed.

Source: POSIX.1-2001 pax interchange format; GNU tar manual, "Basic Tar Format"; base-256 numbers as in GNU tar.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from imnet_prep.files import PlainFile

BLOCK = 512
_MAX_META_BYTES = 1 << 20  # a long name or pax header beyond a MiB is an attack
_SEARCH_BYTES = 1 << 20
_ZERO = bytes(BLOCK)
_WITHOUT_BODY = b"123456"  # links, devices, folders, FIFOs: their size field counts nothing
_EXTENSIONS = b"LKxgX"  # headers that say something of the next member, or (g) of all that follow


class Kind(enum.Enum):
    """What a member is."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    DEVICE = "device or FIFO"
    SPARSE = "sparse file"
    OTHER = "member of unknown type"


_KINDS = {
    b"0": Kind.FILE, b"\x00": Kind.FILE, b"7": Kind.FILE, b"1": Kind.LINK, b"2": Kind.LINK, b"5": Kind.FOLDER,
    b"3": Kind.DEVICE, b"4": Kind.DEVICE, b"6": Kind.DEVICE, b"S": Kind.SPARSE,
}  # fmt: skip


class Member(NamedTuple):
    """A member: its name as written (undecodable bytes as surrogates), and its body's place in the outermost file."""

    name: str
    kind: Kind
    offset: int
    size_bytes: int

    @property
    def parts(self) -> list[str]:
        """The parts of its name, without ``.`` and empty ones; at least one, which may be empty."""
        return [part for part in self.name.split("/") if part not in ("", ".")] or [""]

    @property
    def fault(self) -> str:
        """Why it cannot be an image, or empty. Nothing is ever written under a hostile name, but it is a lie."""
        if self.kind is not Kind.FILE:
            return f"a {self.kind.value} in the archive, not a file"
        if self.name.startswith("/"):
            return "its name is an absolute path"
        return "its name leads out of the archive (..)" if ".." in self.name.split("/") else ""


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as a tar should be.

    Attributes:
        name: The member concerned, or empty.
        fault: What is wrong.
        last: Nothing after it could be read.
    """

    name: str
    fault: str
    last: bool


@dataclass(slots=True)
class _Extra:
    """What extension headers say of the next member."""

    name: bytes | None = None
    size_bytes: int | None = None
    sparse: bool = False


def walk(file: PlainFile, start: int, end: int, *, suffix: bytes = b"") -> Iterator[Member | Damage]:
    """Yield the members between two offsets, in their order.

    Args:
        file: The outermost file.
        start: First byte of the tar.
        end: One past its last byte.
        suffix: After damage, go on at the next header whose name ends so: in a tar of tars, ``.tar``, lest an inner
            header be taken for an outer one.

    Yields:
        Members, and damage where there is some.
    """
    at, extra, common = start, _Extra(), _Extra()
    while at + BLOCK <= end and len(header := file.read(BLOCK, at)) == BLOCK:
        if header == _ZERO:
            return
        name, fault = "", f"no tar header at byte {at - start}"
        if is_header(header):
            member, after, fault = _parse(file, header, at, extra, common)
            name = member.name
            if not fault and after > end:
                fault = f"says {member.size_bytes} bytes, only {max(0, end - member.offset)} are left"
        if fault:
            found = _next_header(file, at + BLOCK, end, suffix)
            yield Damage(name, fault, last=found is None)
            if found is None:
                return
            after, extra = found, _Extra()
        elif (flag := header[156:157]) in _EXTENSIONS:
            target = common if flag == b"g" else extra
            _extend(target, flag, file.read(member.size_bytes, member.offset))
        else:
            yield member
            extra = _Extra()
        at = after
    yield Damage("", f"no end-of-archive block: the archive ends at byte {min(at, end) - start}", last=True)


def is_header(block: bytes) -> bool:
    """Tell by its checksum whether a block is a tar header."""
    field = block[148:156]
    wanted, total = _octal(field), sum(block) - sum(field) + 8 * 32
    if total != wanted:  # old tars: signed bytes
        total -= 256 * sum(byte >= 128 for byte in block[:148] + block[156:])
    return bool(wanted) and total == wanted


def _octal(field: bytes) -> int | None:
    """Read an octal number, 0 where the field is empty; None where it is something else."""
    digits = field.split(b"\x00")[0].strip()
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _parse(file: PlainFile, header: bytes, at: int, extra: _Extra, common: _Extra) -> tuple[Member, int, str]:
    """Return the member, where the next header is, and what is wrong with this one (or an empty string)."""
    flag, body = header[156:157], at + BLOCK
    raw = header[:100].split(b"\x00")[0]
    if header[257:263] == b"ustar\x00" and header[345]:
        raw = header[345:500].split(b"\x00")[0] + b"/" + raw
    extends = flag in _EXTENSIONS
    name = (raw if extends else extra.name or common.name or raw).decode("utf-8", "surrogateescape")
    size = int.from_bytes(header[125:136], "big") if header[124] == 0x80 else _octal(header[124:136])
    if size is None:
        return Member(name, Kind.OTHER, body, 0), body, "its size is not a number"
    if extends and size > _MAX_META_BYTES:
        return Member(name, Kind.OTHER, body, size), body, f"an extension header of {size} bytes"
    kind = _KINDS.get(flag, Kind.OTHER)
    if not extends:
        size = size if extra.size_bytes is None else extra.size_bytes
        kind = Kind.SPARSE if extra.sparse else kind
    if kind is Kind.FILE and name.endswith("/"):
        kind = Kind.FOLDER
    if flag in _WITHOUT_BODY:
        size = 0
    if flag == b"S":
        more = header[482]
        while more and len(block := file.read(BLOCK, body)) == BLOCK:
            more, body = block[504], body + BLOCK
    return Member(name, kind, body, size), body + (size + BLOCK - 1) // BLOCK * BLOCK, ""


def _extend(extra: _Extra, flag: bytes, body: bytes) -> None:
    if flag == b"L":
        extra.name = body.split(b"\x00")[0]
    elif flag != b"K":  # the long name of a link's target
        for key, value in _pax_records(body):
            if key == b"path":
                extra.name = value.split(b"\x00")[0]
            elif key == b"size" and value.isdigit():
                extra.size_bytes = int(value[:20])  # more digits say no more: no file is so large
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


def _next_header(file: PlainFile, at: int, end: int, suffix: bytes) -> int | None:
    """Search block by block for the next ustar header whose name ends in ``suffix``."""
    while at + BLOCK <= end:
        chunk = file.read(min(_SEARCH_BYTES, end - at), at)
        if len(chunk) < BLOCK:
            return None
        for place in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[place + 257 : place + 262] == b"ustar":
                block = chunk[place : place + BLOCK]
                if block[:100].rstrip(b"\x00").endswith(suffix) and is_header(block):
                    return at + place
        at += len(chunk) // BLOCK * BLOCK
    return None
