"""One hop of one URL: a request, its answer, and what the answer means.

Redirects are followed by the scheduler, so that the next host's limits hold for them too.
"""

from __future__ import annotations

import email.utils
import http.client
import ssl
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import requests
import urllib3
from requests.structures import CaseInsensitiveDict

from imnet_prep.download.addresses import AddressRefused, NameFailed
from imnet_prep.download.net import BUDGET, TooSlow
from imnet_prep.download.options import FailReason, FetchOptions
from imnet_prep.download.urls import BadUrl, is_placeholder_url, join_redirect

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DRAIN_BYTES = 65536  # a rest up to this size is read so that the connection can be used again
_CHUNK = 65536
_OPT_OUT = frozenset({"noai", "noimageai"})
_AGENT = "imnet-prep"  # our name in X-Robots-Tag
_REASONS = {404: FailReason.GONE, 410: FailReason.GONE, 429: FailReason.RATE_LIMITED}
_PASSING_4XX = frozenset({408, 421, 425, 429})  # they say "not now" or "not on this connection"
_NETWORK_ERRORS = (OSError, urllib3.exceptions.HTTPError, http.client.HTTPException, ValueError)


@dataclass(frozen=True, slots=True)
class Body:
    """A complete answer. ``data`` is decompressed."""

    status: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Hop:
    """A redirect to follow: the next URL, normalised."""

    status: int
    url: str


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that gave nothing.

    Attributes:
        reason: Why. detail: One line. status: HTTP status, if it came to one.
        transient: Whether a later attempt may do better.
        answered: Whether the host gave an HTTP answer at all (the circuit breaker's question).
        retry_after_s: What the server asked for, or None.
        aborted: Whether an unfinished connection was cut by us; the host may take a moment to notice.
    """

    reason: FailReason
    detail: str
    status: int | None = None
    transient: bool = False
    answered: bool = True
    retry_after_s: float | None = None
    aborted: bool = False

    @property
    def limited(self) -> bool:
        """Whether the host asked to be left alone for a while."""
        return self.retry_after_s is not None or self.status == 429


class Fetcher:
    """Makes requests through a worker's session."""

    def __init__(self, session: requests.Session, options: FetchOptions) -> None:
        self._session, self._options = session, options
        self._headers = CaseInsensitiveDict({name: str(value) for name, value in session.headers.items()})

    def fetch(self, url: str, spent_s: float) -> Body | Hop | Failure:
        """Make one request and read its answer.

        Args:
            url: Normalised.
            spent_s: Seconds that earlier hops of this attempt took; they count against the total.
        """
        if is_placeholder_url(url):
            return Failure(FailReason.PLACEHOLDER, "the host's placeholder, by its URL")
        BUDGET.start(self._options, time.monotonic() + max(0.1, self._options.timeout_s - spent_s))
        request = requests.PreparedRequest()
        request.method, request.url, request.hooks = "GET", url, {}
        request.headers = self._headers
        timeout = (self._options.connect_timeout_s, self._options.read_timeout_s)
        status: int | None = None
        try:
            response = self._session.get_adapter(url).send(request, stream=True, timeout=timeout)
            status = response.status_code
            try:
                return self._answer(url, status, response.raw)
            finally:
                _let_go(response.raw)
        except _NETWORK_ERRORS as error:
            return _failed(error, status)

    def _answer(self, url: str, status: int, raw: Any) -> Body | Hop | Failure:
        if 300 <= status < 400:
            return _redirect(url, status, raw.headers.get("Location"))
        if status >= 400:
            server_error = 500 <= status < 600
            reason = _REASONS.get(status, FailReason.HTTP_5XX if server_error else FailReason.HTTP_4XX)
            asked = raw.headers.get("Retry-After") if status in (429, 503) else None
            wait = parse_retry_after(asked, time.time())
            return Failure(reason, f"HTTP {status}", status, server_error or status in _PASSING_4XX, retry_after_s=wait)
        if status == 206:
            return Failure(FailReason.TRUNCATED, "HTTP 206: a part of the image, unasked", status)
        if status not in (200, 203):
            return Failure(FailReason.NOT_AN_IMAGE, f"HTTP {status} holds no image", status)
        if self._options.honour_opt_out and opted_out(raw.headers.getlist("X-Robots-Tag")):
            return Failure(FailReason.OPTED_OUT, "X-Robots-Tag", status)
        return self._read(status, raw)

    def _read(self, status: int, raw: Any) -> Body | Failure:
        limit = self._options.max_bytes
        declared = raw.length_remaining
        if declared is not None and declared > limit:
            return Failure(FailReason.TOO_LARGE, f"{declared} bytes declared", status, aborted=True)
        BUDGET.body()
        if declared is not None:
            data = raw.read(declared, decode_content=False) if declared else b""
            if len(data) < declared:
                short = f"the body ended after {len(data)} of {declared} bytes"
                return Failure(FailReason.TRUNCATED, short, status, transient=True)
        else:
            whole = bytearray()
            for part in _parts(raw):
                whole += part
                if len(whole) > limit:
                    return Failure(FailReason.TOO_LARGE, f"more than {limit} bytes", status, aborted=True)
            data = bytes(whole)
        encoding = raw.headers.get("Content-Encoding", "").strip().lower()
        unpacked = data if encoding in ("", "identity") else unpack(data, encoding, limit)
        return unpacked if isinstance(unpacked, Failure) else Body(status, unpacked)


def _parts(raw: Any) -> Iterator[bytes]:
    """Yield a body of unknown length piece by piece, chunked or up to the connection's end."""
    if raw.chunked and raw.supports_chunked_reads():
        yield from raw.read_chunked(_CHUNK, decode_content=False)
    else:
        yield from iter(lambda: raw.read(_CHUNK, decode_content=False), b"")


def _let_go(raw: Any) -> None:
    """Return the connection to its pool where the answer was read to its end or soon will be, else close it."""
    with suppress(*_NETWORK_ERRORS):
        if raw._connection is None:
            return
        if raw.chunked:
            parts = enumerate(raw.read_chunked(_CHUNK, decode_content=False))
            at_end = all(number == 0 and len(part) <= _DRAIN_BYTES for number, part in parts)
        else:
            at_end = raw.length_remaining is not None and raw.length_remaining <= _DRAIN_BYTES
            if at_end and raw.length_remaining:
                raw.read(raw.length_remaining, decode_content=False)
        if at_end:
            raw.release_conn()
            return
    raw.close()


def _redirect(url: str, status: int, location: str | None) -> Hop | Failure:
    if status not in _REDIRECTS or location is None:
        return Failure(FailReason.REDIRECT_REFUSED, f"HTTP {status} without a place to go", status)
    try:
        target = join_redirect(url, location.encode("latin-1", "replace"))
    except BadUrl as error:
        return Failure(FailReason.REDIRECT_REFUSED, f"redirect: {error}", status)
    if is_placeholder_url(target):
        return Failure(FailReason.PLACEHOLDER, "redirected to the host's placeholder", status)
    return Hop(status, target)


def opted_out(values: list[str]) -> bool:
    """Say whether ``X-Robots-Tag`` headers opt this client's use out: unaddressed ones, and those to our name."""
    for value in values:
        for part in value.lower().split(","):
            agent, colon, directive = part.strip().rpartition(":")
            if colon and agent.strip() not in (_AGENT, "*"):
                break  # addressed to another robot, to the end of this header
            if directive.strip() in _OPT_OUT:
                return True
    return False


def parse_retry_after(value: str | None, now_s: float) -> float | None:
    """Read ``Retry-After``: seconds, or an HTTP date (RFC 9110 section 10.2.3). None where there is no readable one."""
    value = (value or "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    with suppress(TypeError, ValueError, IndexError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now_s)
    return None


def unpack(data: bytes, encoding: str, limit: int) -> bytes | Failure:
    """Undo a ``Content-Encoding`` that was not asked for, never making more than ``limit`` bytes."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return Failure(FailReason.NOT_AN_IMAGE, f"Content-Encoding {encoding[:40]!r}", 200)
    if encoding != "deflate" and not data.startswith(b"\x1f\x8b"):
        return data  # said so, but is not: some servers mislabel their images
    for window in (31,) if encoding != "deflate" else (15, -15):
        machine = zlib.decompressobj(window)
        try:
            out = machine.decompress(data, limit + 1)
        except zlib.error:
            continue
        if len(out) > limit:
            return Failure(FailReason.TOO_LARGE, f"more than {limit} bytes decompressed", 200)
        if not machine.eof:
            return Failure(FailReason.TRUNCATED, "the compressed body ends early", 200, transient=True)
        return out
    return Failure(FailReason.NOT_AN_IMAGE, "the compressed body is damaged", 200)


def _causes(error: BaseException) -> list[BaseException]:
    """List an exception and its causes, outermost first: the libraries wrap the one that says what happened."""
    found = [error]
    for one in found:  # which grows
        named = (getattr(one, "reason", None), one.__cause__, one.__context__, *one.args)
        inner = dict.fromkeys(item for item in named if isinstance(item, BaseException))
        found += [item for item in inner if item not in found]
    return found


def _failed(error: BaseException, status: int | None) -> Failure:
    """Turn what the network or the libraries raised into a reason."""
    answered = status is not None
    causes = _causes(error)
    for one in causes:
        match one:
            case NameFailed():
                return Failure(FailReason.DNS, str(one), transient=one.transient, answered=False)
            case AddressRefused():
                return Failure(FailReason.ADDRESS_REFUSED, str(one))
            case TooSlow():
                return Failure(FailReason.TOO_SLOW, str(one), status, transient=True, aborted=True)
            case ssl.SSLCertVerificationError():
                return Failure(FailReason.TLS, one.verify_message)
            case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
                continue  # a closed connection, not a fault of TLS
            case ssl.SSLError() if not answered:
                return Failure(FailReason.TLS, one.reason or str(one), transient=True, answered=False)
    for one in causes:
        if isinstance(one, TimeoutError | urllib3.exceptions.TimeoutError):
            where = "while reading the body" if answered else "before an answer"
            return Failure(FailReason.TIMEOUT, where, status, transient=True, answered=answered, aborted=True)
        if isinstance(one, http.client.HTTPException) and ("header" in str(one) or "status line" in str(one)):
            return Failure(FailReason.TOO_LARGE, f"header: {one}", status, aborted=True)
    # The innermost cause's own words, without the objects and URLs that the wrappers print.
    last = causes[-1]
    plain = next((one.strerror for one in reversed(causes) if isinstance(one, OSError) and one.strerror), None)
    words = plain or f"{type(last).__name__}: {str(last) or type(last).__name__}"[:200]
    if answered:
        return Failure(FailReason.TRUNCATED, words, status, transient=True)
    statuses = [one for one in causes if isinstance(one, http.client.BadStatusLine)]
    heard = not all(isinstance(one, http.client.RemoteDisconnected) for one in statuses)
    return Failure(FailReason.CONNECT, "not HTTP" if heard else words, transient=True, answered=heard)
