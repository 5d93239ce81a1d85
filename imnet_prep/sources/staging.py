"""Bring what cannot be read at random into a folder, once and in order: compressed tars, and files behind a URL.

The folder belongs to a conversion (``.work/staged``). What is whole there is used again until its source changes.
"""

import bz2
import hashlib
import json
import lzma
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from imnet_prep import remote
from imnet_prep.errors import SourceError
from imnet_prep.files import PlainFile, sync, write_atomically
from imnet_prep.remote import RemoteFile
from imnet_prep.types import Progress, ProgressCallback

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_ENDINGS = (".gz", ".bz2", ".xz")
_CHUNK_BYTES = 8 << 20
_OUT_BYTES = 4 << 20  # of one decompressed piece: a bomb must not fill the memory
_CHECK_BYTES = 64 << 20  # between two looks at the free disk
_RESERVE_BYTES = 64 << 20  # of the disk are left free
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 100  # images hardly compress: 100 to 1 is no archive of images
Place = Path | RemoteFile


@dataclass(frozen=True, slots=True)
class Staged:
    """A file as given, and the copy of its content that can be read at random.

    Attributes:
        given: The path or URL, for messages.
        name: Its base name.
        path: The copy.
        size_bytes: Size of the given file. md5, sha256: Its digests, in hex.
    """

    given: str
    name: str
    path: Path
    size_bytes: int
    md5: str
    sha256: str

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let errors name what was given, and not the copy."""
        try:
            yield
        except SourceError as error:
            texts = (error.what, error.expected, error.got, error.remedy)
            what, expected, got, remedy = (text.replace(str(self.path), self.given) for text in texts)
            raise SourceError(what, expected=expected, got=got, remedy=remedy) from error


def shown(place: Place) -> str:
    """Return a path or URL for messages."""
    return str(place) if isinstance(place, Path) else remote.shown(place.url)


def fingerprint(place: Place) -> list[Any]:
    """Return what changes when a file is replaced."""
    if isinstance(place, Path):
        state = place.stat()
        return [str(place.absolute()), state.st_size, state.st_mtime_ns, state.st_ino]
    return [remote.shown(place.url), place.size_bytes, place.version]


class Staging:
    """A folder of copies.

    Args:
        folder: Where they are; made when the first is brought.
        progress: Called with the bytes read.
    """

    def __init__(self, folder: Path, progress: ProgressCallback = lambda state: None) -> None:
        self.folder, self.progress = folder, progress
        self._used: set[str] = set()

    def bring(self, place: Place) -> Staged:
        """Bring a file, decompressed if it is compressed.

        Raises:
            SourceError: It is damaged, changes meanwhile, or does not fit on the disk.
            RemoteError: It cannot be read.
        """
        name = place.name

        def fill(folder: Path) -> dict[str, Any]:
            source = Reading(place, self.progress)
            base = name[: name.rindex(".")] if (packed := source.compression()) and name.endswith(_ENDINGS) else name
            base = base + ".tar" if packed and not base.endswith(".tar") else base  # .tgz
            pieces = _unpacked(source, packed, shown(place)) if packed else iter(source)
            write(folder / base, pieces, shown(place), source.size_bytes or 0)
            return {"file": base, **source.close()}

        folder, info = self.entry(["file", *fingerprint(place)], fill, keep=_has_version(place))
        return Staged(shown(place), name, folder / info["file"], info["size_bytes"], info["md5"], info["sha256"])

    def bring_all(self, name: str, files: Mapping[str, RemoteFile]) -> Path:
        """Bring the files of a remote folder as they are, by name, and return the folder of that name with them."""

        def fill(folder: Path) -> dict[str, Any]:
            (folder / name).mkdir()
            for base, file in files.items():
                pieces = iter(Reading(file, self.progress))
                write(folder / name / base, pieces, shown(file), file.size_bytes or 0)
            return {}

        key = ["folder", *(fingerprint(file) for file in files.values())]
        folder, _ = self.entry(key, fill, keep=all(map(_has_version, files.values())))
        return folder / name

    def entry(
        self, key: list[Any], fill: Callable[[Path], dict[str, Any]], *, keep: bool = True
    ) -> tuple[Path, dict[str, Any]]:
        """Return a folder and what was noted of it; filled unless a whole one with this key is there.

        Args:
            key: JSON values that change with the content.
            fill: Writes files into an empty folder, and returns what is to be noted, as JSON.
            keep: Use it again in a later run.
        """
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        folder, note = self.folder / name, self.folder / f"{name}.json"
        if name not in self._used and (not keep or not _is_whole(folder, note)):
            note.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                info = fill(folder)
                for item in (*folder.rglob("*"), folder):
                    sync(item)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            write_atomically(note, json.dumps({"sizes": _sizes(folder), "info": info}).encode())
        self._used.add(name)
        return folder, dict(json.loads(note.read_bytes())["info"])

    def forget_others(self) -> None:
        """Delete the copies that this run did not ask for."""
        for item in self.folder.glob("*"):
            if item.name.removesuffix(".json") not in self._used:
                shutil.rmtree(item) if item.is_dir() else item.unlink()


def _has_version(place: Place) -> bool:
    return isinstance(place, Path) or bool(place.version)


def _is_whole(folder: Path, note: Path) -> bool:
    try:
        return bool(json.loads(note.read_bytes())["sizes"] == _sizes(folder))
    except (OSError, ValueError, KeyError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


class Reading:
    """A file read once, in order, while its digests are computed in other threads.

    Args:
        place: The file.
        progress: Called with the bytes read.
        with_md5: Compute MD5 too, by which ImageNet's archives are known.
    """

    def __init__(self, place: Place, progress: ProgressCallback, *, with_md5: bool = True) -> None:
        self._place, self._progress = place, progress
        self._before = fingerprint(place) if isinstance(place, Path) else []
        self.size_bytes = place.stat().st_size if isinstance(place, Path) else place.size_bytes
        self._parts = _parts(place) if isinstance(place, Path) else remote.read(place)
        self._first = next(self._parts, b"")
        self._sha256, self._md5, self._done = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        self._digests = (self._sha256, self._md5) if with_md5 else (self._sha256,)

    def compression(self) -> str:
        """Return how the file is compressed, or an empty string."""
        return next((name for magic, name in COMPRESSED.items() if self._first.startswith(magic)), "")

    def __iter__(self) -> Iterator[bytes]:
        with ThreadPoolExecutor(len(self._digests)) as threads:
            part = self._first
            while part:
                pending = [threads.submit(digest.update, part) for digest in self._digests]
                yield part
                for hashed in pending:
                    hashed.result()
                self._done += len(part)
                note = self._place.name
                self._progress(Progress(self._done, self.size_bytes, "bytes", self._done, note=note))
                part = next(self._parts, b"")

    def close(self) -> dict[str, Any]:
        """Check that the file did not change meanwhile, and return its size and digests (MD5 empty if not computed)."""
        self.check()
        md5 = self._md5.hexdigest() if self._md5 in self._digests else ""
        return {"size_bytes": self._done, "md5": md5, "sha256": self._sha256.hexdigest()}

    def check(self) -> None:
        """Check that the file did not change since it was opened; a remote one is checked when its end is read.

        Raises:
            SourceError: It did.
        """
        if isinstance(self._place, Path) and fingerprint(self._place) != self._before:
            raise SourceError(f"{self._place}: changed while it was read", remedy="run the same command again")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Read the file to its end in another thread, for its digests, while the block reads it in its own way."""
        stop = Event()

        def read() -> None:
            for _ in self:
                if stop.is_set():
                    return

        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(read)
            try:
                yield
            except BaseException:
                stop.set()
                raise
            reading.result()


def _parts(path: Path) -> Iterator[bytes]:
    file, done = PlainFile(path), 0
    while part := file.read(_CHUNK_BYTES, done):
        done += len(part)
        yield part


def write(path: Path, pieces: Iterator[bytes], given: str, least_bytes: int) -> None:
    """Write a file piece by piece while there is room for it.

    Args:
        path: The file.
        pieces: Its bytes.
        given: What they are from, for messages.
        least_bytes: Its size at least.

    Raises:
        SourceError: It does not fit on the disk.
    """
    check_room(path.parent, least_bytes, given)
    done = checked = 0
    with path.open("xb") as file, ThreadPoolExecutor(1) as thread:
        flushed = thread.submit(sync, path)
        for piece in pieces:
            file.write(piece)
            done += len(piece)
            if done - checked >= _CHECK_BYTES:
                check_room(path.parent, 0, given)
                checked = done
                flushed.result()
                flushed = thread.submit(sync, path)  # so that little is left to do at the end
        flushed.result()


def check_room(folder: Path, size_bytes: int, given: str) -> None:
    """Check that so many bytes fit on the disk of a folder.

    Raises:
        SourceError: They do not.
    """
    free = shutil.disk_usage(folder).free
    if free < size_bytes + _RESERVE_BYTES:
        raise SourceError(
            f"{given}: does not fit on the disk of {folder}, where it is brought to be read at random",
            expected=f"{size_bytes + _RESERVE_BYTES:,} bytes free" if size_bytes else "room for its content",
            got=f"{free:,} bytes",
            remedy="free some, choose another --out, or unpack it yourself and give the result",
        )


# --- decompression ---------------------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    """What the three formats have in common."""

    @property
    def eof(self) -> bool:
        """The stream has ended, its checksum right."""

    @property
    def unused_data(self) -> bytes:
        """What follows the stream."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return the next piece."""


class _Gzip:
    """zlib's decompressor, which keeps no input of its own, with the interface of the two others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


_KINDS: dict[str, Callable[[], _Decompressor]] = {
    "gzip": _Gzip,
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


def _unpacked(source: Iterable[bytes], kind: str, given: str) -> Iterator[bytes]:
    """Yield the content of a compressed file: that of all its streams, as several may follow each other.

    Raises:
        SourceError: It is damaged, cut, followed by other bytes, or unpacks to more than images can.
    """
    stream, streams, read, done = None, 0, 0, 0
    try:
        for part in source:
            data, read = part, read + len(part)
            while data := data if stream or not streams else data.lstrip(b"\0"):  # zeros may follow, to fill a tape
                stream = stream or _KINDS[kind]()
                piece = stream.decompress(data, _OUT_BYTES)
                while piece:
                    done += len(piece)
                    if done > max(_BOMB_BYTES, read * _BOMB_RATIO):
                        raise SourceError(
                            f"{given} is a decompression bomb: {read:,} bytes unpack to more than {done:,}",
                            expected="an archive of images, which hardly compress",
                            remedy="unpack it yourself if you trust it",
                        )
                    yield piece
                    piece = b"" if stream.eof else stream.decompress(b"", _OUT_BYTES)
                data = b""
                if stream.eof:
                    data, stream, streams = stream.unused_data, None, streams + 1
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise _damaged(given, kind, str(error)) from error
    except OSError as error:
        raise error if error.errno else _damaged(given, kind, str(error)) from error  # bz2's errors have no number
    if stream or not streams:
        raise _damaged(given, kind, f"it ends after {read:,} bytes, within its stream")


def _damaged(given: str, kind: str, got: str) -> SourceError:
    return SourceError(
        f"{given} is damaged or cut", expected=f"a whole {kind} stream", got=got, remedy="download or copy it again"
    )
