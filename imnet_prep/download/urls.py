"""Normalise URLs, join redirects, and make host keys. Nothing here touches the network.

Source: RFC 3986 (syntax, section 5 for references), RFC 3987 section 3.1 (IRIs to URIs), IDNA 2008 by ``idna``.
"""

import hashlib
import ipaddress
import re
from urllib.parse import quote_from_bytes, unquote, urljoin, urlsplit

import idna

DEFAULT_PORT = {"http": 80, "https": 443}
MAX_URL_BYTES = 16384
_CLEAN_TAIL = re.compile(rb"[A-Za-z0-9\-._~:/?@!$&'()*+,;=]*")
_SPLIT = re.compile(rb"([A-Za-z][A-Za-z0-9+.\-]*):(?://)?([^/?#\\]*)([^#]*)", re.DOTALL)
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_\-.]*[a-z0-9_])?\.?")
_HEX = re.compile(rb"%(?![0-9A-Fa-f]{2})")
# Flickr answers a lost photograph with 302 to one of these: photo_unavailable.png, _l.png, _en-us.png, ...
_PLACEHOLDER_NAME = re.compile(r"photo_unavailable[^/]*", re.IGNORECASE)


class BadUrl(ValueError):
    """A URL, or a line of a list, that cannot be used; the message says why."""


def normalise_url(raw: bytes) -> str:
    """Return the ASCII form that is stored and requested.

    Scheme and host become lower-case, and IDN punycode. Spaces and other bytes outside RFC 3986 are percent-encoded as
    they are, whatever their encoding. Fragment, credentials and a default port are dropped. An empty path becomes
    ``/``.

    Raises:
        BadUrl: The scheme is missing or not http, the host is missing or invalid, the port is bad, or it is too long.
    """
    raw = raw.strip(b" \t\r\n\x0b\x0c")
    if len(raw) > MAX_URL_BYTES:
        raise BadUrl(f"longer than {MAX_URL_BYTES} bytes")
    parts = _SPLIT.fullmatch(raw.partition(b"#")[0])
    if not parts:
        raise BadUrl("no scheme")
    scheme = parts[1].decode("ascii").lower()
    if scheme not in DEFAULT_PORT:
        raise BadUrl(f"scheme {scheme} is not http or https")
    if raw[len(scheme) : len(scheme) + 3] != b"://":
        raise BadUrl("no // after the scheme")
    host, port = _authority(parts[2])
    tail = parts[3] if parts[3].startswith(b"/") else b"/" + parts[3]
    if not _CLEAN_TAIL.fullmatch(tail):
        tail = quote_from_bytes(_HEX.sub(b"%25", tail), "-._~:/?[]@!$&'()*+,;=%").encode("ascii")
    suffix = "" if port in (None, DEFAULT_PORT[scheme]) else f":{port}"
    return f"{scheme}://{host}{suffix}{tail.decode('ascii')}"


def _authority(raw: bytes) -> tuple[str, int | None]:
    """Split ``user:password@host:port``. The credentials are dropped: never stored, sent or shown."""
    raw = raw.rpartition(b"@")[2]
    if raw.startswith(b"["):
        literal, bracket, rest = raw[1:].partition(b"]")
        if not bracket or (rest and not rest.startswith(b":")):
            raise BadUrl("bad IPv6 address")
        try:
            host = f"[{ipaddress.IPv6Address(literal.decode('ascii').partition('%')[0])}]"
        except ValueError as error:
            raise BadUrl("bad IPv6 address") from error
        return host, _port(rest[1:])
    name, _, port = raw.partition(b":")
    return _host(name), _port(port)


def _port(raw: bytes) -> int | None:
    if raw and not (raw.isdigit() and 0 < int(raw[:6]) <= 65535):
        raise BadUrl("bad port")
    return int(raw) if raw else None


def _host(raw: bytes) -> str:
    if not raw:
        raise BadUrl("no host")
    try:
        text = raw.decode("utf-8").lower()
        if not text.isascii():
            text = idna.encode(text, uts46=True).decode("ascii")
    except (UnicodeError, idna.IDNAError) as error:
        raise BadUrl("host is not a valid name") from error
    if (
        not _HOST.fullmatch(text)
        or ".." in text
        or len(text) > 253
        or any(len(label) > 63 for label in text.split("."))
    ):
        raise BadUrl("host is not a valid name")
    return text


def join_redirect(base: str, location: bytes) -> str:
    """Resolve a ``Location`` header, relative or not, against the URL that answered with it.

    Raises:
        BadUrl: The header is empty, or the URL is bad.
    """
    if not location.strip():
        raise BadUrl("empty Location")
    # Latin-1 keeps every byte as one character through urljoin.
    try:
        joined = urljoin(base, location.strip().decode("latin-1"))
    except ValueError as error:
        raise BadUrl("Location is not a URL") from error
    return normalise_url(joined.encode("latin-1"))


def is_placeholder_url(url: str) -> bool:
    """Return whether a URL is a host's stand-in for a lost photograph, by its file name."""
    if "%" not in url and "unavailable" not in url.lower():  # the common case, without taking the URL apart
        return False
    return bool(_PLACEHOLDER_NAME.fullmatch(unquote(urlsplit(url).path).rpartition("/")[2]))


def host_of(url: str) -> str:
    """Return the politeness key of a normalised URL, ``name`` or ``name:port``; http and https are one host."""
    return url.split("/", 3)[2]


def host_key(host: str) -> int:
    """Return a stable positive 63-bit key of a host, as stored in the journal."""
    return int.from_bytes(hashlib.blake2b(host.encode(), digest_size=8).digest(), "little") >> 1
