"""``requests`` with the safety a list from strangers needs, put where the connection is made and where bytes arrive.

* A connection goes to the address that the resolver gave and the policy allowed; Host, SNI and certificate still name
  the host.
* Every read on every socket, TLS included, is bounded by the attempt's total deadline, so that neither dripped headers
  nor a slow handshake outlives it, and by a minimum speed once the body flows.
* No proxy, netrc, cookie or redirect handling of the libraries' own.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections import OrderedDict
from typing import Any

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from imnet_prep.download.addresses import Resolver, allowed
from imnet_prep.download.options import FetchOptions

_MAX_ADDRESSES = 3  # of a name that are tried
_POOLED_HOSTS = 256  # per process, with their idle connections


class TooSlow(OSError):
    """A body that flows below the minimum speed."""


class Budget(threading.local):
    """The limits of the attempt that this thread is making; sockets consult it at every read."""

    deadline: float = 0.0
    options: FetchOptions
    body_started: float = 0.0
    received: int = 0

    def start(self, options: FetchOptions, deadline: float) -> None:
        """Begin an exchange that ends at ``deadline`` (of ``time.monotonic``)."""
        self.deadline, self.options = deadline, options
        self.body_started, self.received = 0.0, 0

    def body(self) -> None:
        """Note that the headers are read: from here on the speed counts."""
        self.body_started, self.received = time.monotonic(), 0

    def left(self) -> float:
        """Return the seconds left.

        Raises:
            TimeoutError: none. TooSlow: none, or too few bytes so far, while a body is flowing.
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
    """Mixed into a socket class: its reads know the thread's budget."""

    def recv_into(self: Any, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(min(BUDGET.left(), BUDGET.options.read_timeout_s))
        try:
            count: int = super().recv_into(buffer, nbytes or len(memoryview(buffer)), flags)  # type: ignore[misc]
        except TimeoutError:
            BUDGET.left()  # raises where it was the total limit or the speed
            raise
        BUDGET.received += count
        return count


class _Socket(_Budgeted, socket.socket):
    """A TCP socket with a budget."""


class _TlsSocket(_Budgeted, ssl.SSLSocket):
    """The same over TLS."""


class _Checked:
    """Mixed into a connection class: resolve, check, connect, in the only place where connections are made."""

    safe_adapter: SafeAdapter
    host: str
    port: int

    def _new_conn(self) -> socket.socket:
        options = self.safe_adapter.options
        addresses = self.safe_adapter.resolver.resolve(self.host.strip("[]"), BUDGET.deadline)
        error: OSError = OSError("no address")
        for address in allowed(addresses, options.allow_private)[:_MAX_ADDRESSES]:
            sock = _Socket(address.family, socket.SOCK_STREAM)
            try:
                sock.settimeout(min(BUDGET.left(), options.connect_timeout_s))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address.sockaddr(self.port))
                # The TLS handshake that may follow is bounded as a whole by the socket's time-out.
                sock.settimeout(min(BUDGET.left(), options.connect_timeout_s))
                return sock
            except OSError as failure:
                sock.close()
                error = failure
        raise error


class SafeAdapter(HTTPAdapter):
    """The transport of a worker's session: one connection pool and one TLS context for all its threads."""

    def __init__(self, options: FetchOptions, resolver: Resolver, per_host: int) -> None:
        self.options, self.resolver = options, resolver
        super().__init__(pool_connections=_POOLED_HOSTS, pool_maxsize=per_host, max_retries=0)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **_kwargs: Any) -> None:
        """Make the pools out of connections that belong to this adapter."""
        plain = type("Plain", (_Checked, HTTPConnection), {"safe_adapter": self})
        tls = type("Tls", (_Checked, HTTPSConnection), {"safe_adapter": self})
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
        """Return the host's pool; whatever the call says, the TLS context is the manager's and there are no proxies."""
        return self.poolmanager.connection_from_url(request.url)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave verification to the shared TLS context, which always asks for it."""

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        """Wrap status and answer: an image needs no cookie jar, no encoding guess, and ``raw`` has the headers."""
        response = requests.Response()
        response.status_code, response.raw = resp.status, resp
        return response


def make_session(options: FetchOptions, resolver: Resolver, per_host: int, user_agent: str) -> requests.Session:
    """Return a worker's session. Only ``http`` and ``https`` have a transport."""
    session = requests.Session()
    session.trust_env = False  # no proxies, no netrc: the connection goes where we checked, with nobody's password
    session.adapters = OrderedDict.fromkeys(("http://", "https://"), SafeAdapter(options, resolver, per_host))
    session.headers = CaseInsensitiveDict(
        {"User-Agent": user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    )
    return session
