"""The options of a download, and the reasons for which a URL can fail."""

import enum
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

from imnet_prep.cluster import check_executor
from imnet_prep.errors import DownloadError
from imnet_prep.process_pool import process_count


class FailReason(enum.StrEnum):
    """Why a URL brought no image. The value is the key in ``--json``, the journal and ``failures.jsonl``."""

    DNS = "dns"  # the name does not resolve
    CONNECT = "connect"  # refused, reset or closed before an HTTP response, or not HTTP at all
    TLS = "tls"  # handshake or certificate
    TIMEOUT = "timeout"  # the connect, read or total time limit passed
    TOO_SLOW = "too_slow"  # the body came, below the minimum speed
    GONE = "gone"  # 404, 410
    HTTP_4XX = "http_4xx"  # the other 4xx
    HTTP_5XX = "http_5xx"
    RATE_LIMITED = "rate_limited"  # 429 after all retries, or a Retry-After beyond our patience
    REDIRECT_REFUSED = "redirect_refused"  # another scheme, no usable Location, or too many hops
    ADDRESS_REFUSED = "address_refused"  # a private, loopback, link-local or otherwise not public address
    TOO_LARGE = "too_large"  # more bytes, header bytes, decompressed bytes or pixels than allowed
    NOT_AN_IMAGE = "not_an_image"  # an answer that holds no decodable still image
    TRUNCATED = "truncated"  # the body or the image's data ends early
    PLACEHOLDER = "placeholder"  # a stand-in for a photograph that is gone
    UNWANTED_SIZE = "unwanted_size"  # more pixels, or a longer side, than --max-area and --max-aspect allow
    OPTED_OUT = "opted_out"  # X-Robots-Tag: noai or noimageai
    INTERNAL = "internal"  # a fault of ours or of this machine


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Limits of one fetch, and where it may go.

    Attributes:
        timeout_s: Total time of one attempt, with redirects, without waiting for the host's turn.
        connect_timeout_s: Part of it that connecting and the TLS handshake may take, each.
        read_timeout_s: Longest silence.
        min_bytes_per_s: Slowest average speed of a body after ``slow_grace_s`` seconds of it.
        max_bytes: Largest body, on the wire and decompressed.
        max_redirects: Most hops after the first.
        allow_private: Also connect to addresses that are not public.
        honour_opt_out: Obey ``X-Robots-Tag: noai`` and ``noimageai``.
        contact: A mail address or URL in the User-Agent, where a host's owner can reach the user; may be empty.
    """

    timeout_s: float = 30.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    min_bytes_per_s: float = 1024.0
    slow_grace_s: float = 10.0
    max_bytes: int = 20 << 20  # the largest ILSVRC2012 photograph has 15 MB
    max_redirects: int = 8  # browsers take 20; a photograph host needs one or two
    allow_private: bool = False
    honour_opt_out: bool = True
    contact: str = ""

    def __post_init__(self) -> None:
        usable = self.contact.isascii() and self.contact.isprintable() and not set(self.contact) & set("()\\")
        _check("--contact", usable and len(self.contact) <= 200, "a mail address or a URL", repr(self.contact))
        _check("--timeout-s", 0 < self.timeout_s < math.inf, "more than zero", self.timeout_s)
        _check("--max-bytes", self.max_bytes > 0, "more than zero", self.max_bytes)


@dataclass(frozen=True, slots=True)
class PoliteOptions:
    """How hosts are treated.

    Attributes:
        concurrency: Most fetches at a time, all hosts together.
        per_host: Most connections to one host (name and port) at a time.
        rate_per_host: Most requests to one host in a second; 0 is no limit.
        retries: Further attempts after the first, for failures that may pass.
        backoff_s: First pause before a retry; it doubles, with jitter, up to ``max_backoff_s``.
        max_retry_after_s: Longest ``Retry-After`` to wait for. A host that asks for more, and has served nothing yet,
            is given up; another one gets a last probe after this pause.
        dead_after: Attempts in a row that a host did not serve, which open its circuit breaker; three times as many
            where it has served before. Served is an image, or an answer that will not change (404, say).
        dead_probes: Probes of an open breaker that must fail before the host is given up; twice as many where it has
            served before.
        probe_pause_s: Pause before the first probe; it doubles.
    """

    concurrency: int = 64
    per_host: int = 6  # what browsers do
    rate_per_host: float = 0.0
    retries: int = 3
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    max_retry_after_s: float = 120.0
    dead_after: int = 10
    dead_probes: int = 2
    probe_pause_s: float = 5.0

    def __post_init__(self) -> None:
        _check("--concurrency", self.concurrency > 0, "more than zero", self.concurrency)
        _check("--per-host", self.per_host > 0, "more than zero", self.per_host)
        _check("--rate-per-host", 0 <= self.rate_per_host < math.inf, "zero or more", self.rate_per_host)
        _check("--retries", self.retries >= 0, "zero or more", self.retries)

    def backoff(self, attempts: int) -> float:
        """Return the seconds before a retry, with jitter, so that retries spread out."""
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(attempts, 16)) * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class ContentOptions:
    """What counts as an image, and how it is stored.

    Attributes:
        min_side: Images with a side under this many pixels are placeholders (tracking pixels, spacers).
        repeats_flat: Number of URLs with the same bytes that makes a flat picture (a sign, an icon) a placeholder.
        repeats_photo: The same for a picture that looks like a photograph. Both are multiplied by the median number of
            URLs that a photograph has in this folder, as a list may name every photograph many times.
        max_area: Images of more pixels are not wanted; None for the limit of every image.
        max_aspect: Images with a side more than this many times the other are not wanted; None for no limit.
        short_side: Store as JPEG with this short side in pixels; None stores the bytes as they came.
        quality: JPEG quality of ``short_side``.
    """

    min_side: int = 16
    repeats_flat: int = 5
    repeats_photo: int = 10
    max_area: int | None = None
    max_aspect: float | None = None
    short_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        _check(
            "--short-side", self.short_side is None or 8 <= self.short_side <= 8192, "8 to 8192 pixels", self.short_side
        )
        _check("--min-side", self.min_side >= 1, "1 or more pixels", self.min_side)
        _check("--max-area", self.max_area is None or self.max_area >= 1, "1 or more pixels", self.max_area)
        _check("--max-aspect", self.max_aspect is None or self.max_aspect >= 1, "1 or more", self.max_aspect)
        _check("--quality", 1 <= self.quality <= 100, "1 to 100", self.quality)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a list that is a table; None is found by its name, or not there.

    Attributes:
        url: Holds the URLs.
        class_name: Holds the classes.
        name: Holds the ids, which become file names.
    """

    url: str | None = None
    class_name: str | None = None
    name: str | None = None


BY_NAME = Columns()


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """All options of ``imnet-prep download``.

    Attributes:
        urls: URL lists: lines or tables, plain or compressed.
        columns: Which columns of a table to take.
        out: The download folder.
        wnid: Class of lines that name none.
        wnids: A file whose lines each begin with a wnid. Lines of other classes are left out.
        max_failed_frac: Share of failed URLs among the finished ones above which the run fails, 0-1.
        retry_failed: First make the URLs pending again that failed transiently, or for one of the ``lifted`` reasons.
        part: (I, N): take the hosts that fall to part I of N, counted from 1; None takes all.
        processes: Worker processes; 0 is one per core.
        executor: ``local``, or ``dask``: divide the hosts among Dask workers, each with a folder of its own in ``out``.
        scheduler: Address of the Dask scheduler.
    """

    urls: tuple[Path, ...]
    out: Path
    columns: Columns = BY_NAME
    wnid: str | None = None
    wnids: Path | None = None
    max_failed_frac: float = 1.0  # dead URLs are normal
    retry_failed: bool = False
    part: tuple[int, int] | None = None
    processes: int = 0
    executor: str = "local"
    scheduler: str | None = None
    fetch: FetchOptions = field(default_factory=FetchOptions)
    polite: PoliteOptions = field(default_factory=PoliteOptions)
    content: ContentOptions = field(default_factory=ContentOptions)

    def __post_init__(self) -> None:
        check_executor(self.executor, self.scheduler)
        fits = self.part is None or 1 <= self.part[0] <= self.part[1]
        _check("--part", fits, "I/N with I from 1 to N", "/".join(map(str, self.part or ())))
        _check("--max-failed", 0 <= self.max_failed_frac <= 1, "a share from 0% to 100%", f"{self.max_failed_frac:.4g}")

    def lifted(self) -> list[FailReason]:
        """Return the reasons for which no URL can fail with these options."""
        content = self.content
        return [
            *([FailReason.ADDRESS_REFUSED] if self.fetch.allow_private else []),
            *([] if self.fetch.honour_opt_out else [FailReason.OPTED_OUT]),
            *([FailReason.UNWANTED_SIZE] if content.max_area is None and content.max_aspect is None else []),
        ]

    def process_count(self) -> int:
        """Return the number of worker processes."""
        return min(process_count(self.processes or None), self.polite.concurrency)


def _check(name: str, fits: bool, expected: str, got: object) -> None:
    if not fits:
        raise DownloadError(f"{name} is out of range", expected=expected, got=str(got))
