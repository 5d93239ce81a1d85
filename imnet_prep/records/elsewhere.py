"""Records behind a URL: shards are brought whole into a cache, ahead of use, in the order in which they are needed."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep import remote
from imnet_prep.errors import ImnetError, RecordsError, RemoteError
from imnet_prep.files import PlainFile, max_open_files
from imnet_prep.records.cache import FOLDER, Cache, Wanted
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import MANIFEST, Manifest, parse_manifest
from imnet_prep.records.mindrecord import index_path
from imnet_prep.records.table import RowReader, RowTable, load_list, place_rows
from imnet_prep.types import ShardInfo

AHEAD = 2  # shards that are brought while one is read
LEAST_SHARDS = 3  # that a cache holds: two whose rows come mixed, and one that is brought
_UNKNOWN = 1 << 60  # rows that will be read of a shard of the next epoch
_ROOM_S = 0.2  # between attempts to find room ahead of use


def open_records(place: Path | str, cache: Path | str | None = None, cache_bytes: int | None = None) -> RecordsFolder:
    """Open a records folder, or records behind a URL, by the manifest.

    Args:
        place: A folder or a URL, see :func:`imnet_prep.remote.is_url`.
        cache: Where shards are kept. Only needed to read records behind a URL, not for their manifest.
        cache_bytes: Most bytes to keep there; by default nine tenths of what is free on its disk.

    Raises:
        RecordsError: No such folder, no manifest in it, another format version, or a cache for a folder.
        RemoteError: The URL cannot be read, or there is no manifest.
        IntegrityError: The manifest is damaged or was changed.
    """
    if isinstance(place, str) and remote.is_url(place):
        return RemoteRecords(place.rstrip("/"), None if cache is None else Path(cache), cache_bytes)
    if cache is not None or cache_bytes is not None:
        raise RecordsError(f"{place}: a cache is for records behind a URL", remedy="leave out --cache (cache=)")
    return RecordsFolder.open(Path(place))


def read_manifest(url: str) -> Manifest:
    """Read and check the manifest of records behind a URL; raises as :func:`open_records`."""
    where = f"{url}/{MANIFEST}"
    file = remote.look_up(where)
    if file is None:
        raise RemoteError(f"{remote.shown(where)} is a folder", expected="records that were uploaded whole")
    return parse_manifest(b"".join(remote.read(file)), remote.shown(where))


class RemoteRecords(RecordsFolder):
    """Records behind a URL. Their lists and shards are read from a cache; :attr:`path` is their place in it."""

    def __init__(self, url: str, folder: Path | None, cache_bytes: int | None) -> None:
        manifest = read_manifest(url)
        self.url, self._folder, self._cache_bytes = url, folder, cache_bytes
        super().__init__((folder or Path()) / FOLDER / manifest.digest[:16], manifest)

    @cached_property
    def cache(self) -> Cache:
        """The cache.

        Raises:
            RecordsError: None was given, or it cannot be used.
        """
        if self._folder is None:
            raise RecordsError(
                f"{remote.shown(self.url)}: shards are kept in a folder of this machine while they are read",
                remedy="name one with --cache DIR (cache=)",
            )
        return Cache(self._folder, self._cache_bytes)

    def list_path(self, split: str) -> Path:
        """Return the path of a split's record list, which is brought into the cache."""
        path = super().list_path(split)
        return self.cache.bring(self._list(split), lambda: path)

    def table(self, split: str) -> RowTable:
        """Return the records of a split without their places, which come with the shards."""
        self.manifest.split(remote.shown(self.url), split)
        return self.cache.bring(self._list(split), partial(load_list, self.path, self.manifest, split))

    def reader(self, split: str, *, at_random: bool = False) -> RowReader:
        """Return a reader that brings shards into the cache.

        Raises:
            RecordsError: There is no such split, no cache, or the cache is too small.
        """
        shards = self.manifest.split(remote.shown(self.url), split).shards
        sizes = sorted((shard.size_bytes + shard.index_size_bytes for shard in shards), reverse=True)
        least = sum(sizes if at_random else sizes[:LEAST_SHARDS])
        if self.cache.limit_bytes < least:
            which = "all shards, which are read in random order" if at_random else f"{LEAST_SHARDS} shards"
            raise RecordsError(
                f"{self.cache.folder}: the cache is too small",
                expected=f"room for {which}: {least} bytes",
                got=str(self.cache.limit_bytes),
                remedy="give it more (--cache-bytes)"
                + (', or read shard by shard (order="blocks", mbv2 train: --set sampling=blocks)' if at_random else ""),
            )
        files = [self._files(shard) for shard in shards]
        return CachedReader(self.table(split), shards, files, self.cache)

    def _list(self, split: str) -> list[Wanted]:
        entry = self.manifest.splits[split].records
        return [self._wanted(entry["file"], entry["size_bytes"], entry["sha256"])]

    def _files(self, shard: ShardInfo) -> list[Wanted]:
        index = index_path(Path(shard.file)).as_posix()
        return [
            self._wanted(shard.file, shard.size_bytes, shard.sha256),
            self._wanted(index, shard.index_size_bytes, shard.index_sha256),
        ]

    def _wanted(self, name: str, size: int, sha256: str) -> Wanted:
        return Wanted(f"{self.path.name}/{name}", f"{self.url}/{name}", size, sha256)


class CachedReader(RowReader):
    """Read images of shards that are brought into a cache when they are needed, and ahead of that in a thread.

    Args:
        table: Of the split; the places of a shard's rows are added when it is first opened.
        shards: What the manifest says of the data files.
        files: Data file and index of each.
        cache: Where they are kept; it is closed with the reader.
    """

    def __init__(
        self, table: RowTable, shards: Sequence[ShardInfo], files: Sequence[list[Wanted]], cache: Cache
    ) -> None:
        super().__init__(table)
        self._shards, self._wanted, self._cache = shards, files, cache
        self._opened: OrderedDict[int, PlainFile] = OrderedDict()
        self._placed: set[int] = set()
        self._changed = threading.Condition()  # of all that follows
        self._turns: list[int] = []  # shards in the order of their first rows
        self._turn_of: dict[int, int] = {}
        self._turn = 0  # the last turn of which a row was read
        self._left: dict[int, int] = {}  # rows to be read of each shard
        self._then: Callable[[], NDArray[np.int64]] | None = None
        self._tried: set[int] = set()  # ahead of use
        self._closed = False
        self._thread: threading.Thread | None = None

    def open(self, shard: int) -> PlainFile:
        """Return a data file, open; bring it if it is not there.

        Raises:
            ImnetError: See :meth:`~imnet_prep.records.cache.Cache.bring`; or the index contradicts the record list.
        """
        with self._changed:
            file = self._opened.get(shard)
            left, turn = self._left.get(shard, 0), self._turn_of.get(shard, 0)
            if left:
                self._left[shard] = left - 1
            if left == 1:  # the last of its rows: whoever reads one keeps it open so long
                self._opened.pop(shard, None)
            if left == 1 or turn > self._turn:
                self._turn = max(turn, self._turn)
                self._changed.notify()
        if file is None:
            file = self._cache.bring(self._wanted[shard], partial(self._use, shard))
            self._keep_open(shard, file)
        return file

    def close(self) -> None:
        """Stop bringing shards, also for a read that waits, and close the files. It cannot be opened again."""
        with self._changed:
            self._closed = True
            self._opened.clear()
            self._changed.notify()
        self._cache.stop()
        if self._thread is not None:
            self._thread.join()
        self._cache.close()

    def follow(self, rows: Callable[[], NDArray[np.int64]], then: Callable[[], NDArray[np.int64]] | None) -> None:
        """Bring the shards of these rows ahead of their use, in the order of the rows.

        Args:
            rows: Returns int64 (N,), positions of the rows that will be read.
            then: Returns those that will be read after them, if any.
        """
        numbers, first, counts = np.unique(self.table.shard[rows()], return_index=True, return_counts=True)
        with self._changed:
            self._turns, self._turn = numbers[np.argsort(first)].tolist(), 0
            self._turn_of = {shard: turn for turn, shard in enumerate(self._turns)}
            self._left = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
            self._then, self._tried = then, set()
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._go_ahead, name="imnet-ahead", daemon=True)
                self._thread.start()

    def will_need(self, positions: NDArray[np.int64]) -> None:
        """Do nothing: a shard that was just brought is in memory."""

    def _keep_open(self, shard: int, file: PlainFile) -> None:
        """Keep a data file open while rows of it will be read."""
        with self._changed:
            if self._left.get(shard) and not self._closed:
                self._opened[shard] = file
                if len(self._opened) > max_open_files():
                    self._opened.popitem(last=False)

    def _use(self, shard: int) -> PlainFile:
        if shard not in self._placed:
            place_rows(self.table, shard, self._shards[shard])
            self._placed.add(shard)
        return PlainFile(self.table.files[shard])

    def _go_ahead(self) -> None:
        """Bring the shards of the next turns, and tell the cache of them, until the reader is closed."""
        pinned: list[int] = []
        while True:
            self._look_further()
            with self._changed:
                if self._closed:
                    return
                latest_first = dict.fromkeys(reversed(self._turns[: self._turn + 1 + AHEAD]))  # one may come twice
                soon = [shard for shard in reversed(latest_first) if self._left[shard]]
                shard = next((shard for shard in soon if shard not in self._tried), None)
                if shard is not None:
                    self._tried.add(shard)
                    soon = soon[: soon.index(shard) + 1]  # what comes later makes room for it
                elif soon == pinned:
                    self._changed.wait()
                    continue
            self._cache.pin(self._wanted[one][0].name for one in soon)
            pinned = soon
            if shard is not None:
                self._bring_ahead(shard)

    def _look_further(self) -> None:
        """Near the end of the rows, add the first shard of those that are read after them."""
        with self._changed:
            turns, then = self._turns, self._then
            if then is None or len(turns) > self._turn + AHEAD:
                return
        after = int(self.table.shard[then()[0]])
        with self._changed:
            if turns is self._turns:  # other rows are not followed meanwhile
                self._then = None
                turns.append(after)
                self._tried.discard(after)
                self._left[after] = self._left.get(after, 0) + _UNKNOWN

    def _bring_ahead(self, shard: int) -> None:
        try:
            file = self._cache.bring_ahead(self._wanted[shard], partial(self._use, shard))
        except ImnetError:  # the read that needs it tries again and reports it
            return
        if file is not None:
            self._keep_open(shard, file)
            return
        with self._changed:
            self._tried.discard(shard)
            self._changed.wait(_ROOM_S)
