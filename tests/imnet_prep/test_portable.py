"""On a system that lacks what Linux has, every stage gives the same bytes, and no open file is renamed or deleted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.imnet_prep.build.test_resume import finished, gone, workers_of
from tests.imnet_prep.download.servers import Server, images, write_list
from tests.imnet_prep.interruptions import ANOTHER_SYSTEM
from tests.records import command, digests

if sys.platform != "linux":
    pytest.skip("it hides what Linux has", allow_module_level=True)

pytestmark = pytest.mark.slow
NAMES = ("os.pread", "os.pwrite", "os.writev", "os.fchmod", "os.O_CLOEXEC", "os.posix_fadvise", "os.fork",
         "os.sched_getaffinity", "os.register_at_fork", "signal.SIGKILL", "fcntl.flock", "resource.getrlimit",
         "os.replace", "signal.SIGINT")  # fmt: skip
LACKS = """
import sys
def lacks(name):
    module, _, name = name.partition(".")
    try:
        return not hasattr(__import__(module, globals()), name)
    except ImportError:
        return True
print(*filter(lacks, sys.argv[1:]), sys.platform)
"""
BATCHES = """
import hashlib, sys
from imnet_prep import EvalOptions, TrainOptions, open_batches
if __name__ == "imnet_prep.reader":
    for options in (TrainOptions(8, 64), EvalOptions(8, 64)):
        with open_batches(sys.argv[1], "train", options, seed=3, workers=2) as batches:
            for batch in batches:
                print(*[hashlib.sha256(part).hexdigest() for part in (batch.image, batch.label, batch.record_id)])
"""
SCANNER = """
import os, subprocess, sys, time
held, seen = [], set()
scanned = subprocess.Popen(sys.argv[2:])
while scanned.poll() is None:
    for here, _, names in os.walk(sys.argv[1]):
        for path in [os.path.join(here, name) for name in names]:
            try:
                if (inode := os.stat(path).st_ino) not in seen:
                    seen.add(inode)
                    held.append((time.monotonic() + 0.2, open(path, "rb")))
            except OSError:
                pass
    held = [(until, file) for until, file in held if until > time.monotonic()]
    time.sleep(0.002)
sys.exit(scanned.returncode)
"""


class System:
    """Runs commands in a folder, on this system or as if on another."""

    def __init__(self, folder: Path, *, other: bool) -> None:
        folder.mkdir()
        self.folder = folder.resolve()
        more = {"IMNET_TEST_FOLDER": str(self.folder), "PYTHONPATH": str(ANOTHER_SYSTEM)} if other else {}
        self.environment = {**os.environ, **more}

    def start(self, call: list[str], **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            call,
            env={**self.environment, **more},
            stdout=-1,
            stderr=-1,
            text=True,
            cwd=self.folder,
            start_new_session=True,
        )

    def run(self, call: list[str]) -> str:
        process = self.start(call)
        out, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        return out

    def refuse_to_change(self, held: Path, call: list[str]) -> None:
        """Run a command that fails in one line because another program reads a file that it would replace."""
        process = self.start(["sh", "-c", 'exec 9< "$0" && exec "$@"', str(held), *call])
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 1, said
        assert [line for line in said.splitlines() if line.startswith("error: ")] == said.splitlines()[-1:]

    def prep(self, *arguments: object) -> Any:
        return json.loads(self.run(command(*arguments, "--json")))

    def as_ours(self, text: str) -> list[str]:
        """Return a call that runs code as a module of ours, which is what a part of the system is hidden from."""
        return [
            sys.executable, "-c", f"exec(compile({text!r}, 'reader', 'exec'), {{'__name__': 'imnet_prep.reader'}})"
        ]  # fmt: skip

    def convert(self, out: str) -> list[str]:
        return command("to-mindrecord", "images", "--out", out, "--shards", 6, "--workers", 2, "--seed", 5)


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> tuple[System, System]:
    """Return this system and the other one, each with the same images downloaded and the same records made of them."""
    folder = tmp_path_factory.mktemp("systems")
    both = System(folder / "here", other=False), System(folder / "there", other=True)
    with Server(images) as server:
        lists = write_list(folder / "list", [server.url(f"/{number}") for number in range(90)])
        for system in both:
            done = system.prep("download", "--urls", lists, "--out", "images", "--allow-private", "--short-side", 48)
            assert done["ok"] == 90
    for system in both:
        system.run(system.convert("records"))
        system.prep("reshard", "records", "--shards", 4, "--out", "again", "--workers", 1)
    return both


def test_the_other_system_is_another_one(systems: tuple[System, System]) -> None:
    here, there = (system.run([*system.as_ours(LACKS), *NAMES]).split() for system in systems)
    assert here == ["linux"]
    assert there == [*NAMES[:-2], "win32"]


def test_a_download_ends_in_the_same_files(systems: tuple[System, System]) -> None:
    here, there = (digests(system.folder / "images" / "n01440764") for system in systems)
    assert len(here) == 90
    assert there == here
    for system in systems:
        assert not list((system.folder / "images" / ".incoming").iterdir())


def test_records_are_the_same(systems: tuple[System, System]) -> None:
    here, there = systems
    for name in ("records", "again"):
        assert digests(there.folder / name) == digests(here.folder / name)
    assert len(list((there.folder / "again").glob("train/*.mindrecord"))) == 4


def test_killed_and_run_again_it_ends_in_the_same_bytes(systems: tuple[System, System]) -> None:
    here, there = systems
    partial = there.folder / "killed.partial"
    process = there.start(there.convert("killed"), IMNET_TEST_STALL="1")
    for _ in range(600):
        if len(kept := finished(partial)) >= 2:
            break
        time.sleep(0.1)
    children = workers_of(process.pid)
    process.kill()
    assert process.wait() == -9
    process.communicate()
    assert children
    assert gone(children)
    kept = finished(partial)
    assert kept
    there.run(there.convert("KILLED"))  # the same folder
    assert not (there.folder / "killed").exists()
    for name, state in kept.items():
        path = there.folder / "KILLED" / name.split("-")[0] / name
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == state
    assert digests(there.folder / "KILLED") == digests(here.folder / "records")


def test_records_are_verified(systems: tuple[System, System]) -> None:
    report = systems[1].prep("verify", "records", "--level", "decode", "--workers", 2)
    assert report["ok"]
    assert report["records"] == 90


def test_batches_are_the_same(systems: tuple[System, System]) -> None:
    here, there = (system.run([*system.as_ours(BATCHES), "again"]) for system in systems)
    assert here.count("\n") > 20
    assert there == here


def test_folders_are_changed_in_place(systems: tuple[System, System]) -> None:
    there = systems[1]
    records, changed = there.folder / "records", there.folder / "changed"
    shutil.copytree(records, changed)
    index = min(changed.glob("train/*.db"))
    index.write_bytes(b"no index")
    there.refuse_to_change(index, command("repair-index", "changed"))
    there.prep("repair-index", "changed")
    there.refuse_to_change(changed / "manifest.json", command("adopt", "changed", "--force", "--workers", 1))
    there.prep("adopt", "changed", "--force", "--workers", 1)
    assert there.prep("verify", "changed", "--level", "hash", "--workers", 1)["ok"]
    before, after = digests(records), digests(changed)
    assert {name: after[name] for name in before if ".mindrecord" in name} == {
        name: digest for name, digest in before.items() if ".mindrecord" in name
    }


def test_a_finished_folder_is_replaced_once_nobody_reads_it(systems: tuple[System, System]) -> None:
    here, there = systems
    replaced = shutil.copytree(here.folder / "again", there.folder / "replaced")
    call = [*there.convert("replaced"), "--workers", "1", "--force"]
    there.refuse_to_change(min(replaced.glob("train/*.mindrecord")), call)
    assert digests(replaced) == digests(here.folder / "again")
    there.run(call)
    assert digests(replaced) == digests(here.folder / "records")


COUNT = """
from pathlib import Path
from imnet_prep.files import exclusive_lock
count, done = Path("count"), 0
while __name__ == "imnet_prep.reader" and done < 100:
    try:
        with exclusive_lock(Path("x.lock")):
            count.write_text(str(int(count.read_text("utf-8")) + 1), "utf-8")
            done += 1
    except BlockingIOError:
        pass
"""


def test_a_lock_is_held_by_one_process_at_a_time_and_goes_away(systems: tuple[System, System]) -> None:
    there = systems[1]
    (there.folder / "count").write_text("0", "utf-8")
    there.run(["sh", "-c", 'for _ in 1 2 3 4; do "$0" "$@" & done; wait', *there.as_ours(COUNT)])
    assert (there.folder / "count").read_text("utf-8") == "400"
    there.run(there.as_ours(COUNT))  # alone, so that no other process has it open
    assert not (there.folder / "x.lock").exists()


def test_a_virus_scanner_opens_each_new_file(systems: tuple[System, System]) -> None:
    here, there = systems
    there.run([sys.executable, "-S", "-c", SCANNER, str(there.folder), *there.convert("scanned")])
    assert digests(there.folder / "scanned") == digests(here.folder / "records")


def test_one_command_at_a_time(systems: tuple[System, System]) -> None:
    there = systems[1]
    process = there.start(there.convert("held"), IMNET_TEST_STALL="1")
    while len(finished(there.folder / "held.partial")) < 2:
        time.sleep(0.1)
    refused = there.start(there.convert("Held"))
    said = refused.communicate(timeout=200)[1]
    process.kill()
    process.communicate()
    assert refused.returncode == 1
    assert "another conversion is at work" in said
