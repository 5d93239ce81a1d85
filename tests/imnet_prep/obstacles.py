"""What stands in a command's way: a full disk, folders and files it may not touch, things that are no files."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a disk of a given size, in memory; the test is skipped where that is not permitted."""
    folder.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    if subprocess.run(call, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Make a folder that another user may enter, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be a user for whom the permissions of files count; what is to be imported must have been before."""
    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def make_fifo(path: Path) -> None:
    """Make a FIFO, for whose writer an open would wait."""
    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    """Make a socket, which no open can read."""
    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


def kill(pid: int) -> None:
    """Kill a process, which cannot do anything about it."""
    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    os.kill(pid, signal.SIGKILL)


@contextmanager
def no_hang(limit_s: int) -> Iterator[None]:
    """Fail, in place of waiting for ever."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    if sys.platform == "win32":
        pytest.skip("Windows has nothing like it")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def names_below(folder: Path) -> set[str]:
    """Name everything in a folder and below it, hidden names too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
