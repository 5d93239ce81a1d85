"""A transport for ``requests`` that is safe with URLs from strangers.

* A connection goes to an address that was checked; Host, SNI and certificate still name the host.
* Every read, TLS included, is bounded by the attempt's total deadline. Slow headers and slow handshakes cannot outlive
  it. The body must also keep a minimum speed.
* An answer belongs to its request: interim answers are passed over, its length is beyond doubt, and a connection on
  which anything follows it is not used again.
* Proxies, netrc, cookies and redirects of the libraries are not used.
"""

import http.client
import os
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import Any

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.wait import wait_for_read

from imnet_prep.download.addresses import Resolver, allowed
from imnet_prep.download.options import FetchOptions

_MAX_ADDRESSES = 3  # of a name that are tried
_PROOF_S = 0.1  # that a host is given to send more than its first answer
_POOLED_HOSTS = 256  # per process, with their idle connections
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}[ \t]*(;.*)?\r?\n", re.DOTALL)


class TooSlow(OSError):
    """A body that arrives below the minimum speed."""


class Budget(threading.local):
    """The limits of the attempt that this thread is making. Sockets consult it at every read."""

    deadline = body_started = 0.0
    options: FetchOptions
    received = 0
    is_peeking = False

    def start(self, options: FetchOptions, deadline: float) -> None:
        """Begin an exchange that ends at ``deadline`` (of ``time.monotonic``)."""
        self.deadline, self.options, self.body_started = deadline, options, 0.0

    def body(self) -> None:
        """Note that the headers have arrived. The minimum speed holds from here on."""
        self.body_started, self.received = time.monotonic(), 0

    def extend(self, seconds: float) -> None:
        """Let the exchange end later: we did not read meanwhile."""
        self.deadline += seconds
        self.body_started += seconds

    def left(self) -> float:
        """Return the seconds left.

        Raises:
            TimeoutError: No time is left.
            TooSlow: The body arrives too slowly.
        """
        now = time.monotonic()
        left = self.deadline - now
        if self.body_started:
            spent = now - self.body_started
            slow = self.received < spent * self.options.min_bytes_per_s
            if slow and (spent > self.options.slow_grace_s or (left <= 0 and self.received)):
                raise TooSlow(f"{self.received} bytes in {spent:.1f} s")
        if left <= 0:
            raise TimeoutError("total time limit")
        return left


BUDGET = Budget()


class _Budgeted:
    """A mixin for socket classes whose reads keep to the thread's budget."""

    def settimeout(self: Any, value: float | None) -> None:
        if value != self.gettimeout():  # a system call, for which the threads of a process queue
            super().settimeout(value)  # type: ignore[misc]

    def recv_into(self: Any, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        if BUDGET.is_peeking:
            return 0  # for what was read already, the system is not asked
        self.settimeout(min(BUDGET.left(), BUDGET.options.read_timeout_s))
        try:
            count: int = super().recv_into(buffer, nbytes or len(memoryview(buffer)), flags)  # type: ignore[misc]
        except TimeoutError:
            BUDGET.left()  # raises if the total limit or the speed is the cause
            raise
        BUDGET.received += count
        return count


class _Socket(_Budgeted, socket.socket):
    """A TCP socket with a budget."""


class _TlsSocket(_Budgeted, ssl.SSLSocket):
    """A TLS socket with a budget."""


class _Answer(http.client.HTTPResponse):
    """An answer whose end is beyond doubt; otherwise the next URL would get the rest of it, or another's image.

    Source: RFC 9110 section 15.2 (interim answers), RFC 9112 sections 6 and 7.1 (length, chunks).
    """

    def __init__(self, sock: socket.socket, connection: "_Checked", **kwargs: Any) -> None:
        super().__init__(sock, **kwargs)
        self._socket, self._connection = sock, connection
        if hasattr(socket, "TCP_QUICKACK"):  # a server may hold the body back until its headers are acknowledged
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _read_status(self) -> tuple[str, int, str]:
        """Return the first status line that is not of an interim answer, such as 103 Early Hints."""
        while True:
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if found[1] >= 200 or found[1] == http.client.SWITCHING_PROTOCOLS:
                return found
            http.client.parse_headers(self.fp)

    def begin(self) -> None:
        """Read up to the body.

        Raises:
            HTTPException: The headers leave open where the body ends.
        """
        super().begin()
        lengths = {one.strip() for value in self.headers.get_all("Content-Length", []) for one in value.split(",")}
        codings = [value.strip().lower() for value in self.headers.get_all("Transfer-Encoding", [])]
        if len(lengths) > 1 or not all(one.isascii() and one.isdigit() for one in lengths):
            raise http.client.HTTPException(f"Content-Length {', '.join(sorted(lengths))[:80]!r}")
        if codings not in ([], ["chunked"]):
            raise http.client.HTTPException(f"Transfer-Encoding {', '.join(codings)[:80]!r}")
        odd = bool(lengths and codings) or bool(codings and self.version < 11) or self.status < 200
        if odd or self._connection.is_distrusted():
            self.will_close = True

    def _read_next_chunk_size(self) -> int:
        line = self.fp.readline(1 << 16)
        if not _CHUNK_SIZE.fullmatch(line):
            raise http.client.HTTPException(f"a chunk of size {line[:20]!r}")
        return int(line.split(b";")[0], 16)

    def _close_conn(self) -> None:
        """End the answer, and the connection where anything was read that follows on it."""
        if not self.will_close and self._is_followed():
            self._connection.distrust()
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        super()._close_conn()  # type: ignore[misc]

    def _is_followed(self) -> bool:
        BUDGET.is_peeking = True
        try:
            return bool(self.fp.peek(1)) or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0)
        finally:
            BUDGET.is_peeking = False


class _Checked:
    """A mixin for connection classes that resolves, checks and connects."""

    adapter: "SafeAdapter"
    host: str
    port: int
    sock: socket.socket | None

    def response_class(self, sock: socket.socket, **kwargs: Any) -> _Answer:
        """Return the answer that is about to come."""
        return _Answer(sock, self, **kwargs)

    @property
    def is_connected(self) -> bool:
        """Whether the connection can be used again: it has not ended, and nothing has come since the last answer."""
        if self.sock is None:
            return False
        host = (self.host, self.port)
        # A host that answers twice does so from the beginning: wait for that before the first reuse of a connection.
        if not wait_for_read(self.sock, timeout=0.0 if host in self.adapter.proved else _PROOF_S):
            self.adapter.proved.add(host)
            return True
        self.sock.settimeout(0)
        with suppress(OSError):  # it was cut; or TLS had something of its own to say
            if self.sock.recv(1):
                self.distrust()
        return False

    def distrust(self) -> None:
        """Use every later connection to this host for one request."""
        self.adapter.distrusted.add((self.host, self.port))

    def is_distrusted(self) -> bool:
        """Return whether this host has sent more than its answers."""
        return (self.host, self.port) in self.adapter.distrusted

    def _new_conn(self) -> socket.socket:
        options = self.adapter.options
        addresses = self.adapter.resolver.resolve(self.host.strip("[]"), BUDGET.deadline)
        error: OSError = OSError("no address")
        for address in allowed(addresses, options.allow_private)[:_MAX_ADDRESSES]:
            sock = _Socket(address.family, socket.SOCK_STREAM)
            try:
                sock.settimeout(min(BUDGET.left(), options.connect_timeout_s))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect((address.ip, self.port, *address.more))
                # The socket's time-out bounds the whole TLS handshake that may follow.
                sock.settimeout(min(BUDGET.left(), options.connect_timeout_s))
                return sock
            except OSError as failure:
                sock.close()
                error = failure
        raise error


class SafeAdapter(HTTPAdapter):
    """The transport of a worker process: one connection pool and one TLS context for all its threads."""

    def __init__(self, options: FetchOptions, resolver: Resolver, per_host: int) -> None:
        self.options, self.resolver = options, resolver
        self.distrusted: set[tuple[str, int]] = set()
        self.proved: set[tuple[str, int]] = set()  # nothing came after a first answer
        super().__init__(pool_connections=_POOLED_HOSTS, pool_maxsize=per_host, max_retries=0)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **_kwargs: Any) -> None:
        """Make pools of connections that belong to this adapter."""
        plain = type("Plain", (_Checked, HTTPConnection), {"adapter": self})
        tls = type("Tls", (_Checked, HTTPSConnection), {"adapter": self})
        context = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())
        context.sslsocket_class = _TlsSocket
        self.poolmanager = urllib3.PoolManager(
            num_pools=connections, maxsize=maxsize, block=block, ssl_context=context, retries=False
        )
        self.poolmanager.pool_classes_by_scheme = {
            "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
        }

    def get_connection_with_tls_context(self, request: Any, *_args: Any, **_kwargs: Any) -> Any:
        """Return the host's pool. The TLS context is always the manager's, and there are no proxies."""
        return self.poolmanager.connection_from_url(request.url)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave verification to the shared TLS context, which always asks for it."""

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        """Wrap the answer without a cookie jar and without guessing an encoding; ``raw`` has the headers."""
        response = requests.Response()
        response.status_code, response.raw = resp.status, resp
        return response
