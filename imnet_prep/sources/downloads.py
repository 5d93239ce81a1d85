"""A folder that ``imnet-prep download`` made, read by its journal: only finished images, each with its URL."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace

from imnet_prep.download.journal import read_finished
from imnet_prep.errors import DownloadError, SourceError
from imnet_prep.sources.base import Found, Source, make_ref
from imnet_prep.types import ImageRef

_SEPARATOR = "\x1f"  # no URL and no file name of the journal holds a control character


class DownloadFolder(Source):
    """The images that the journal lists as finished; other files in the folder are ignored."""

    def _walk(self, notes: list[str], ignored: Counter[str]) -> Iterator[Found]:
        classes = defaultdict[str, bytearray](bytearray)  # packed rows: a list may have produced millions of images
        try:
            for done in read_finished(self.path):
                name = done.path.rpartition("/")[2]
                row = _SEPARATOR.join((name, done.path, str(done.size_bytes), str(done.status), done.url))
                classes[done.wnid] += row.encode("utf-8", "surrogateescape") + b"\n"
        except DownloadError as error:
            raise SourceError(error.what, expected=error.expected, got=error.got, remedy=error.remedy) from error
        except sqlite3.DatabaseError as error:
            raise SourceError(f"{self.path}: its journal.sqlite cannot be read", got=str(error)) from error
        for wnid in sorted(classes):
            rows = classes[wnid].decode("utf-8", "surrogateescape").split("\n")[:-1]
            for name, path, size_bytes, status, url in sorted(row.split(_SEPARATOR) for row in rows):
                found = make_ref(self.split, wnid, name, str(self.path / path), 0, int(size_bytes))
                known = int(status) if status.isdecimal() else None
                yield replace(found, url=url, status=known) if isinstance(found, ImageRef) else found
