"""Several machines on one: network namespaces with own addresses, host names, and folders."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

HUB = "10.0.0.1"
MACHINES = [f"10.0.0.{number}" for number in (11, 12, 13, 14)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def inside(network: str) -> list[str]:
    """Return the words before a command that run it in a network namespace."""
    return ["ip", "netns", "exec", network]


@contextmanager
def network(hub_addresses: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Make five network namespaces on a bridge, or skip: a hub, and four with the addresses ``MACHINES``.

    Args:
        hub_addresses: Further addresses of the hub.

    Yields:
        Their names: the hub's, and those of the others.
    """
    names = [f"imnet-{os.getpid()}-{number}" for number in range(5)]
    hub, *others = names
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", hub, "link", "add", "br0", "type", "bridge")
            for address in (HUB, *hub_addresses):
                ip("-n", hub, "addr", "add", f"{address}/24", "dev", "br0")
            ip("-n", hub, "link", "set", "br0", "up")
            for number, (name, address) in enumerate(zip(others, MACHINES, strict=True)):
                ip("-n", hub, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("-n", hub, "link", "set", f"v{number}", "master", "br0", "up")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces: {getattr(error, 'stderr', b'').decode() or error}")
        yield hub, others
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Host:
    """A machine with a host name, an own folder in place of ``here``, and host names for all addresses.

    Args:
        network: The name of its network namespace.
        name: Its host name.
        here: The folder in whose place it has its own, which is ``folder``.
        folder: Its own folder; made here.
        hosts: In place of ``/etc/hosts``.
    """

    def __init__(self, network: str, name: str, here: Path, folder: Path, hosts: Path) -> None:
        self.name, self.folder, self._network = name, folder, network
        folder.mkdir(parents=True)
        begin = 'hostname "$0" && mount --bind "$1" "$2" && mount --bind "$3" /etc/hosts && echo ready && exec cat'
        words = ["unshare", "--mount", "--uts", "sh", "-c", begin, name, str(folder), str(here), str(hosts)]
        self._holds = subprocess.Popen([*inside(network), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holds.stdout is not None
        if self._holds.stdout.readline() != b"ready\n":
            self.close()
            pytest.skip("no mount namespaces")
        enter = ["nsenter", "--target", str(self._holds.pid), "--mount", "--uts", "--net"]
        self.around = [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(here)]

    def hide(self, folder: Path) -> None:
        """Put an empty folder in place of one."""
        subprocess.run([*self.around, "mount", "-t", "tmpfs", "none", str(folder)], check=True)

    def stop(self) -> None:
        """Stop all that runs on it, but for what holds the namespaces."""
        self._signal("SIGSTOP")

    def kill(self) -> None:
        """Kill all that runs on it, but for what holds the namespaces."""
        self._signal("SIGKILL")

    def _signal(self, name: str) -> None:
        found = subprocess.run(["ip", "netns", "pids", self._network], check=True, capture_output=True).stdout
        for process in set(map(int, found.split())) - {self._holds.pid}:
            with suppress(ProcessLookupError):
                os.kill(process, signal.Signals[name])

    def close(self) -> None:
        """End the process that holds the namespaces; they end with the last one in them."""
        self._holds.kill()
        self._holds.communicate()


@contextmanager
def hosts(folder: Path, here: Path, addresses: Sequence[str] = ()) -> Iterator[list[Host]]:
    """Make ``head`` and ``host1`` to ``host4``, each with an own folder in place of ``here``.

    Args:
        folder: Takes their folders.
        here: A folder.
        addresses: Further addresses of ``head``.
    """
    names = {"head": HUB, **{f"host{number}": address for number, address in enumerate(MACHINES, 1)}}
    listed = folder / "hosts"
    lines = [f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **names}.items()]
    listed.write_text("".join(lines), "utf-8")
    with network(addresses) as (hub, others), ExitStack() as stack:
        found = []
        for name, network_name in zip(names, [hub, *others], strict=True):
            found.append(Host(network_name, name, here, folder / name, listed))
            stack.callback(found[-1].close)
        yield found
