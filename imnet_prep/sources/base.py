"""The base of every source: references in order, a description for the manifest, and notes for the user."""

import hashlib
import heapq
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from imnet_prep import catalog
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile, is_disk_full
from imnet_prep.sources.staging import Staged
from imnet_prep.types import SPLITS, ImageRef, Progress, ProgressCallback, RawImage, Reason, Rejected, name_fault

_SUFFIXES = "jpg jpeg jpe jfif png apng gif webp bmp dib tif tiff mpo heic heif avif jp2 jxl"  # the last five: rejected
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split(" "))
MAX_SOURCE_BYTES = 1 << 29  # read into memory as one image; 512 MiB is an archive or a mistake, not a photograph
_CHUNK_BYTES = 16 << 20  # hashed at a time; with smaller ones, threads wait for one another
MAX_META_BYTES = 16 << 10  # of JSON per image: captions and EXIF pass, embeddings do not
_LISTED = 10  # damaged stretches listed in a note
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_OPEN_ARCHIVES = 32  # file descriptors that a process keeps open
Found = ImageRef | Rejected
Digests = tuple[int, str, str]  # the size of a file in bytes, its MD5 and its SHA-256


class Source(ABC):
    """Images in one folder or archive.

    Attributes:
        kind: The layout, e.g. ``imagefolder`` or ``ilsvrc2012-train-tar``.
        split: The split of its images; for several splits, the one requested, or empty for all.
        name: Base name of the folder or archive, for messages.
        path: The folder or archive; for one that was staged, the copy that is read.
        staged: What was given, for one that was staged.
        classes: Names in label order for classes that the source only numbers, or empty.
        has_numbers: It numbers its classes; known once :meth:`refs` has ended.
        digits: Of the numbers that are names of its classes, or 0; known once :meth:`refs` has ended.
        salvage: Whether damaged stretches of an archive are left out; else they are errors.
        notes: Messages for the user (files ignored, val images missing); complete once :meth:`refs` has ended.
    """

    has_images = True  # False: labels alone

    def __init__(self, path: Path, kind: str, split: str = "") -> None:
        self.path, self.kind, self.split = path, kind, split
        self.name = path.name or path.resolve().name
        self.staged: Staged | None = None
        self.classes: Sequence[str] = ()
        self.has_numbers, self.digits = False, 0
        self.salvage = False
        self.notes: tuple[str, ...] = ()
        self._skipped: list[tuple[str, int, int]] = []  # damage, and the stretch left out for it
        self._walked, self._images, self._size_bytes = False, 0, 0

    @abstractmethod
    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        """Yield references sorted by split, class and name; append notes, and count ignored files by suffix."""

    def archives(self) -> Sequence[Path]:
        """Return the archives that its images are read from; none for a folder of images."""
        return () if self.path.is_dir() else (self.path,)

    @property
    def is_hashed(self) -> bool:
        """Whether :meth:`info` is to compute digests: of an archive that was not hashed when it was brought."""
        return self.staged is None and not self.path.is_dir()

    def info(self, progress: ProgressCallback = lambda state: None, hashed: Digests | None = None) -> dict[str, Any]:
        """Return the source's entry in the manifest; an archive is read once to compute its digests.

        It holds no path, and the name of no folder, so a copy elsewhere gives the same manifest.

        Args:
            progress: Called with the bytes read.
            hashed: The size and digests of the archive, if they are known.

        Returns:
            ``kind``, ``name``, ``size_bytes``, ``md5``, ``sha256``, whether it is an ``official`` archive, and the
            number of ``images`` (None for labels). A folder has no name and no digests; its size is that of its images.
            A damaged archive that was salvaged has ``skipped_bytes``, too.

        Raises:
            SourceError: It cannot be read; an official archive is damaged or has the name of another one.
        """
        name, size_bytes, md5, sha256, official, note = "", 0, "", "", False, ""
        if archive := self.staged is not None or not self.path.is_dir():
            path = self.path
            if self.staged is not None:  # hashed when it was brought
                size_bytes, md5, sha256 = self.staged.size_bytes, self.staged.md5, self.staged.sha256
                path = path.with_name(self.staged.name)
            else:
                try:
                    size_bytes, md5, sha256 = hashed or digests(path, progress)
                except OSError as error:
                    raise self._unreadable(error) from error
            name = printable(path.name)
            with self._named():
                official, note = check_official(path, size_bytes, md5, sha256)
        if not self._walked:
            deque(self.refs(), maxlen=0)
        if note and note not in self.notes:
            self.notes = (*self.notes, note)
        return {
            "kind": self.kind,
            "name": name,
            "size_bytes": size_bytes if archive else self._size_bytes,
            "md5": md5,
            "sha256": sha256,
            "official": official,
            "images": self._images if self.has_images else None,
            **({} if self.skipped_bytes is None else {"skipped_bytes": self.skipped_bytes}),
        }

    @property
    def skipped_bytes(self) -> int | None:
        """The bytes that were left out as damaged, or None; complete once :meth:`refs` has ended.

        It is 0 for an archive that is cut between two files.
        """
        return sum(size for _, _, size in self._skipped) if self._skipped else None

    def skip(self, path: Path, damage: str, at: int, size_bytes: int) -> None:
        """Leave out a damaged stretch of an archive.

        Args:
            path: The archive.
            damage: What is wrong, and where.
            at: Its first byte.
            size_bytes: Its length, as far as it is known.

        Raises:
            SourceError: The source is not to be salvaged.
        """
        if not self.salvage:
            raise SourceError(
                f"{path} is damaged: bytes {at:,} to {at + size_bytes:,} cannot be read as files ({damage})",
                remedy="download or copy it again; --salvage converts the rest and says what is skipped",
            )
        self.leave_out(path, damage, at, size_bytes)

    def leave_out(self, path: Path, why: str, at: int, size_bytes: int) -> None:
        """Count a stretch of an archive as skipped; the arguments are those of :meth:`skip`."""
        where = "" if path == self.path else f"{printable(path.name)}: "
        self._skipped.append((where + why, at, size_bytes))

    def refs(self) -> Iterator[Found]:
        """Yield every image found, sorted by split, class and name; ``Rejected`` for those that cannot be read.

        The order depends on names alone. A second image of the same name in a split is rejected. Memory holds one
        class at a time.

        Raises:
            SourceError: The source is damaged or cannot be read.
        """
        notes, ignored, images, size_bytes = list[str](), Counter[str](), 0, 0
        self._skipped = []
        try:
            with self._named():
                for found in _unique(self._walk(notes, ignored)):
                    if isinstance(found, ImageRef):
                        images += 1
                        size_bytes += found.size_bytes
                    yield found
        except OSError as error:
            if is_disk_full(error):
                raise
            raise self._unreadable(error) from error
        self._walked, self._images, self._size_bytes = True, images, size_bytes
        self.notes = (
            *notes,
            *ignored_note(ignored, self.name),
            *_skipped_note(self._skipped, self.name),
        )

    def _named(self) -> AbstractContextManager[None]:
        return nullcontext() if self.staged is None else self.staged.named()

    def _unreadable(self, error: OSError) -> SourceError:
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else self.path
        return SourceError(f"{path} cannot be read", got=error.strerror or str(error))


def digests(path: Path, progress: ProgressCallback) -> Digests:
    """Read a file once and return its size and digests, which are computed at the same time."""
    file, done, md5, sha256 = PlainFile(path), 0, hashlib.md5(usedforsecurity=False), hashlib.sha256()
    total = file.size_bytes
    with ThreadPoolExecutor(1) as thread:
        chunk = file.read(_CHUNK_BYTES, 0)
        while chunk:
            pending = thread.submit(md5.update, chunk)  # the slower of the two
            sha256.update(chunk)
            done += len(chunk)
            chunk = file.read(_CHUNK_BYTES, done)
            pending.result()
            progress(Progress(done, total, unit="bytes", bytes_done=done, note=path.name))
    return done, md5.hexdigest(), sha256.hexdigest()


def check_official(path: Path, size_bytes: int, md5: str, sha256: str) -> tuple[bool, str]:
    """Compare an archive with the official ones.

    Returns:
        Whether it is an official archive, and a note for the user (may be empty).

    Raises:
        SourceError: It has an official name and size but other bytes, or it is an official archive under another's
            name.
    """
    named, same = catalog.archives().get(path.name), catalog.archive_with_digest(md5)
    pair, mix_up = catalog.mix_up()
    if same is not None and (not same.sha256 or same.sha256 == sha256):
        if named is not None and named.file_name != same.file_name:
            swapped = {named.file_name, same.file_name} == pair
            raise SourceError(
                f"{path} is {same.file_name} ({same.what}) under another name",
                expected=f"MD5 {named.md5}",
                got=f"MD5 {md5}",
                remedy=mix_up if swapped else f"rename it to {same.file_name}",
            )
        return True, ""
    if named is None:
        return False, ""
    if size_bytes == named.size_bytes:
        raise SourceError(
            f"{path} is damaged: it has the official size, but other bytes",
            expected=f"MD5 {named.md5}",
            got=f"MD5 {md5}",
            remedy="download it again" + (f"; note that {mix_up}" if named.file_name in pair else ""),
        )
    return False, f"{path.name} is not the official archive of this name: MD5 {named.md5} expected, {md5} found"


def merge(sources: Iterable[Source]) -> Iterator[Found]:
    """Yield the images of several sources as one, sorted by split, class and name, names unique within a split.

    Where two sources hold an image of the same split and name, the first source's is kept.
    """
    return _unique(heapq.merge(*(source.refs() for source in sources), key=_sort_key))


def _sort_key(found: Found) -> tuple[int | str, ...]:
    """Return the place of an image; that of a rejection is before all, so it follows what its source yielded last."""
    return (SPLITS.index(found.split), found.class_name, found.file_name) if isinstance(found, ImageRef) else ()


def _unique(found: Iterable[Found]) -> Iterator[Found]:
    last = ("", "")
    for item in found:
        if isinstance(item, Rejected):
            yield item
        elif last == (last := (item.split, item.file_name)):
            yield Rejected(*last, Reason.DUPLICATE_NAME, f"another image of this name is in the {item.split} split")
        else:
            yield item


def is_image_name(name: str) -> bool:
    """Return whether a visible file has the suffix of an image format; its content is checked later."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem and dot) and suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether file managers create files of this name (``.DS_Store``, ``._cat.jpg``, ``__MACOSX``)."""
    return name.startswith(".") or name in {"__MACOSX", "@eaDir", "Thumbs.db"}


def make_ref(
    split: str, class_name: str, name: str, path: str, offset: int, size_bytes: int, deflated_bytes: int = 0,
    crc32: int = -1, *, url: str = "", status: int | None = None, meta: str = "",
) -> Found:  # fmt: skip
    """Return the reference to an image, or its rejection for an impossible name or size; a ``crc32`` of -1 is none."""
    file_name = f"{class_name}/{name}" if class_name else name
    if fault := name_fault(file_name):
        return Rejected(split, printable(file_name), Reason.UNREADABLE, fault)
    if size_bytes > MAX_SOURCE_BYTES:
        return Rejected(split, file_name, Reason.TOO_LARGE, f"{size_bytes} bytes, at most {MAX_SOURCE_BYTES} are read")
    known = None if crc32 < 0 else crc32
    return ImageRef(
        split, class_name, file_name, path, offset, size_bytes, url, status, "", deflated_bytes, known, meta
    )


def meta_text(values: Mapping[str, Any]) -> str:
    """Return what a source says of an image as the text of :attr:`ImageRef.meta`.

    Null values are left out, and the longest ones where all are more than :data:`MAX_META_BYTES`.

    Args:
        values: JSON values by name.
    """
    kept_values = {key: value for key, value in values.items() if value is not None}
    with suppress(ValueError, TypeError, RecursionError):
        text = _JSON.encode(kept_values)
        if text.isascii() and len(text) <= MAX_META_BYTES:  # nearly all
            return text if kept_values else ""
    items: list[tuple[int, str, str]] = []
    for key, value in values.items():
        try:
            text = _JSON.encode({key: value})
        except (ValueError, TypeError, RecursionError):  # NaN, bytes, or nested without end: not for JSON
            continue
        if value is not None:
            inner = text[1:-1].encode("utf-8", "replace")  # JSON can escape half a surrogate pair
            items.append((len(inner) + 1, key, inner.decode()))
    room, kept = MAX_META_BYTES - 1, list[tuple[str, str]]()
    for size_bytes, key, text in sorted(items):
        room -= size_bytes
        if room >= 0:
            kept.append((key, text))
    return "{" + ",".join(text for _, text in sorted(kept)) + "}" if kept else ""


def printable(name: str) -> str:
    """Escape what a line of text cannot hold."""
    try:
        text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, from JSON
        text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "(no name)"


def ignored_note(ignored: Counter[str], name: str) -> list[str]:
    """Return a note that counts the ignored files by suffix; nothing without any."""
    if not ignored:
        return []
    kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in sorted(ignored.items()))
    return [f"{name}: {ignored.total()} other files ignored ({kinds})"]


def _skipped_note(skipped: Sequence[tuple[str, int, int]], name: str) -> list[str]:
    """Return a note on the stretches that were left out; nothing without any."""
    if not skipped:
        return []
    total = sum(size for _, _, size in skipped)
    places = [f"{size:,} from byte {at:,} ({damage})" for damage, at, size in skipped[:_LISTED]]
    more = ", ..." if len(skipped) > _LISTED else ""
    count = "1 place" if len(skipped) == 1 else f"{len(skipped)} places"
    return [f"{name}: {total:,} bytes skipped in {count}: {', '.join(places)}{more}"]


def suffix_of(name: str) -> str:
    """Return the suffix as counted in notes: lower case, printable."""
    return _shown_suffix(os.path.splitext(name)[1])


@lru_cache(maxsize=256)
def _shown_suffix(suffix: str) -> str:
    return printable(suffix.lower()) if suffix else ""


_archive = lru_cache(maxsize=_OPEN_ARCHIVES)(PlainFile)  # per process


def read(ref: ImageRef) -> RawImage | Rejected:
    """Read an image's bytes.

    Args:
        ref: The image. A tar's members never begin at 0, so offset 0 is a plain file, opened and closed.

    Returns:
        The bytes, or a rejection as ``UNREADABLE`` for a file that is missing, unreadable, of another size, or has
        another checksum than its archive says.
    """
    try:
        if ref.offset:
            data = _archive(ref.path).read(ref.deflated_bytes or ref.size_bytes, ref.offset)
            if ref.deflated_bytes:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, ref.size_bytes + 1)
        else:
            data = PlainFile(ref.path).read(ref.size_bytes + 1, 0)
    except OSError as error:
        return Rejected(ref.split, ref.file_name, Reason.UNREADABLE, error.strerror or type(error).__name__)
    except zlib.error as error:
        return Rejected(ref.split, ref.file_name, Reason.UNREADABLE, f"its compressed bytes are damaged: {error}")
    if len(data) != ref.size_bytes:
        detail = f"{len(data)} bytes read, {ref.size_bytes} expected: changed since it was listed"
        return Rejected(ref.split, ref.file_name, Reason.UNREADABLE, detail)
    if ref.crc32 is not None and zlib.crc32(data) != ref.crc32:
        return Rejected(ref.split, ref.file_name, Reason.UNREADABLE, "its CRC-32 is not the one in the archive")
    return RawImage(ref, data)
