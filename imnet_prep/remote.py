"""Files behind a URL (``s3://``, ``gs://``, ``https://`` and others), read by fsspec. Nothing here knows of images.

Credentials are those of the environment, as each store documents them. Those in a URL are kept out of all that is
shown.
"""

import logging
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from imnet_prep.errors import RemoteError

LOG = logging.getLogger(__name__)
RANGE_BYTES = 8 << 20  # of one request: what stores advise for large files
PARALLEL = 4  # requests at a time; memory holds so many ranges and one more
WAITS_S = (0.5, 2.0, 8.0, 30.0)  # before each further attempt
_URL = re.compile(r"([a-z][a-z0-9+.-]+)://")
_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "LastModified", "Last-Modified", "mtime", "created")
_T = TypeVar("_T")
Pause = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind a URL.

    Attributes:
        url: Its URL, as it is opened.
        size_bytes: Its size, or None where the server does not say.
        version: Changes with its content (an ETag, or a time); empty where the server gives none.
    """

    url: str = field(repr=False)
    size_bytes: int | None
    version: str

    @property
    def name(self) -> str:
        """Its base name."""
        return base_name(self.url)


def is_url(place: str | Path) -> bool:
    """Return whether a source is a URL and not a path."""
    return isinstance(place, str) and _URL.match(place) is not None


def base_name(url: str) -> str:
    """Return the last part of a URL's path."""
    path = urlsplit(url).path if url.startswith("http") else shown(url)
    return unquote(path.rstrip("/").rpartition("/")[2])


def shown(text: str) -> str:
    """Return a URL, or a message that holds URLs, without user names, passwords and queries (signatures)."""
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", re.sub(r"://[^/\s?'\"]*@", "://", text))


def look_up(url: str, pause: Pause = time.sleep) -> RemoteFile | None:
    """Return the file behind a URL, or None for a folder.

    Args:
        url: The URL.
        pause: Waits so many seconds before another attempt, or raises to give up.

    Raises:
        RemoteError: It does not exist or cannot be read, or a library for it is missing.
    """
    system, path = _opened(url)
    info = _repeated(url, lambda: system.info(path), pause)
    return None if info["type"] == "directory" else _file_of(url, info)


def list_files(url: str) -> dict[str, RemoteFile]:
    """Return the files in and below a folder by their path within it, sorted.

    Raises:
        RemoteError: It cannot be listed.
    """
    system, path = _opened(url)
    found = _repeated(url, lambda: system.find(path, detail=True))
    top = path.rstrip("/") + "/"
    return {
        name.removeprefix(top): _file_of(system.unstrip_protocol(name), info) for name, info in sorted(found.items())
    }


def read(file: RemoteFile, pause: Pause = time.sleep) -> Iterator[bytes]:
    """Yield a file's bytes in order, by several large range reads at a time; a lost connection is tried again.

    Args:
        file: What :func:`look_up` returned.
        pause: See there.

    Raises:
        RemoteError: It cannot be read, or it changed meanwhile.
    """
    system, path = _opened(file.url)
    done = 0
    ranges = _has_ranges(file, system, path, pause)
    for part in _ranges(file, system, path, pause) if ranges else _stream(file, system, path):
        done += len(part)
        yield part
    system.invalidate_cache()
    now = look_up(file.url, pause)
    wrong = file.size_bytes not in (None, done)  # some web servers do not say a size
    if wrong or now is None or (now.size_bytes, now.version) != (file.size_bytes, file.version):
        raise RemoteError(
            f"{shown(file.url)}: changed while it was read, or was not read whole",
            expected=f"{file.size_bytes} bytes, version {file.version or 'unknown'}",
            got=f"{done} bytes, now version {now.version if now else 'none'}",
            remedy="run the same command again",
        )


def _ranges(file: RemoteFile, system: Any, path: str, pause: Pause) -> Iterator[bytes]:
    more = {"headers": {"Accept-Encoding": "identity"}} if _is_http(file.url) else {}
    size = file.size_bytes or 0

    def read_range(start: int) -> bytes:
        end = min(start + RANGE_BYTES, size)

        def once() -> bytes:
            data: bytes = system.cat_file(path, start=start, end=end, **more)
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes came for bytes {start} to {end}")
            return data

        return _repeated(file.url, once, pause)

    pool = ThreadPoolExecutor(PARALLEL)
    try:
        starts = iter(range(0, size, RANGE_BYTES))
        waiting: deque[Future[bytes]] = deque(pool.submit(read_range, start) for start in islice(starts, PARALLEL))
        while waiting:
            data = waiting.popleft().result()
            waiting.extend(pool.submit(read_range, start) for start in islice(starts, 1))
            yield data
    finally:
        pool.shutdown(cancel_futures=True)


def _stream(file: RemoteFile, system: Any, path: str) -> Iterator[bytes]:
    """Yield what a web server sends that cannot begin in the middle of a file."""
    with _named(file.url), system.open(path, "rb", block_size=0) as stream:
        while data := stream.read(RANGE_BYTES):
            yield data


def _has_ranges(file: RemoteFile, system: Any, path: str, pause: Pause) -> bool:
    """Return whether parts of a file can be asked for: all stores can, and most web servers."""
    if not _is_http(file.url) or file.size_bytes == 0:
        return True
    if (size := file.size_bytes) is None:
        return False

    def ask() -> bool:
        with system.open(path, "rb", cache_type="none", block_size=RANGE_BYTES) as opened:
            try:
                opened.seek(size - 1)
                return len(opened.read(1)) == 1
            except ValueError:  # the whole file came
                return False

    return _repeated(file.url, ask, pause)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _opened(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL and the path within it."""
    try:
        from fsspec.core import url_to_fs

        with _named(url):
            system, path = url_to_fs(url)
    except ImportError as error:
        raise RemoteError(
            f"{shown(url)}: a library for it is not installed",
            got=str(error),
            remedy="pip install 'imnet-prep[remote]'" + (" gcsfs" if url.startswith("g") else ""),
        ) from error
    system.invalidate_cache()
    return system, path


def _file_of(url: str, info: dict[str, Any]) -> RemoteFile:
    version = next((f"{name} {info[name]}" for name in _VERSIONS if info.get(name)), "")
    return RemoteFile(url, info["size"], version)


def _repeated(url: str, action: Callable[[], _T], pause: Pause = time.sleep) -> _T:
    """Return what an action returns; after a failure that may pass, wait and try again."""
    for wait_s in WAITS_S:
        try:
            return action()
        except ValueError:  # of fsspec, for a URL that means nothing
            break
        except _failures() as error:
            if not _may_pass(url, error):
                break
            LOG.warning("%s: %s; another attempt in %s s", shown(url), _text(url, error), wait_s)
            pause(wait_s)
    with _named(url):
        return action()


def _may_pass(url: str, error: Exception) -> bool:
    """Return whether a failure is worth another attempt."""
    if isinstance(error, FileNotFoundError) and _is_http(url):  # fsspec's word for every failure of a web server
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    refused = isinstance(error, FileNotFoundError | PermissionError)
    refused = refused or re.search("Credential|Validation", type(error).__name__) is not None
    return not refused and getattr(error, "status", 500) not in range(400, 429)


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn a failure into one line."""
    try:
        yield
    except FileNotFoundError as error:
        why = _text(url, error.__cause__) if isinstance(error.__cause__, Exception) else ""
        raise RemoteError(f"{shown(url)} does not exist or may not be read", got=why, remedy="check the URL") from error
    except _failures() as error:
        raise RemoteError(
            f"{shown(url)} cannot be read",
            got=_text(url, error),
            remedy="check URL, credentials and network, and run the same command again",
        ) from error
    except ValueError as error:
        raise RemoteError(f"{shown(url)} cannot be opened", got=_text(url, error)) from error


def _text(url: str, error: Exception) -> str:
    """Return the text of an error without what is secret in the URL."""
    text = shown(str(error)) or type(error).__name__
    for secret in re.findall(r"://([^/?]*)@|\?(.*)", url):
        for part in filter(None, secret):
            text = text.replace(part, "***")
    return text


def _failures() -> tuple[type[Exception], ...]:
    """Return what the libraries raise when a store cannot be reached or refuses; not all of it is an OSError."""
    kinds: list[type[Exception]] = [OSError, TimeoutError]
    for module, name in (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("gcsfs.retry", "HttpError"),
        ("google.auth.exceptions", "GoogleAuthError"),
    ):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)
