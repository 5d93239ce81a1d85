"""Locks, reads at any offset and names, also as systems without Linux's calls have them."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imnet_prep import files
from imnet_prep.files import PlainFile, exclusive_lock, is_possible_name, open_plain
from tests.imnet_prep.obstacles import kill, make_fifo, no_hang

HOLDER = """
import sys
from pathlib import Path
from imnet_prep.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Start a process that holds a lock until its stdin ends."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=-1, stdout=-1, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_lock_is_held_by_one_process_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with hold(path) as holder:
        with pytest.raises(BlockingIOError), exclusive_lock(path):
            pass
        assert path.exists()
        holder.communicate()
    assert not path.exists()
    with exclusive_lock(path), pytest.raises(BlockingIOError), exclusive_lock(path):
        pass
    assert not path.exists()


def test_a_process_that_is_killed_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with hold(path) as holder:
        kill(holder.pid)
        holder.wait()
        assert path.exists()
        with exclusive_lock(path):
            pass
    assert not path.exists()


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text", encoding="utf-8")
    (tmp_path / "x.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"x\.lock"), exclusive_lock(tmp_path / "x.lock"):
        pass
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "text"


@pytest.mark.parametrize("positioned", [True, False])
def test_threads_read_one_file_at_many_places(
    tmp_path: Path, positioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not positioned:
        monkeypatch.setattr(files, "_pread", None)
    data = b"".join(number.to_bytes(4, "little") for number in range(50_000))
    (tmp_path / "x").write_bytes(data)
    file = PlainFile(tmp_path / "x")
    assert file.size_bytes == len(data)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: file.read(100, start), range(0, len(data), 100)))
    assert b"".join(parts) == data
    assert file.read(100, len(data) - 10) == data[-10:]
    assert file.read(100, len(data)) == b""


def test_a_fifo_or_a_folder_is_no_plain_file(tmp_path: Path) -> None:
    make_fifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with no_hang(20), pytest.raises(OSError, match="not a regular file"):
            open_plain(path)


@pytest.mark.parametrize(
    ("name", "there"), [("n01440764", True), ("con", False), ("NUL.jpg", False), ("cat.", False), ("con_1", True)]
)
def test_windows_does_not_take_every_name(name: str, there: bool) -> None:
    assert is_possible_name(name, windows=True) == there
    assert is_possible_name(name, windows=False)
