"""No list leads us to an address that is not public."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest

from imnet_prep.download import DownloadOptions, FetchOptions, PoliteOptions, download
from imnet_prep.download.addresses import Address, AddressRefused, NameFailed, Resolver, allowed, is_public
from imnet_prep.download.fetch import Body, Failure, Fetcher
from tests.imnet_prep.download.servers import Server, images, write_list


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0",
        "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::7f00:1",
        "2001:db8::1", "2001:0:7f00:1::", "192.0.0.192", "168.63.129.16", "fec0::1", "feff::1", "64:ff9b:1::808:808",
        "::ffff:0:127.0.0.1", "::ffff:0:a00:1", "2606:4700::5efe:7f00:1", "2606:4700::200:5efe:a9fe:a9fe",
        "fe80::5efe:808:808", "::ffff:168.63.129.16", "2002:a83f:8110::",
    ],
)  # fmt: skip
def test_an_inner_address_is_not_public(ip: str) -> None:
    assert not is_public(ip)


@pytest.mark.parametrize(
    "ip",
    [
        "8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8",
        "2606:4700::5efe:808:808", "168.63.129.17", "192.0.1.1",
    ],
)  # fmt: skip
def test_an_outer_address_is_public(ip: str) -> None:
    assert is_public(ip)


def test_of_a_mixed_name_only_the_public_addresses_are_used() -> None:
    mixed = (Address(socket.AF_INET, "127.0.0.1"), Address(socket.AF_INET, "8.8.8.8"))
    assert [one.ip for one in allowed(mixed, allow_private=False)] == ["8.8.8.8"]
    with pytest.raises(AddressRefused, match="127"):
        allowed(mixed[:1], allow_private=False)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Fetch every way of writing the loopback address, at a server that would answer, without --allow-private."""
    folder = tmp_path_factory.mktemp("addresses")
    with Server(images) as server:
        hosts = [
            "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.0.0.1", "[::1]",
            "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "0", "169.254.169.254", "user@127.0.0.1", "LOCALHOST.",
        ]  # fmt: skip
        urls = [f"http://{host}:{server.port}/{number}.jpg" for number, host in enumerate(hosts)]
        options = DownloadOptions(
            (write_list(folder / "list.txt", urls),), folder / "out", polite=PoliteOptions(retries=0), processes=1
        )
        result = download(options)
        assert result.totals.ok == 0
        assert server.connections == 0
    lines = map(json.loads, (folder / "out" / "failures.jsonl").read_text().splitlines())
    return {hosts[int(item["id"].partition("_")[2])]: item["reason"] for item in lines}


def test_every_way_of_writing_loopback_is_refused_before_connecting(refused: dict[str, str]) -> None:
    assert len(refused) == 15
    assert set(refused.values()) == {"address_refused"}


def _fetcher(resolver: Resolver, options: FetchOptions) -> Fetcher:
    return Fetcher(options, 4, resolver)


class _Rebinding(Resolver):
    """A name server that says a public address first and loopback ever after, and the other way round."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self.answers = answers

    def resolve(self, host: str, deadline: float) -> tuple[Address, ...]:
        return (Address(socket.AF_INET, self.answers.pop(0)),)


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def connect(_sock: socket.socket, address: object) -> None:
        tried.append(address)
        raise ConnectionRefusedError(111, "refused by the test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    fetcher = _fetcher(_Rebinding(["93.184.216.34", "127.0.0.1"]), FetchOptions())
    first = fetcher.fetch("http://rebind.example/x", 0)
    second = fetcher.fetch("http://rebind.example/x", 0)
    assert tried == [("93.184.216.34", 80)]
    assert isinstance(first, Failure)
    assert first.reason == "connect"
    assert isinstance(second, Failure)
    assert second.reason == "address_refused"


def test_the_host_header_names_the_host_and_not_the_address() -> None:
    with Server(images) as server:
        fetcher = _fetcher(_Rebinding(["127.0.0.1"]), FetchOptions(allow_private=True))
        assert isinstance(fetcher.fetch(f"http://photos.example:{server.port}/1", 0), Body)
        assert server.host_headers == {f"photos.example:{server.port}"}


def test_a_trusted_certificate_is_accepted_and_its_name_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.imnet_prep.download.servers import DATA

    monkeypatch.setenv("SSL_CERT_FILE", str(DATA / "localhost.crt"))
    with Server(images, tls=True) as server:
        fetcher = _fetcher(_Rebinding(["127.0.0.1"] * 2), FetchOptions(allow_private=True))
        assert isinstance(fetcher.fetch(f"https://localhost:{server.port}/1", 0), Body)
        other = fetcher.fetch(f"https://other.example:{server.port}/1", 0)
    assert isinstance(other, Failure)
    assert other.reason == "tls"


def test_a_stalled_tls_handshake_ends_at_its_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = FetchOptions(allow_private=True, timeout_s=0.5)
        begun = time.monotonic()
        result = _fetcher(Resolver(), options).fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/x", 0)
    assert isinstance(result, Failure)
    assert result.reason == "timeout"
    assert time.monotonic() - begun < 5


def test_a_stalled_name_server_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(*_args: object, **_kwargs: object) -> list[object]:
        release.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    begun = time.monotonic()
    result = _fetcher(Resolver(), FetchOptions(timeout_s=0.5)).fetch("http://slow-dns.example/x", 0)
    assert time.monotonic() - begun < 5
    release.set()
    assert isinstance(result, Failure)
    assert result.reason == "timeout"


def test_a_name_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = socket.getaddrinfo

    def counted(host: str, *args: object, **kwargs: object) -> object:
        asked.append(host)
        return real("127.0.0.1", *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    resolver = Resolver()
    for _ in range(3):
        assert resolver.resolve("photos.example", time.monotonic() + 5)[0].ip == "127.0.0.1"
    assert asked == ["photos.example"]


def test_a_name_without_address_says_so_each_time() -> None:
    resolver = Resolver()
    for _ in range(2):
        with pytest.raises(NameFailed):
            resolver.resolve("does-not-exist.invalid", time.monotonic() + 10)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Server(images) as proxy, Server(images) as server:
        monkeypatch.setenv("http_proxy", proxy.url("/"))
        fetcher = _fetcher(Resolver(), FetchOptions(allow_private=True))
        assert isinstance(fetcher.fetch(server.url("/1"), 0), Body)
        assert proxy.connections == 0
