"""Look up host names, cache the answers, and refuse addresses that are not public.

Connections go to the address that was checked here (see :mod:`imnet_prep.download.net`). A name whose answer changes
between the check and the connection (DNS rebinding) therefore gains nothing.
"""

import ipaddress
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

# Not public, though not all of them are in the registries that ``ipaddress`` knows.
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # RFC 6890; 192.0.0.192 is a cloud's metadata service
        "168.63.129.16/32",  # Azure's host
        "64:ff9b:1::/48",  # RFC 8215: NAT64 of a site's own
        "fec0::/10",  # site-local, deprecated by RFC 3879
        "::/96",  # IPv4-compatible, deprecated by RFC 4291
    )
)
_WITH_IPV4_LAST = tuple(ipaddress.IPv6Network(one) for one in ("64:ff9b::/96", "::ffff:0:0:0/96"))  # RFC 6052, 2765
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214: the upper half of an interface identifier whose lower half is IPv4
_POSITIVE_TTL_S, _NEGATIVE_TTL_S = 300.0, 30.0
_MAX_CACHED = 20_000
_LOOKUPS = 16  # parallel getaddrinfo calls; each may hang for the resolver's own time-out


class NameFailed(OSError):
    """A name has no address. ``transient`` is true if the resolver could not say, false if the name does not exist."""

    def __init__(self, why: str, *, transient: bool) -> None:
        self.transient = transient
        super().__init__(why)


class AddressRefused(OSError):
    """Every address of a name is one that we do not connect to."""


class Address(NamedTuple):
    """A socket address without its port. ``more`` are the flow label and the scope of an IPv6 address."""

    family: int
    ip: str
    more: tuple[Any, ...] = ()


def is_public(ip: str) -> bool:
    """Return whether an address is on the public Internet.

    An IPv4 address inside an IPv6 address (mapped, translated, 6to4, NAT64, Teredo, ISATAP) must be public as well.
    """
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        number, last = int(address), ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        ends_in_it = any(address in network for network in _WITH_IPV4_LAST)
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ()), last if ends_in_it else None]
        if any(inner):
            return all(is_public(str(one)) for one in inner if one)
        if number >> 32 & 0xFFFFFFFF in _ISATAP and not is_public(str(last)):
            return False
    refused = any(address.version == one.version and address in one for one in _REFUSED)
    return address.is_global and not address.is_multicast and not refused


class Resolver:
    """Resolve names with a cache and a deadline.

    ``getaddrinfo`` cannot be interrupted, so it runs in threads of its own.
    """

    def __init__(self) -> None:
        self._cache: dict[str, tuple[Future[tuple[Address, ...]], float]] = {}  # with the time of the question
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_LOOKUPS, "resolver")

    def resolve(self, host: str, deadline: float) -> tuple[Address, ...]:
        """Return the addresses of a name in the system's order.

        Raises:
            NameFailed: The name has no address, or the resolver failed.
            TimeoutError: No answer by ``deadline`` (of ``time.monotonic``).
        """
        with suppress(ValueError):
            literal = ipaddress.ip_address(host)
            return (Address(socket.AF_INET if literal.version == 4 else socket.AF_INET6, host),)
        now = time.monotonic()
        with self._lock:
            lookup, asked = self._cache.get(host, (None, now))
            fresh_s = _NEGATIVE_TTL_S if lookup and lookup.done() and lookup.exception() else _POSITIVE_TTL_S
            if lookup is None or (lookup.done() and now - asked > fresh_s):
                if len(self._cache) >= _MAX_CACHED:
                    self._cache.clear()
                lookup = self._pool.submit(_getaddrinfo, host)
                self._cache[host] = lookup, now
        try:
            error = lookup.exception(max(0.0, deadline - now))
        except TimeoutError:
            raise TimeoutError("no answer from the name server in time") from None
        if isinstance(error, NameFailed):  # a fresh one: threads share the cached exception
            raise NameFailed(str(error), transient=error.transient)
        return lookup.result()


def _getaddrinfo(host: str) -> tuple[Address, ...]:
    try:
        found = socket.getaddrinfo(host, 80, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        gone = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
        raise NameFailed(error.strerror or str(error), transient=error.errno not in gone) from error
    except (OSError, UnicodeError) as error:
        raise NameFailed(str(error), transient=False) from error
    addresses = (
        Address(family, str(sockaddr[0]), sockaddr[2:])
        for family, _, _, _, sockaddr in found
        if family in (socket.AF_INET, socket.AF_INET6)
    )
    return tuple(dict.fromkeys(addresses))


def allowed(addresses: tuple[Address, ...], allow_private: bool) -> tuple[Address, ...]:
    """Return the addresses that we may connect to.

    Raises:
        AddressRefused: There is none.
    """
    kept = addresses if allow_private else tuple(one for one in addresses if is_public(one.ip))
    if not kept:
        shown = ", ".join(one.ip for one in addresses[:3]) or "nothing"
        raise AddressRefused(f"{shown} is not a public address (--allow-private)")
    return kept
