"""Make one request for one URL and say what the answer means.

Redirects are followed by the scheduler, so that the limits of the next host hold for them too.
"""

import email.utils
import http.client
import ssl
import time
import zlib
from contextlib import ExitStack, suppress
from importlib.metadata import version
from typing import Any, NamedTuple

import requests
import urllib3
from requests.structures import CaseInsensitiveDict

from imnet_prep.download.addresses import AddressRefused, NameFailed, Resolver
from imnet_prep.download.memory import Patience, Room
from imnet_prep.download.net import BUDGET, SafeAdapter, TooSlow
from imnet_prep.download.options import FailReason, FetchOptions
from imnet_prep.download.urls import BadUrl, is_placeholder_url, join_redirect
from imnet_prep.types import Stop

_DRAIN_BYTES = 65536  # a rest up to this size is read so that the connection can be used again
_OPT_OUT = frozenset({"noai", "noimageai"})
_GZIP = b"\x1f\x8b"
_MAX_MEMBERS = 10_000  # of a gzip body; an empty one has 20 bytes
_SLICE_BYTES = 1 << 16
_USUAL_BYTES = 1 << 20  # of an answer, for which every thread has room
_LARGE_BYTES = 64 << 20  # of larger answers that a process holds at a time; the same again once they are decompressed
_AGENT = "imnet-prep"  # our name in User-Agent and X-Robots-Tag
_REASONS = {404: FailReason.GONE, 410: FailReason.GONE, 429: FailReason.RATE_LIMITED}
_PASSING_4XX = frozenset({408, 421, 425, 429})  # "not now" or "not on this connection"
_NETWORK_ERRORS = (OSError, urllib3.exceptions.HTTPError, http.client.HTTPException, ValueError)


class Body(NamedTuple):
    """A complete answer. ``data`` is decompressed."""

    status: int
    data: bytes


class Hop(NamedTuple):
    """A redirect to follow. ``url`` is normalised."""

    status: int
    url: str


class Failure(NamedTuple):
    """An attempt that brought no image.

    Attributes:
        reason: Why. detail: One line. status: HTTP status, or None.
        transient: Whether a later attempt may succeed.
        answered: Whether the host gave any HTTP answer (for the circuit breaker).
        retry_after_s: The pause that the server asked for, or None.
        aborted: Whether we cut an unfinished connection; the host may take a moment to notice.
    """

    reason: FailReason
    detail: str
    status: int | None = None
    transient: bool = False
    answered: bool = True
    retry_after_s: float | None = None
    aborted: bool = False


class Fetcher:
    """Make requests over the connections of one worker process.

    Args:
        options: Limits of a request.
        per_host: Most idle connections to keep to one host.
        resolver: Looks up the addresses of hosts.
        stop: Called while an answer waits for room; once it returns true, :meth:`fetch` raises ``Stopped``. An answer
            that waits for longer than half of the time limit raises ``NoRoom``.
    """

    def __init__(self, options: FetchOptions, per_host: int, resolver: Resolver, stop: Stop = lambda: False) -> None:
        self._options, self._adapter = options, SafeAdapter(options, resolver, per_host)
        patience = Patience(options.timeout_s / 2, stop)
        self._room, self._unpacked = Room(_LARGE_BYTES, patience), Room(_LARGE_BYTES, patience)
        ours, theirs = version("imnet-prep"), requests.__version__
        about = f"{options.contact}; " if options.contact else ""
        agent = f"{_AGENT}/{ours} ({about}research image list downloader) python-requests/{theirs}"
        self._headers = CaseInsensitiveDict(
            {"User-Agent": agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
        )

    def fetch(self, url: str, spent_s: float, held: ExitStack | None = None) -> Body | Hop | Failure:
        """Make one request and read its answer.

        Args:
            url: Normalised.
            spent_s: Seconds that earlier hops of this attempt took; they count against the total.
            held: Takes the room in memory of a large answer, and is to be closed when the answer is no longer needed.
                Without it, the room is free again at once.
        """
        if is_placeholder_url(url):
            return Failure(FailReason.PLACEHOLDER, "the host's placeholder, by its URL")
        BUDGET.start(self._options, time.monotonic() + max(0.1, self._options.timeout_s - spent_s))
        request = requests.PreparedRequest()
        request.method, request.url, request.headers = "GET", url, self._headers
        status: int | None = None
        try:
            response = self._adapter.send(request, stream=True, timeout=self._options.read_timeout_s)
            status = response.status_code
            try:
                with ExitStack() as own:
                    return self._answer(url, status, response.raw, held or own)
            finally:
                _let_go(response.raw)
        except _NETWORK_ERRORS as error:
            return _failed(error, status)

    def _answer(self, url: str, status: int, raw: Any, held: ExitStack) -> Body | Hop | Failure:
        if 300 <= status < 400:
            return _redirect(url, status, raw.get_redirect_location())
        if status >= 400:
            server_error = 500 <= status < 600
            reason = _REASONS.get(status, FailReason.HTTP_5XX if server_error else FailReason.HTTP_4XX)
            asked = raw.headers.get("Retry-After", "") if status in (429, 503) else ""
            wait = parse_retry_after(asked, time.time())
            return Failure(reason, f"HTTP {status}", status, server_error or status in _PASSING_4XX, retry_after_s=wait)
        if status == 206:
            return Failure(FailReason.TRUNCATED, "HTTP 206: a part of the image, unasked", status)
        if status not in (200, 203):
            return Failure(FailReason.NOT_AN_IMAGE, f"HTTP {status} holds no image", status)
        if self._options.honour_opt_out and opted_out(raw.headers.getlist("X-Robots-Tag")):
            return Failure(FailReason.OPTED_OUT, "X-Robots-Tag", status)
        return self._read(status, raw, held)

    def _read(self, status: int, raw: Any, held: ExitStack) -> Body | Failure:
        limit, declared = self._options.max_bytes, raw.length_remaining
        if declared is not None and declared > limit:
            return Failure(FailReason.TOO_LARGE, f"{declared} bytes declared", status, aborted=True)
        BUDGET.body()
        if declared is None:
            data = self._read_on(raw, held)
        else:
            if declared > _USUAL_BYTES:
                self._wait(declared, held)
            data = raw.read(declared, decode_content=False)
        if len(data) > limit:
            return Failure(FailReason.TOO_LARGE, f"more than {limit} bytes", status, aborted=True)
        if declared is not None and len(data) < declared:
            return Failure(
                FailReason.TRUNCATED, f"the body ended after {len(data)} of {declared} bytes", status, transient=True
            )
        encoding = raw.headers.get("Content-Encoding", "").strip().lower()
        if encoding in ("", "identity"):
            return Body(status, data)
        held.enter_context(self._unpacked.hold(limit))
        unpacked = unpack(data, encoding, limit)
        return unpacked if isinstance(unpacked, Failure) else Body(status, unpacked)

    def _read_on(self, raw: Any, held: ExitStack) -> bytes:
        """Read a body of unknown length, and at most one byte more than the limit. A million chunks are soon joined."""
        data, limit, has_room = bytearray(), self._options.max_bytes, False
        while piece := raw.read(min(_SLICE_BYTES, limit + 1 - len(data)), decode_content=False):
            data += piece
            if len(data) > limit:
                break
            if len(data) > _USUAL_BYTES and not has_room:
                self._wait(2 * limit, held)  # the last copy is made while this one is there
                has_room = True
        return bytes(data)

    def _wait(self, count: int, held: ExitStack) -> None:
        """Wait for room for a large answer; the time is not counted against the attempt."""
        begun = time.monotonic()
        held.enter_context(self._room.hold(count))
        BUDGET.extend(time.monotonic() - begun)


def _let_go(raw: Any) -> None:
    """Read the rest of an answer if it is short, which returns the connection to its pool; otherwise close it."""
    with suppress(*_NETWORK_ERRORS):
        rest = raw.length_remaining  # None is not known, 0 still is to be read to its end
        if raw.chunked or (rest is not None and rest <= _DRAIN_BYTES):
            raw.read(_DRAIN_BYTES, decode_content=False)
    raw.close()


def _redirect(url: str, status: int, location: str | bool | None) -> Hop | Failure:
    if not isinstance(location, str):
        return Failure(FailReason.REDIRECT_REFUSED, f"HTTP {status} without a place to go", status)
    try:
        target = join_redirect(url, location.encode("latin-1", "replace"))
    except BadUrl as error:
        return Failure(FailReason.REDIRECT_REFUSED, f"redirect: {error}", status)
    if is_placeholder_url(target):
        return Failure(FailReason.PLACEHOLDER, "redirected to the host's placeholder", status)
    return Hop(status, target)


def opted_out(values: list[str]) -> bool:
    """Return whether ``X-Robots-Tag`` headers, to everybody or to our name, opt out of this client's use."""
    for value in values:
        for part in value.lower().split(","):
            agent, colon, directive = part.strip().rpartition(":")
            if colon and agent.strip() not in (_AGENT, "*"):
                break  # the rest of this header is addressed to another robot
            if directive.strip() in _OPT_OUT:
                return True
    return False


def parse_retry_after(value: str, now_s: float) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, or None if it is not readable.

    Source: RFC 9110 section 10.2.3 (a number of seconds, or an HTTP date).
    """
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    with suppress(TypeError, ValueError, IndexError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now_s)
    return None


def unpack(data: bytes, encoding: str, limit: int) -> bytes | Failure:
    """Undo a ``Content-Encoding`` that was not asked for, without making more than ``limit`` bytes."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return Failure(FailReason.NOT_AN_IMAGE, f"Content-Encoding {encoding[:40]!r}", 200)
    if encoding != "deflate" and not data.startswith(_GZIP):
        return data  # some servers label plain images as gzip
    for window in (31,) if encoding != "deflate" else (15, -15):
        with suppress(zlib.error):
            return _inflate(data, window, limit)
    return Failure(FailReason.NOT_AN_IMAGE, "the compressed body is damaged", 200)


def _inflate(data: bytes, window: int, limit: int) -> bytes | Failure:
    """Decompress a body of one or, of gzip, several members, in time linear in its length."""
    out, at = bytearray(), 0
    for _ in range(_MAX_MEMBERS):
        machine = zlib.decompressobj(window)
        while not machine.eof:
            piece = data[at : at + _SLICE_BYTES]
            if not piece:
                return Failure(FailReason.TRUNCATED, "the compressed body ends early", 200, transient=True)
            out += machine.decompress(piece, limit + 1 - len(out))
            if len(out) > limit:
                return Failure(FailReason.TOO_LARGE, f"more than {limit} bytes decompressed", 200)
            at += len(piece) - len(machine.unused_data)
        if not data.startswith(_GZIP, at):  # the end, or padding
            return bytes(out)
    return Failure(FailReason.TOO_LARGE, f"more than {_MAX_MEMBERS} gzip members", 200)


def _causes(error: BaseException) -> list[BaseException]:
    """List an exception and its causes, outermost first: the libraries wrap the one that says what happened."""
    found = [error]
    for one in found:  # which grows
        named = (getattr(one, "reason", None), one.__cause__, one.__context__, *one.args)
        inner = dict.fromkeys(item for item in named if isinstance(item, BaseException))
        found += [item for item in inner if item not in found]
    return found


def _failed(error: BaseException, status: int | None) -> Failure:
    """Turn an exception of the network or of the libraries into a failure."""
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
            return Failure(
                FailReason.TIMEOUT,
                "while reading the body" if answered else "before an answer",
                status,
                transient=True,
                answered=answered,
                aborted=True,
            )
        if isinstance(one, http.client.HTTPException) and ("header" in str(one) or "status line" in str(one)):
            return Failure(FailReason.TOO_LARGE, f"header: {one}", status, aborted=True)
    # The innermost cause's own words, without the objects and URLs that the wrappers print.
    plain = next((one.strerror for one in reversed(causes) if isinstance(one, OSError) and one.strerror), None)
    words = plain or f"{type(causes[-1]).__name__}: {str(causes[-1]) or type(causes[-1]).__name__}"[:200]
    if answered:
        return Failure(FailReason.TRUNCATED, words, status, transient=True)
    statuses = [one for one in causes if isinstance(one, http.client.BadStatusLine)]
    heard = not all(isinstance(one, http.client.RemoteDisconnected) for one in statuses)
    return Failure(FailReason.CONNECT, "not HTTP" if heard else words, transient=True, answered=heard)
