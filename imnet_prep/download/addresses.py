"""Names to addresses, cached, and which addresses a stranger's list may lead us to.

The connection is made to the address that was checked here (see :mod:`imnet_prep.download.net`), so a name that changes
its answer between check and use (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_POSITIVE_TTL_S, _NEGATIVE_TTL_S = 300.0, 30.0
_MAX_CACHED = 20_000
_LOOKUPS = 16  # parallel getaddrinfo calls; each may hang for the resolver's own time-out


class NameFailed(OSError):
    """A name gives no address. ``transient``: the resolver could not say (as against: there is none)."""

    def __init__(self, why: str, *, transient: bool) -> None:
        self.transient = transient
        super().__init__(why)


class AddressRefused(OSError):
    """All addresses of a name are ones we do not connect to."""


@dataclass(frozen=True, slots=True)
class Address:
    """A socket address of one name: ``family`` and the ``sockaddr`` without the port."""

    family: int
    ip: str
    scope: int = 0

    def sockaddr(self, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """Return what ``socket.connect`` takes."""
        return (self.ip, port) if self.family == socket.AF_INET else (self.ip, port, 0, self.scope)


def is_public(ip: str) -> bool:
    """Say whether an address is on the open Internet; IPv4 inside IPv6 (mapped, 6to4, NAT64, Teredo) is judged too."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ()), nat64]
        if any(inner):
            return all(one.is_global and not one.is_multicast for one in inner if one)
        if int(address) >> 32 == 0:  # ::/96, IPv4-compatible, long deprecated
            return False
    return address.is_global and not address.is_multicast


class Resolver:
    """A caching resolver with a deadline: ``getaddrinfo`` cannot be interrupted, so it runs in threads of its own."""

    def __init__(self) -> None:
        self._cache: dict[str, Future[tuple[tuple[Address, ...] | NameFailed, float]]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_LOOKUPS, "resolver")

    def resolve(self, host: str, deadline: float) -> tuple[Address, ...]:
        """Return a name's addresses in the system's order.

        Raises:
            NameFailed: there is none, or the resolver failed.
            TimeoutError: no answer by ``deadline`` (of ``time.monotonic``).
        """
        with suppress(ValueError):
            literal = ipaddress.ip_address(host)
            return (Address(socket.AF_INET if literal.version == 4 else socket.AF_INET6, host),)
        with self._lock:
            lookup = self._cache.get(host)
            if lookup is None or (lookup.done() and lookup.result()[1] < time.monotonic()):
                if len(self._cache) >= _MAX_CACHED:
                    self._cache.clear()
                lookup = self._cache[host] = self._pool.submit(_look_up, host)
        try:
            found, _ = lookup.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise TimeoutError("no answer from the name server in time") from None
        if isinstance(found, NameFailed):
            raise NameFailed(str(found), transient=found.transient)
        return found


def _look_up(host: str) -> tuple[tuple[Address, ...] | NameFailed, float]:
    """Ask the system for a name; the answer holds until the second value, of ``time.monotonic``."""
    try:
        return _getaddrinfo(host), time.monotonic() + _POSITIVE_TTL_S
    except NameFailed as error:
        return error, time.monotonic() + _NEGATIVE_TTL_S


def _getaddrinfo(host: str) -> tuple[Address, ...]:
    try:
        found = socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        gone = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
        raise NameFailed(error.strerror or str(error), transient=error.errno not in gone) from error
    except (OSError, UnicodeError) as error:
        raise NameFailed(str(error), transient=False) from error
    addresses = (
        Address(family, str(sockaddr[0]), int(sockaddr[3]) if len(sockaddr) == 4 else 0)
        for family, _, _, _, sockaddr in found
        if family in (socket.AF_INET, socket.AF_INET6)
    )
    return tuple(dict.fromkeys(addresses))


def allowed(addresses: tuple[Address, ...], allow_private: bool) -> tuple[Address, ...]:
    """Keep the addresses that we may connect to.

    Raises:
        AddressRefused: none is left.
    """
    kept = addresses if allow_private else tuple(one for one in addresses if is_public(one.ip))
    if not kept:
        shown = ", ".join(one.ip for one in addresses[:3]) or "nothing"
        raise AddressRefused(f"{shown} is not a public address")
    return kept
