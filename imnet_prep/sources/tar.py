"""Walk a tar by its headers. Nothing is unpacked, and bodies are skipped.

Python's tarfile keeps every member in memory, trusts the headers and ends at the first that it cannot read. Here a
million members take no memory, a tar inside a tar is a byte range, and what is no member is reported to the byte.

Source: POSIX.1-2001 pax interchange format; GNU tar manual, "Basic Tar Format" and "Storing Sparse Files".
"""

from collections.abc import Iterator
from typing import NamedTuple

from imnet_prep.files import PlainFile

BLOCK = 512
_RECORD = 20 * BLOCK  # the usual one
_RECORDS = (*range(BLOCK, _RECORD + 1, BLOCK), *(BLOCK << power for power in range(5, 14)))  # tar -b 1 to 8192
_LOOSE_ZEROS = 64 * BLOCK  # some writers and tapes add them; less than a usual photograph
_MAX_META_BYTES = 1 << 20  # a long name or pax header beyond a MiB is an attack
_MAX_DIGITS = 19  # of a size: 63 bits
_OCTAL_LIMIT = 8 << 30  # what 11 octal digits hold
_SEARCH_BYTES = 1 << 20
_ZERO = bytes(BLOCK)
_DIGITS = frozenset(b"01234567 \x00")  # of a checksum
_BEYOND_ASCII = bytes(range(128, 256))
_WITHOUT_BODY = b"123456"  # links, devices, folders, FIFOs: their size field is to be ignored
_EXTENSIONS = b"LKxgX"  # headers that describe the next member, or (g) all that follow
FILE, FOLDER, _LINK, _DEVICE, _SPARSE = "file", "folder", "link", "device or FIFO", "sparse file"
_KINDS = {
    b"0": FILE, b"\x00": FILE, b"7": FILE, b"1": _LINK, b"2": _LINK, b"5": FOLDER, b"3": _DEVICE, b"4": _DEVICE,
    b"6": _DEVICE, b"S": _SPARSE, b"D": FOLDER, b"V": FOLDER,  # GNU's dumped folder, and the label of a volume
}  # fmt: skip


class Member(NamedTuple):
    """A member of a tar, or a damaged stretch of it.

    Attributes:
        name: As written, undecodable bytes as surrogates; empty for damage that concerns no known member.
        kind: What it is, for messages.
        offset: First byte of its body in the outermost file; that of a damaged stretch where it begins.
        size_bytes: Size of its body, or of the stretch up to the next header.
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


_Extra = dict[str, bytes]  # what extension headers say of the next member: name, long, size, sparse; fault if damaged


def walk(
    file: PlainFile, start: int = 0, end: int | None = None, *, suffix: bytes = b"", search_bytes: int | None = None
) -> Iterator[Member]:
    """Yield the members between two offsets and the damaged stretches, in their order.

    An archive that follows another after its zero blocks (``cat a.tar b.tar``) is read on. Other bytes there, and more
    zeros than the padding of a tar, are damage: a member may have been in their place.

    Args:
        file: The outermost file.
        start: First byte of the tar.
        end: One past its last byte; None for the end of the file.
        suffix: After damage, continue at the next header whose name ends so. In a tar of tars this is ``.tar``, so
            that the header of an inner tar is not mistaken for one of the outer tar.
        search_bytes: How far to look for that header; None for the whole tar.
    """
    at = first = start
    extra, common = _Extra(), _Extra()
    extended = lost = False  # the last member had an extension header; this one's may be in a damaged stretch
    end = file.size_bytes if end is None else end
    while at + BLOCK <= end and len(header := file.read(BLOCK, at)) == BLOCK:
        name, fault, resume = "", "", at + BLOCK
        if header == _ZERO:
            resume = _zeros_end(file, at, end)
            is_loose = (start, end) == (0, file.size_bytes) and end - at <= _LOOSE_ZEROS and end % BLOCK == 0
            if resume == end and not extra and at > first and (is_loose or _is_padding(end - at, end - first)):
                return
            if not extra and at > first and _is_joint(file, at, resume, first, end):
                at = first = resume
                common = _Extra()
                continue
            more = ", and no member" if at == first else ", more than end an archive" if resume == end else ""
            fault = f"{resume - at} zero bytes{more}"
        elif not is_header(header):
            fault = "no tar header"
        else:
            member, after, fault = _parse(file, header, at, extra, common)
            if not fault and member.offset + member.size_bytes > end:
                fault = f"says {member.size_bytes} bytes, only {max(0, end - member.offset)} are left"
            if (flag := header[156:157]) not in _EXTENSIONS:
                name = member.name
            elif not fault:
                update = _extension(flag, file.read(member.size_bytes, member.offset))
                fault = update.get("fault", b"").decode()
                (common if flag == b"g" else extra).update(update)
                if not fault:
                    at = after
                    continue
            if not fault and lost and not extra and (extended or header[99]):
                # Its name may be cut: continue after it, so that it costs itself alone.
                yield Member(name, FILE, at, after - at, "its long name is lost")
                at, lost = after, False
                continue
        if fault:
            found = _next_header(file, resume, end, suffix, search_bytes)
            stop = found or min(end, resume + (end if search_bytes is None else search_bytes))
            yield Member(name, FILE, at, stop - at, fault, last=found is None)
            if found is None:
                return
            at, extra, extended, lost = found, _Extra(), extended or "fault" in extra, True
            continue
        yield member
        extended, lost = bool(extra), False
        at = after
        if extra:
            extra = _Extra()
    at = min(at, end)
    yield Member("", FILE, at, end - at, f"no end-of-archive block: the archive ends at byte {end - start}", last=True)


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


def _is_padding(zeros: int, size_bytes: int) -> bool:
    """Return whether an archive of a size may end in so many zeros: two blocks, and more to the end of a record."""
    return any(size_bytes % record == 0 and zeros < record + 2 * BLOCK for record in _RECORDS)


def loose_zeros(file: PlainFile, last: Member) -> int:
    """Return the zero bytes after the last member if they are accepted, though more than tar writes, or 0."""
    zeros = file.size_bytes - last.offset - (last.size_bytes + BLOCK - 1) // BLOCK * BLOCK
    return zeros if 0 < zeros <= _LOOSE_ZEROS and not _is_padding(zeros, file.size_bytes) else 0


def _is_joint(file: PlainFile, at: int, after: int, first: int, end: int) -> bool:
    """Return whether zeros end one archive, and another follows: a whole number of records, and a header."""
    if after >= end or (after - first) % _RECORD or not 2 * BLOCK <= after - at < _RECORD + 2 * BLOCK:
        return False
    follows = file.read(BLOCK, after)
    return len(follows) == BLOCK and is_header(follows)


def _zeros_end(file: PlainFile, at: int, end: int) -> int:
    """Return the offset of the first block that has another byte than zero, or the end."""
    while at < end:
        chunk = file.read(min(_SEARCH_BYTES, end - at), at)
        if not chunk:
            break
        if rest := chunk.lstrip(b"\x00"):
            return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
        at += len(chunk)
    return end


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
    kind, fault = _KINDS.get(flag, "member of unknown type"), ""
    if extra and not extends:
        size, kind, fault = _extended(raw, size, kind, extra)
    if kind == FILE and name.endswith("/"):
        kind = FOLDER
    if flag in _WITHOUT_BODY:
        size = 0
    if flag == b"S":
        more = header[482]
        while more and len(block := file.read(BLOCK, body)) == BLOCK:
            more, body = block[504], body + BLOCK
    return Member(name, kind, body, size), body + (size + BLOCK - 1) // BLOCK * BLOCK, fault


def _extended(raw: bytes, size: int, kind: str, extra: _Extra) -> tuple[int, str, str]:
    """Return the size and kind of a member with extension headers, and whether they contradict its own header.

    No checksum covers them, so they are compared with what the header has of the same.
    """
    long, fault = extra.get("long", b""), ""
    if long and not _ascii(long).startswith(_ascii(raw)):
        fault = "its long name does not begin as its header says"
    if (digits := extra.get("size")) is not None:
        if size not in (0, int(digits)) and int(digits) < _OCTAL_LIMIT and "sparse" not in extra:
            fault = f"{size} bytes by its header, {int(digits)} by its extended header"
        size = int(digits)
    return size, _SPARSE if "sparse" in extra else kind, fault


def _ascii(name: bytes) -> bytes:
    return name.translate(None, _BEYOND_ASCII)  # writers replace or leave out the rest in a header


def _extension(flag: bytes, body: bytes) -> _Extra:
    """Return what an extension header says; ``fault`` if it is damaged."""
    if flag == b"K":  # the long name of a link's target
        return {}
    if flag == b"L":
        name, _, rest = body.partition(b"\x00")
        return {"name": name, "long": name} if name and not rest.strip(b"\x00") else {"fault": b"a damaged long name"}
    extra, at = _Extra(), 0
    while at < len(body):  # records of "<length> <key>=<value>\n"
        head, space, _ = body[at : at + 20].partition(b" ")
        size = int(head) if space and head.isdigit() else 0
        key, equals, value = body[at + len(head) + 1 : at + size - 1].partition(b"=")
        if not equals or at + size > len(body) or body[at + size - 1 : at + size] != b"\n":
            return extra | {"fault": b"a damaged extended header"}
        if key == b"path":
            if b"\x00" in value:
                return extra | {"fault": b"a null byte in the name of an extended header"}
            extra.setdefault("name", value)
        elif key == b"GNU.sparse.name":
            extra["name"] = value
        elif key == b"size":
            if not value.isdigit() or len(value) > _MAX_DIGITS:
                return extra | {"fault": f"a size of {len(value)} characters in an extended header".encode()}
            extra["size"] = value
        elif key.startswith(b"GNU.sparse."):
            extra["sparse"] = value
        at += size
    return extra


def _next_header(file: PlainFile, at: int, end: int, suffix: bytes, search_bytes: int | None) -> int | None:
    """Return the offset of the next header whose name ends in ``suffix``, or None."""
    end = end if search_bytes is None else min(end, at + search_bytes)
    while at + BLOCK <= end:
        chunk = file.read(min(_SEARCH_BYTES, end - at), at)
        if len(chunk) < BLOCK:
            return None
        for place in range(0, len(chunk) - BLOCK + 1, BLOCK):
            # A checksum ends in a blank or a null byte, mostly both: few other blocks do.
            if chunk[place + 154] in _DIGITS and chunk[place + 155] in _DIGITS and chunk[place + 148] in _DIGITS:
                block = chunk[place : place + BLOCK]
                if block[:100].rstrip(b"\x00").endswith(suffix) and is_header(block):
                    return at + place
        at += len(chunk) // BLOCK * BLOCK
    return None
