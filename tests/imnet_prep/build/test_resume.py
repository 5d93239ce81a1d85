"""Killed at any moment and run again, a conversion ends in the same bytes, and finished shards stay."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.records import command, digests, names, prep, prep_json, run
from tests.synthetic import make_image_folder, make_imagenet


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("source"), 4, 60, width=200, height=150)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "records"
    run(source, out, shards=8)
    return digests(out)


def finished(partial: Path) -> dict[str, tuple[int, int]]:
    """Inode and mtime of each file of a finished shard."""
    found = {}
    for note in (partial / ".work" / "done").glob("*.json"):
        split = note.name.split("-")[0]
        for name in (note.stem, note.stem + ".db"):
            state = (partial / split / name).stat()
            found[name] = (state.st_ino, state.st_mtime_ns)
    return found


def workers_of(pid: int) -> set[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return {int(child) for child in listed.stdout.split()}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(children: set[int]) -> bool:
    """Whether no worker outlives its parent; one that was still starting may take a moment to notice."""
    for _ in range(200):
        if not any(alive(child) for child in children):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    source: Path, expected: dict[str, str], tmp_path: Path, kills: int
) -> None:
    out, partial = tmp_path / "records", tmp_path / "records.partial"
    rng, before, killed = random.Random(5), dict[str, tuple[int, int]](), 0
    call = command("to-mindrecord", source, "--out", out, "--shards", 8, "--workers", 2)
    for _ in range(kills):
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.2, 1.0))  # a whole run takes more than 1 s on any machine
        except subprocess.TimeoutExpired:
            children = workers_of(process.pid)
            process.kill()
            process.wait()
            killed += 1
            assert gone(children)
        if out.exists():
            break
        now = finished(partial)
        assert {name: now.get(name) for name in before} == before  # kept, not written again
        before = now
    assert killed
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert digests(out) == expected
    assert names(tmp_path) == {"records"}
    for name, state in before.items():
        path = out / name.split("-")[0] / name
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == state


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM), pytest.param(signal.SIGTERM, marks=pytest.mark.long)],
)
def test_asked_to_stop_it_leaves_a_clean_checkpoint(
    source: Path, expected: dict[str, str], tmp_path: Path, number: int
) -> None:
    out = tmp_path / "records"
    call = command("to-mindrecord", source, "--out", out, "--shards", 8, "--workers", 1)
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: bool(list((tmp_path / "records.partial" / ".work" / "done").glob("*.json"))), process)
        process.send_signal(number)
        text = process.communicate(timeout=60)[1]
    assert process.returncode == 130, text
    assert "run the same command again" in text
    assert "Traceback" not in text
    assert names(tmp_path / "records.partial" / ".work" / "tmp") == set()
    assert not (tmp_path / "records.partial.lock").exists()
    prep_json("to-mindrecord", source, "--out", out, "--shards", 8, "--workers", 2)
    assert digests(out) == expected


def test_asked_twice_it_stops_at_once(source: Path, tmp_path: Path) -> None:
    call = command("to-mindrecord", source, "--out", tmp_path / "records", "--shards", 1, "--workers", 1)
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: bool(list((tmp_path / "records.partial" / ".work" / "tmp").glob("*/*"))), process)
        children = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=30)[1]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert gone(children)


def wait_for(ready: object, process: subprocess.Popen[str]) -> None:
    assert callable(ready)
    for _ in range(3000):
        if ready():
            return
        assert process.poll() is None
        time.sleep(0.01)
    raise AssertionError("it never came so far")


@pytest.mark.slow
def test_shard_that_went_missing_is_made_again(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "records"
    call = command("to-mindrecord", source, "--out", out, "--shards", 8, "--workers", 1)
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as process:
        done = tmp_path / "records.partial" / ".work" / "done"
        wait_for(lambda: len(list(done.glob("*.json"))) >= 2, process)
        process.kill()
    notes = sorted(done.glob("*.json"))
    (tmp_path / "records.partial" / "train" / notes[0].stem).unlink()
    (tmp_path / "records.partial" / "train" / (notes[1].stem + ".db")).write_bytes(b"cut")
    notes[-1].write_text("{")
    prep_json("to-mindrecord", source, "--out", out, "--shards", 8)
    assert digests(out) == expected


@pytest.mark.slow
def test_archives_killed_and_resumed(tmp_path: Path) -> None:
    made = make_imagenet(tmp_path / "archives", classes=6, per_class=12)
    arguments = ("to-mindrecord", made.train, made.val, made.devkit, "--max-rejected", "100%", "--shards", "5")
    prep_json(*arguments, "--out", tmp_path / "whole")
    call = command(*arguments, "--out", tmp_path / "records", "--workers", 1)
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as process:
        wait_for(lambda: bool(list((tmp_path / "records.partial" / ".work" / "done").glob("*.json"))), process)
        process.kill()
    prep_json(*arguments, "--out", tmp_path / "records", "--workers", 2)
    assert digests(tmp_path / "records") == digests(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A tmpfs of 6 MB; skipped where it may not be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    return disk


@pytest.mark.slow
@pytest.mark.parametrize(
    "filler",
    [
        *(5_200_000, 3_400_000),
        *(pytest.param(size, marks=pytest.mark.long) for size in (4_600_000, 4_000_000, 2_900_000)),
    ],
)
def test_full_disk_then_freed(
    source: Path,
    expected: dict[str, str],
    tmp_path: Path,
    small_disk: Path,
    filler: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        (small_disk / "filler").write_bytes(bytes(filler))
        out = small_disk / "records"
        needed = sum(path.stat().st_size for path in source.rglob("*.jpg"))
        failed = prep("to-mindrecord", source, "--out", out, "--shards", 8, "--workers", 1)
        if failed.returncode == 0:
            pytest.skip(f"{needed} bytes fit beside {filler}")
        assert failed.returncode == 1, failed.stderr
        assert failed.stderr.strip().splitlines()[-1].startswith("error: ")
        assert "the disk is full; expected about" in failed.stderr
        assert "Traceback" not in failed.stderr
        (small_disk / "filler").unlink()
        prep_json("to-mindrecord", source, "--out", out, "--shards", 8, "--workers", 1)
        assert digests(out) == expected
        assert names(small_disk) == {"records"}
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)


@pytest.mark.slow
def test_resumed_elsewhere_the_folder_may_have_moved(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """The source moved between two runs: the plan is the same, so the work goes on."""
    copy = shutil.copytree(source, tmp_path / "in")
    out = tmp_path / "records"
    call = command("to-mindrecord", copy, "--out", out, "--shards", 8, "--workers", 1)
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as process:
        wait_for(lambda: bool(list((tmp_path / "records.partial" / ".work" / "done").glob("*.json"))), process)
        process.kill()
    os.rename(copy, tmp_path / "moved")
    prep_json("to-mindrecord", tmp_path / "moved", "--out", out, "--shards", 8)
    assert digests(out) == expected
