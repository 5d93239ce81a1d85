"""Walk the directory of a zip archive, and check it against the local headers and the bytes between the members.

Python's zipfile keeps an object for each member, trusts the directory, and does not notice members that it lacks. Here
a million members take little memory, and nothing in the archive goes unnoticed.

Source: PKWARE, APPNOTE.TXT 6.3.10, sections 4.3 (headers), 4.5.3 (Zip64), 4.6.9 (Unicode names), 4.4.5 (methods).
"""

import stat
import struct
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imnet_prep.errors import SourceError
from imnet_prep.files import READ_BYTES, PlainFile
from imnet_prep.sources.tar import FILE, FOLDER, Member

STORED, DEFLATED = 0, 8
_METHODS = {6: "Implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd", 99: "AES"}
_END, _LOCATOR, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_IS_LOCAL, _IS_ENTRY, _IS_END, _IS_LOCATOR, _IS_END64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\7", b"PK\6\6"
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # the value is in a Zip64 field
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 1, 8, 1 << 11  # bits of the flags
_ZIP64, _UNICODE_PATH = 1, 0x7075  # extra fields
_DOS, _UNIX = 0, 3  # systems that made a member
_DESCRIPTOR_BYTES = 24  # at most, between a member whose sizes follow it and the next
_SLACK_BYTES = 1024  # how much more than its content a small DEFLATE stream may have


class Entry(NamedTuple):
    """A member, as the directory describes it.

    Attributes:
        name: Undecodable bytes as surrogates. raw: As written.
        kind: What it is, for messages. fault: Why it cannot be read, or empty.
        method: How it is compressed. sizes_follow: Its local header need not hold its sizes.
        crc32: Of its content. size_bytes: Of its content. packed_bytes: In the archive.
        offset: Of its local header, in bytes.
    """

    name: str
    raw: bytes
    kind: str
    fault: str
    method: int
    sizes_follow: bool
    crc32: int
    size_bytes: int
    packed_bytes: int
    offset: int

    @property
    def parts(self) -> list[str]:
        """The parts of its name, as those of a member of a tar."""
        return Member(self.name, self.kind, 0, 0).parts


class Zip:
    """An open zip archive.

    Raises:
        SourceError: It is cut, one part of several, or followed by other bytes.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, PlainFile(path)
        self._start, self._end, self._count, self._before, self._is_64 = self._directory()
        self._first, self._last = array("q"), array("q")  # of each member that was placed: its bytes in the archive

    def _directory(self) -> tuple[int, int, int, int, bool]:
        """Find the directory.

        Returns:
            Its first byte, one past its last, its number of entries, the bytes before the archive that its offsets do
            not count, and whether it is Zip64.
        """
        size = self._file.size_bytes
        tail = self._file.read(_END.size + _FULL16, max(0, size - _END.size - _FULL16))
        at = len(tail)
        while (at := tail.rfind(_IS_END, 0, at)) >= 0:
            if at + _END.size <= len(tail) and _END.unpack_from(tail, at)[-1] == len(tail) - at - _END.size:
                break
        if at < 0:
            raise self._damaged("no end record: the archive is cut, or other bytes follow it")
        _, disk, first_disk, here, count, length, offset, _ = _END.unpack_from(tail, at)
        end, is_64 = size - len(tail) + at, False
        if tail[at - _LOCATOR.size : at - _LOCATOR.size + 4] == _IS_LOCATOR and at >= _LOCATOR.size:
            _, _, stated, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
            for place in (end - _LOCATOR.size - _END64.size, stated):  # the first also where bytes were put before
                record = self._file.read(_END64.size, max(0, place))
                if record[:4] == _IS_END64 and len(record) == _END64.size:
                    _, _, _, _, disk, first_disk, here, count, length, offset = _END64.unpack(record)
                    end, is_64 = place, True
                    break
            else:
                raise self._damaged("its Zip64 end record is missing")
        if disk or first_disk or here != count:
            raise SourceError(
                f"{self._path} is one part of a split zip archive",
                expected="the whole archive in one file",
                remedy="join the parts, for example with: zip -s 0 first.zip --out whole.zip",
            )
        start = end - length
        if start < offset:
            raise self._damaged(f"its directory of {length} bytes at {offset} does not end at byte {end}")
        return start, end, count, start - offset, is_64

    def entries(self) -> Iterator[Entry]:
        """Yield the members in the order of the directory.

        Raises:
            SourceError: The directory is damaged.
        """
        at, count, chunk, begin = self._start, 0, b"", self._start
        while at < self._end:
            if at + _ENTRY.size + 3 * _FULL16 > begin + len(chunk) and (not chunk or begin + len(chunk) < self._end):
                begin, chunk = at, self._file.read(min(READ_BYTES, self._end - at), at)
            place = at - begin
            if len(chunk) - place < _ENTRY.size or chunk[place : place + 4] != _IS_ENTRY:
                raise self._damaged(f"entry {count + 1} of its directory is not one")
            fields = _ENTRY.unpack_from(chunk, place)
            after = place + _ENTRY.size + sum(fields[10:13])
            if after > len(chunk):
                raise self._damaged(f"entry {count + 1} of its directory is cut")
            yield self._entry(fields, chunk[place + _ENTRY.size : after])
            at, count = begin + after, count + 1
        if count != self._count and (self._is_64 or count & _FULL16 != self._count):  # old tools count modulo 65,536
            raise self._damaged(f"its directory has {count} entries, and {self._count} by its end record")

    def _entry(self, fields: tuple[int, ...], rest: bytes) -> Entry:
        _, made, _, flags, method, _, _, crc32, packed, size, name_bytes, extra_bytes, _, disk, _, mode, offset = fields
        raw, extras = rest[:name_bytes], dict(_extras(rest[name_bytes : name_bytes + extra_bytes]))
        if _FULL32 in (size, packed, offset):
            numbers = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide) if (wide := extras.get(_ZIP64, b"")) else ())
            size, packed, offset = (next(numbers, -1) if n == _FULL32 else n for n in (size, packed, offset))
            if min(size, packed, offset) < 0:
                raise self._damaged(f"{_text(raw)!r} has no Zip64 sizes")
        name = _name(raw, flags, extras)
        if made >> 8 == _DOS:
            name = name.replace("\\", "/")  # of tools for Windows that do not know the standard
        kind = FOLDER if name.endswith("/") else FILE
        if made >> 8 == _UNIX and (form := stat.S_IFMT(mode >> 16)) not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = "link" if form == stat.S_IFLNK else "device or FIFO"
        return Entry(
            name, raw, kind, Member(name, kind, 0, 0).fault or _fault(flags, method, size, packed, disk), method,
            bool(flags & _SIZES_FOLLOW), crc32, size, packed, offset + self._before,
        )  # fmt: skip

    def place(self, entry: Entry) -> tuple[int, str]:
        """Return the first byte of a member's content, and how its local header differs from the directory, or ''."""
        head = self._file.read(_LOCAL.size + len(entry.raw), entry.offset)
        if len(head) < _LOCAL.size or head[:4] != _IS_LOCAL:
            return 0, "its local header is missing"
        _, _, _, method, _, _, crc32, packed, size, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
        if name_bytes != len(entry.raw) or head[_LOCAL.size :] != entry.raw:
            other = self._file.read(name_bytes, entry.offset + _LOCAL.size)
            return 0, f"its local header is that of {_text(other)!r}"
        sizes = [(crc32, entry.crc32), (packed, entry.packed_bytes), (size, entry.size_bytes)]
        wrong = [pair for pair in sizes if pair[0] != pair[1] and pair[0] != _FULL32]
        if method != entry.method or (wrong and not (entry.sizes_follow and all(pair[0] == 0 for pair in wrong))):
            return 0, "its local header contradicts the directory"
        start = entry.offset + _LOCAL.size + name_bytes + extra_bytes
        self._first.append(entry.offset)
        self._last.append(start + entry.packed_bytes)
        return start, "" if start + entry.packed_bytes <= self._start else "it leads out of the archive"

    def read(self, entry: Entry, limit: int) -> bytes:
        """Read a small member.

        Raises:
            SourceError: It is larger than ``limit`` bytes, or damaged.
        """
        start, fault = self.place(entry)
        data = b""
        if not (fault := entry.fault or fault) and entry.size_bytes <= limit:
            data = self._file.read(entry.packed_bytes, start)
            try:
                if entry.method == DEFLATED:
                    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit)
            except zlib.error as error:
                fault = str(error)
        if fault or zlib.crc32(data) != entry.crc32:
            raise self._damaged(f"{_text(entry.raw)} cannot be read{fault and f': {fault}'}")
        return data

    def check_whole(self) -> None:
        """Check that no member hides between those that :meth:`place` has placed, and that none overlap.

        Raises:
            SourceError: The directory lacks a member (two archives were joined, or it is damaged), or members overlap.
        """
        order = np.argsort(self._first, kind="stable")
        first, last = np.asarray(self._first)[order], np.asarray(self._last)[order]
        if (overlaps := np.flatnonzero(first[1:] < last[:-1])).size:
            raise self._damaged(f"two members overlap at byte {first[overlaps[0] + 1]}")
        begins, ends = np.append(0, last), np.append(first, self._start)
        for place in np.flatnonzero(ends - begins > _DESCRIPTOR_BYTES):
            hidden = self._search(int(begins[place]), int(ends[place]))
            if hidden is not None:
                raise self._damaged(f"a member at byte {hidden} is not in its directory")

    def _search(self, at: int, end: int) -> int | None:
        """Return the offset of the first local header between two offsets, or None."""
        while at + _LOCAL.size <= end:
            chunk = self._file.read(min(READ_BYTES, end - at), at)
            place = -1
            while (place := chunk.find(_IS_LOCAL, place + 1)) >= 0:
                header = self._file.read(_LOCAL.size, at + place)
                if len(header) == _LOCAL.size and _is_plausible(header):
                    return at + place
            at += max(1, len(chunk) - 3)
        return None

    def _damaged(self, got: str) -> SourceError:
        return SourceError(
            f"{self._path} is not a whole zip archive",
            got=got,
            remedy="download or copy it again; `zip -FF` rebuilds the directory of a damaged one",
        )


def _is_plausible(header: bytes) -> bool:
    """Return whether a local header can be one: a program that unpacks itself holds the signature as well."""
    _, _, _, method, _, _, _, _, _, name_bytes, _ = _LOCAL.unpack(header)
    return method in (STORED, DEFLATED, *_METHODS) and 0 < name_bytes < 4096


def _fault(flags: int, method: int, size: int, packed: int, disk: int) -> str:
    """Return why a member cannot be read, or an empty string."""
    if disk:
        return "it is in another part of a split archive"
    if flags & _ENCRYPTED:
        return "it is encrypted"
    if method not in (STORED, DEFLATED):
        return f"it is compressed with {_METHODS.get(method, f'method {method}')}; only stored and deflated are read"
    if method == STORED and packed != size:
        return f"stored with {packed} bytes, and has {size}"
    if method == DEFLATED and not 0 < packed <= size + size // 8 + _SLACK_BYTES:
        return f"compressed to {packed} bytes, and has {size}"
    return ""


def _extras(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the tag and content of each extra field, up to a malformed one."""
    at = 0
    while at + 4 <= len(data):
        tag, length = struct.unpack_from("<2H", data, at)
        yield tag, data[at + 4 : at + 4 + length]
        at += 4 + length


def _name(raw: bytes, flags: int, extras: dict[int, bytes]) -> str:
    """Decode a name: UTF-8 where the archive says so or where it is, else code page 437."""
    unicode = extras.get(_UNICODE_PATH, b"")
    if len(unicode) > 5 and unicode[0] == 1 and int.from_bytes(unicode[1:5], "little") == zlib.crc32(raw):
        raw, flags = unicode[5:], _UTF8
    if flags & _UTF8:
        return raw.decode("utf-8", "surrogateescape")
    return _text(raw)  # many tools write UTF-8 and do not say so


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp437")
