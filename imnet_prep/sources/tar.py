"""Walk a tar by its headers. Nothing is unpacked, and bodies are skipped.

Python's tarfile keeps every member in memory and trusts the headers. Here a million members take no memory, a tar
inside a tar is a byte range, and a false header is reported.

Source: POSIX.1-2001 pax interchange format; GNU tar manual, "Basic Tar Format"; base-256 numbers as in GNU tar.
"""

from collections.abc import Iterator
from typing import NamedTuple

from imnet_prep.files import PlainFile

BLOCK = 512
_MAX_META_BYTES = 1 << 20  # a long name or pax header beyond a MiB is an attack
_SEARCH_BYTES = 1 << 20
_ZERO = bytes(BLOCK)
_WITHOUT_BODY = b"123456"  # links, devices, folders, FIFOs: their size field is to be ignored
_EXTENSIONS = b"LKxgX"  # headers that describe the next member, or (g) all that follow
FILE, FOLDER, _LINK, _DEVICE, _SPARSE = "file", "folder", "link", "device or FIFO", "sparse file"
_KINDS = {
    b"0": FILE, b"\x00": FILE, b"7": FILE, b"1": _LINK, b"2": _LINK, b"5": FOLDER, b"3": _DEVICE, b"4": _DEVICE,
    b"6": _DEVICE, b"S": _SPARSE,
}  # fmt: skip


class Member(NamedTuple):
    """A member of a tar, or a place where the tar is damaged.

    Attributes:
        name: As written, undecodable bytes as surrogates; empty for damage that concerns no member.
        kind: What it is, for messages.
        offset: First byte of its body in the outermost file.
        size_bytes: Size of its body.
        damage: What is wrong with the tar here, or empty.
        last: Nothing after this damage could be read.
    """

    name: str
    kind: str
    offset: int
    size_bytes: int
    damage: str = ""
    last: bool = False

    @property
    def parts(self) -> list[str]:
        """The parts of its name, without ``.`` and empty ones; at least one, which may be empty."""
        return [part for part in self.name.split("/") if part not in ("", ".")] or [""]

    @property
    def fault(self) -> str:
        """Why it cannot be an image, or empty. No file is ever written under its name, but a hostile one is refused."""
        if self.damage or self.kind != FILE:
            return self.damage or f"a {self.kind} in the archive, not a file"
        if self.name.startswith("/"):
            return "its name is an absolute path"
        return "its name leads out of the archive (..)" if ".." in self.name.split("/") else ""


_Extra = dict[str, bytes]  # what extension headers say about the next member: its name, size, and whether it is sparse


def walk(file: PlainFile, start: int = 0, end: int | None = None, *, suffix: bytes = b"") -> Iterator[Member]:
    """Yield the members between two offsets and the damage, in their order.

    Args:
        file: The outermost file.
        start: First byte of the tar.
        end: One past its last byte; None for the end of the file.
        suffix: After damage, continue at the next header whose name ends so. In a tar of tars this is ``.tar``, so
            that the header of an inner tar is not mistaken for one of the outer tar.
    """
    at, extra, common = start, _Extra(), _Extra()
    end = file.size_bytes if end is None else end
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
            yield Member(name, FILE, at, 0, fault, last=found is None)
            if found is None:
                return
            after, extra = found, _Extra()
        elif (flag := header[156:157]) in _EXTENSIONS:
            (common if flag == b"g" else extra).update(_extension(flag, file.read(member.size_bytes, member.offset)))
        else:
            yield member
            extra = _Extra()
        at = after
    yield Member(
        "", FILE, at, 0, f"no end-of-archive block: the archive ends at byte {min(at, end) - start}", last=True
    )


def is_header(block: bytes) -> bool:
    """Return whether a block has the checksum of a tar header."""
    field = block[148:156]
    wanted, total = _octal(field), sum(block) - sum(field) + 8 * 32
    if total != wanted:  # old tars: signed bytes
        total -= 256 * sum(byte >= 128 for byte in block[:148] + block[156:])
    return bool(wanted) and total == wanted


def _octal(field: bytes) -> int | None:
    """Return an octal number, 0 for an empty field, or None for anything else."""
    digits = field.split(b"\x00")[0].strip()
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


def _parse(file: PlainFile, header: bytes, at: int, extra: _Extra, common: _Extra) -> tuple[Member, int, str]:
    """Return the member, the offset of the next header, and what is wrong with this one (or an empty string)."""
    flag, body = header[156:157], at + BLOCK
    raw = header[:100].split(b"\x00")[0]
    if header[257:263] == b"ustar\x00" and header[345]:
        raw = header[345:500].split(b"\x00")[0] + b"/" + raw
    extends = flag in _EXTENSIONS
    name = (raw if extends else extra.get("name") or common.get("name") or raw).decode("utf-8", "surrogateescape")
    size = int.from_bytes(header[125:136], "big") if header[124] == 0x80 else _octal(header[124:136])
    if size is None:
        return Member(name, FILE, body, 0), body, "its size is not a number"
    if extends and size > _MAX_META_BYTES:
        return Member(name, FILE, body, size), body, f"an extension header of {size} bytes"
    kind = _KINDS.get(flag, "member of unknown type")
    if not extends:
        size = int(extra.get("size", size))
        kind = _SPARSE if "sparse" in extra else kind
    if kind == FILE and name.endswith("/"):
        kind = FOLDER
    if flag in _WITHOUT_BODY:
        size = 0
    if flag == b"S":
        more = header[482]
        while more and len(block := file.read(BLOCK, body)) == BLOCK:
            more, body = block[504], body + BLOCK
    return Member(name, kind, body, size), body + (size + BLOCK - 1) // BLOCK * BLOCK, ""


def _extension(flag: bytes, body: bytes) -> _Extra:
    """Return what an extension header says."""
    if flag in b"LK":
        return {"name": body.split(b"\x00")[0]} if flag == b"L" else {}  # K: the long name of a link's target
    extra: _Extra = {}
    for key, value in _pax_records(body):
        if key == b"path":
            extra["name"] = value.split(b"\x00")[0]
        elif key == b"size" and value.isdigit():
            extra["size"] = value[:20]  # no file needs more digits
        elif key.startswith(b"GNU.sparse."):
            extra["sparse"] = value
    return extra


def _pax_records(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the key and value of each ``"<length> <key>=<value>\\n"`` record; stop at the first malformed one."""
    at = 0
    while at < len(body):
        head, space, _ = body[at : at + 20].partition(b" ")
        if not space or not head.isdigit() or int(head) <= len(head) + 1 or at + int(head) > len(body):
            return
        key, equals, value = body[at + len(head) + 1 : at + int(head) - 1].partition(b"=")
        if not equals:
            return
        yield key, value
        at += int(head)


def _next_header(file: PlainFile, at: int, end: int, suffix: bytes) -> int | None:
    """Return the offset of the next ustar header whose name ends in ``suffix``, or None."""
    while at + BLOCK <= end:
        chunk = file.read(min(_SEARCH_BYTES, end - at), at)
        if len(chunk) < BLOCK:
            return None
        for place in range(0, len(chunk) - BLOCK + 1, BLOCK):
            block = chunk[place : place + BLOCK]
            if block[257:262] == b"ustar" and block[:100].rstrip(b"\x00").endswith(suffix) and is_header(block):
                return at + place
        at += len(chunk) // BLOCK * BLOCK
    return None
