"""A bounded folder of files that were brought from elsewhere, shared by the processes of a machine.

A process may be killed at any moment: a file gets its final name only after its SHA-256 was compared, and the system
ends the locks of a dead process, so others remove what it had begun. Everything is in ``imnet-prep-cache`` below the
folder that the user names; nothing beside that is counted or deleted.
"""

import hashlib
import logging
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from imnet_prep import remote
from imnet_prep.errors import IntegrityError, RecordsError
from imnet_prep.files import exclusive_lock, file_digest, rename

LOG = logging.getLogger(__name__)
FOLDER, USERS = "imnet-prep-cache", ".users"
LOCK, PART, PINNED = ".lock", ".part", ".pinned"
SHARE = 0.9  # of the disk's free space, if the user sets no limit: the disk must not be full for others
FETCHES = 2  # of a file whose bytes are not those of the manifest
POLL_S = 0.02  # between looks at a lock that another holds
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to bring.

    Attributes:
        name: Its path in the cache.
        url: Where it is.
        size_bytes: Its size.
        sha256: Its SHA-256, in hex.
    """

    name: str
    url: str = field(repr=False)
    size_bytes: int
    sha256: str


@dataclass(slots=True)
class _Entry:
    """Files that belong together: they come and go together.

    Attributes:
        paths: The files, begun ones too.
        size_bytes: Their size; a begun file has its final size from the beginning.
        used: When it was last brought or used up, in ns; 0 if it is not whole.
    """

    paths: list[Path] = field(default_factory=list)
    size_bytes: int = 0
    used: int = 0


class Cache:
    """The cache as one user of it sees it; several processes, and several users in a process, share the folder.

    Args:
        folder: Where the cache is, or is to be.
        limit_bytes: Most bytes that it may hold; by default nine tenths of what is free on its disk.

    Raises:
        RecordsError: The folder cannot be written, or the limit is no positive number.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes <= 0:
            raise RecordsError("the cache's limit", expected="more than 0 bytes", got=str(limit_bytes))
        self.folder = folder / FOLDER
        self._stopped = threading.Event()
        self._compared: set[str] = set()
        self._stack = ExitStack()
        try:
            users = self.folder / USERS
            users.mkdir(parents=True, exist_ok=True)
            user = users / uuid.uuid4().hex
            self._lock(self._stack, user.with_suffix(LOCK))
            self._pinned = user.with_suffix(PINNED)
            self._stack.callback(self._pinned.unlink, missing_ok=True)
            held = sum(entry.size_bytes for entry in self._entries().values())
            self.limit_bytes = limit_bytes or int(SHARE * (shutil.disk_usage(folder).free + held))
        except OSError as error:
            self._stack.close()
            raise RecordsError(f"{folder}: cannot be used as a cache", got=error.strerror or str(error)) from error

    def stop(self) -> None:
        """Let nothing wait or be brought any longer."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and let go of what is pinned."""
        self.stop()
        self._stack.close()

    def pin(self, names: Iterable[str]) -> None:
        """Tell all users what this one will soon read: nothing that is brought ahead of use takes the place of that.

        Args:
            names: Of the first file of each entry; what was told before is forgotten.
        """
        with suppress(OSError):  # a full disk: it is only advice
            part = _beside(self._pinned, PART)
            part.write_text("\n".join(names), encoding="utf-8")
            rename(part, self._pinned)

    def bring(self, files: Sequence[Wanted], use: Callable[[], _T]) -> _T:
        """Bring files that belong together if they are not there, and use them while nobody may remove them.

        Files that are there are compared with their SHA-256 at their first use by this user.

        Args:
            files: The first one names the entry; the others are named as it is, with a suffix.
            use: Called when all of them are there.

        Returns:
            What ``use`` returned.

        Raises:
            RemoteError: A file cannot be read.
            IntegrityError: A file is not what the manifest says, also when it was fetched again.
            RecordsError: The cache or its disk is too small, its folder cannot be written, or :meth:`stop` was called.
        """
        found = self._bring(files, use, ahead=False)
        assert found is not None
        return found

    def bring_ahead(self, files: Sequence[Wanted], use: Callable[[], _T]) -> _T | None:
        """Do the same ahead of use, or return None if there is no room beside what somebody has pinned."""
        return self._bring(files, use, ahead=True)

    def _bring(self, files: Sequence[Wanted], use: Callable[[], _T], *, ahead: bool) -> _T | None:
        first = self.folder / files[0].name
        try:
            with ExitStack() as stack:
                first.parent.mkdir(parents=True, exist_ok=True)
                self._lock(stack, _beside(first, LOCK))
                if not self._is_whole(files) and not self._fetch_all(files, ahead=ahead):
                    return None
                self._compared.add(files[0].name)
                first.touch()
                return use()
        except OSError as error:
            raise RecordsError(
                f"{self.folder}: cannot hold {files[0].name}",
                expected=f"{sum(file.size_bytes for file in files)} bytes of room",
                got=error.strerror or str(error),
                remedy="make room on that disk, give the cache a lower limit (--cache-bytes), or choose another folder",
            ) from error

    def _is_whole(self, files: Sequence[Wanted]) -> bool:
        """Return whether files are there; at their first use here, also compare their bytes."""
        paths = [self.folder / file.name for file in files]
        try:
            if any(path.stat().st_size != file.size_bytes for path, file in zip(paths, files, strict=True)):
                return False
        except FileNotFoundError:
            return False
        if files[0].name in self._compared:
            return True
        for path, file in zip(paths, files, strict=True):
            if file_digest(path) != file.sha256:
                LOG.warning("%s: is damaged; it is fetched again", path)
                return False
        return True

    def _fetch_all(self, files: Sequence[Wanted], *, ahead: bool) -> bool:
        """Make room for files and bring them; return whether there was room. The caller holds their lock."""
        if not self._make_room(files, ahead=ahead):
            return False
        try:
            for file in files:
                self._fetch(file)
            for file in reversed(files):  # where the first is there, all are
                rename(_beside(self.folder / file.name, PART), self.folder / file.name)
        except BaseException:
            for file in files:
                _beside(self.folder / file.name, PART).unlink(missing_ok=True)
            raise
        return True

    def _fetch(self, file: Wanted) -> None:
        """Bring a file whose part is there in its final size, and compare it."""
        for _ in range(FETCHES):
            got = self._fetch_once(file)
            if not got:
                return
            LOG.warning("%s: expected %d bytes of SHA-256 %s, got %s", *_said(file), got)
        url, size, digest = _said(file)
        raise IntegrityError(
            f"{url}: is not what its manifest says",
            expected=f"{size} bytes of SHA-256 {digest}",
            got=f"{got}, {FETCHES} times",
            remedy="upload the file again, or all the records with manifest.json last",
        )

    def _fetch_once(self, file: Wanted) -> str:
        """Write a file into its part; return what is wrong with it, or an empty string."""
        found = remote.look_up(file.url, self._pause)
        if found is None or found.size_bytes not in (None, file.size_bytes):
            return "a folder" if found is None else f"{found.size_bytes} bytes"
        digest, done = hashlib.sha256(), 0
        with _beside(self.folder / file.name, PART).open("r+b") as part:
            for data in remote.read(found, self._pause):
                self._check_stopped()
                done += len(data)
                if done > file.size_bytes:
                    return "more bytes"
                part.write(data)
                digest.update(data)
        if done == file.size_bytes and digest.hexdigest() == file.sha256:
            return ""
        return f"{done} bytes of SHA-256 {digest.hexdigest()[:12]}"

    # --- room --------------------------------------------------------------------------------------------------------

    def _make_room(self, files: Sequence[Wanted], *, ahead: bool) -> bool:
        """Remove what was used longest ago until files fit, and take the room; wait where others bring what is there.

        Returns:
            Whether there is room; without ``ahead`` always.
        """
        size = sum(file.size_bytes for file in files)
        if size > self.limit_bytes:
            raise RecordsError(
                f"{self.folder}: the cache is too small for {files[0].name}",
                expected=f"at least {size} bytes",
                got=str(self.limit_bytes),
                remedy="give it more (--cache-bytes)",
            )
        own = _entry_name(self.folder / files[0].name)
        while True:
            with ExitStack() as stack:
                self._lock(stack, self.folder / LOCK)
                if self._evict(self.limit_bytes - size, own, ahead=ahead):
                    for file in files:
                        with _beside(self.folder / file.name, PART).open("wb") as part:
                            part.truncate(file.size_bytes)  # so that all users count it
                    return True
            if ahead:
                return False
            self._pause()

    def _evict(self, most: int, own: Path, *, ahead: bool) -> bool:
        """Remove entries until at most so many bytes are left; return whether that was possible.

        Args:
            most: Bytes that may be left.
            own: The entry whose lock the caller holds; it is not whole and goes first.
            ahead: Leave what is pinned.
        """
        entries, pinned = self._entries(), self._all_pinned()
        held = sum(entry.size_bytes for entry in entries.values())

        def turn(name: Path) -> tuple[bool, bool, int]:
            return name != own, name in pinned, entries[name].used

        for name in sorted(entries, key=turn):
            if (held <= most and name != own) or (ahead and name in pinned and name != own):
                break
            with suppress(BlockingIOError), ExitStack() as stack:  # somebody brings it, or begins to use it
                if name != own:
                    stack.enter_context(exclusive_lock(_beside(name, LOCK)))
                for path in entries[name].paths:
                    path.unlink(missing_ok=True)
                held -= entries[name].size_bytes
        return held <= most

    def _entries(self) -> dict[Path, _Entry]:
        """Return what is in the cache, by the path of the first file."""
        entries: dict[Path, _Entry] = {}
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # removed meanwhile
                if USERS in path.parts or path.name.endswith(LOCK) or not path.is_file():
                    continue
                stat, name = path.stat(), _entry_name(path)
                entry = entries.setdefault(name, _Entry())
                entry.paths.append(path)
                entry.size_bytes += stat.st_size
                if path == name:
                    entry.used = stat.st_mtime_ns
        return entries

    def _all_pinned(self) -> set[Path]:
        """Return the entries that living users have pinned; forget the dead ones."""
        names: set[Path] = set()
        for lock in (self.folder / USERS).glob(f"*{LOCK}"):
            pinned = lock.with_suffix(PINNED)
            with suppress(BlockingIOError), exclusive_lock(lock):
                for path in (pinned, _beside(pinned, PART)):
                    path.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                names |= {self.folder / name for name in pinned.read_text(encoding="utf-8").splitlines()}
        return names

    # --- waiting -----------------------------------------------------------------------------------------------------

    def _lock(self, stack: ExitStack, path: Path) -> None:
        """Take a lock, and wait while another holds it."""
        while True:
            with suppress(BlockingIOError):
                stack.enter_context(exclusive_lock(path))
                return
            self._pause()

    def _pause(self, seconds: float = POLL_S) -> None:
        self._stopped.wait(seconds)
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise RecordsError("the cache is closed")


def _beside(path: Path, suffix: str) -> Path:
    """Return the name of a file's lock or part."""
    return path.with_name(f".{path.name}{suffix}")


def _entry_name(path: Path) -> Path:
    """Return the path of the first file of the entry that a file, whole or begun, belongs to."""
    return path.with_name(path.name.removeprefix(".").removesuffix(PART).removesuffix(".db"))


def _said(file: Wanted) -> tuple[str, int, str]:
    return remote.shown(file.url), file.size_bytes, file.sha256[:12]
