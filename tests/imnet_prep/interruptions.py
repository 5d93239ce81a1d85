"""Interrupt a command before every call that changes a file, run it again, and compare what is there then.

A scenario is a folder in a starting state and a command. The command is traced once by ``strace``, which shows every
call that changes something below that folder. Then the folder is set up anew for each of these calls, the command is
killed before the call (or the call fails with ENOSPC or EIO), and the same command is run again: every file must be as
after the uninterrupted run.

Starting Python costs more than such a run, so a server process imports everything once and forks for each run; the
fork waits until ``strace`` has attached to it. To run one scenario and list what goes wrong::

    python -m tests.imnet_prep.interruptions to-mindrecord
    python -m tests.imnet_prep.interruptions adopt --kind kill --place 17 --keep /tmp/seen
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.memory_disk import MEMORY_DISK, memory_disk
from tests.records import command
from tests.synthetic import WNIDS, make_image_folder

if sys.platform != "linux":
    pytest.skip("strace, /proc and pidfd are needed", allow_module_level=True)

REPOSITORY = Path(__file__).parents[2]
ANOTHER_SYSTEM = Path(__file__).parent / "another_system"  # its sitecustomize.py turns Linux into Windows
CASE = "case"  # the folder of a run
MEMORY_NEEDED_BYTES = 512 << 20
RUN_LIMIT_S = 60.0
FAULTS = ("ENOSPC", "EIO")
KINDS = ("kill", *FAULTS)
RANDOM_KILLS = 50

# By system call: those that can fail for want of space, and those that change something else than data.
_WRITES = frozenset({"write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "fallocate"})
_FLUSHES = frozenset({"fsync", "fdatasync", "sync_file_range", "syncfs"})
_RENAMES = frozenset({"rename", "renameat", "renameat2"})
_OPENS = frozenset({"open", "openat", "creat"})
_OTHERS = frozenset(
    [
        *(
            "link",
            "linkat",
            "symlink",
            "symlinkat",
            "unlink",
            "unlinkat",
            "mkdir",
            "mkdirat",
            "rmdir",
            "mknod",
            "mknodat",
        ),
        *("truncate", "ftruncate", "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "fchownat", "lchown"),
        *("utime", "utimes", "futimesat", "utimensat", "setxattr", "fsetxattr"),
    ]
)
_TRACED = _WRITES | _FLUSHES | _RENAMES | _OPENS | _OTHERS
_CALL = re.compile(r"(\d+) +(\w+)\((.*)$")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)$")
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")
_SEMAPHORE = re.compile(r"(\d+) +/dev/shm/sem\.")  # its inode, in /proc/PID/maps
_QUOTED = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')


# --- the server ------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Carry out requests from stdin, a JSON object a line, each in a fork of this process."""
    preload()
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)


def preload() -> None:
    """Import what the commands import, so that a fork has it."""
    import imnet_prep

    for module in pkgutil.walk_packages([str(Path(imnet_prep.__file__).parent)], "imnet_prep."):
        with suppress(ImportError):  # a library for ctypes is listed as if it were a module
            importlib.import_module(module.name)
    for name in ("imnet_prep.cli.prep", "jsonschema"):
        importlib.import_module(name)
    importlib.import_module("cv2").setNumThreads(1)  # its threads would not survive the fork


def carry_out(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command in a fork, under ``strace`` where its options are given, and tell how it ended."""
    gate, opener = os.pipe()
    ready, teller = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(opener)
        os.close(ready)
        for number, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.close(teller)  # what came before is not to be counted
        os.read(gate, 1)
        os.close(gate)
        rng = random.Random(request["seed"])  # random names would hide a call from strace -P
        uuid.uuid4 = lambda: uuid.UUID(int=rng.getrandbits(128), version=4)
        sys.argv = ["imnet-prep", *request["arguments"]]
        importlib.import_module("imnet_prep.cli.prep").main(request["arguments"], "imnet-prep")  # raises SystemExit
    os.close(gate)
    os.close(teller)
    os.read(ready, 1)
    os.close(ready)
    tracer = None
    if request["strace"]:
        call = ["strace", "-y", "-o", request["trace"], *request["strace"], "-p", str(child)]
        tracer = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        first = tracer.stderr.readline()
        if "attached" not in first:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"refused": first.strip()}
    os.write(opener, b"x")
    os.close(opener)
    ended = os.pidfd_open(child)
    in_time = bool(select.select([ended], [], [], RUN_LIMIT_S)[0])
    os.close(ended)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if tracer is not None:
        tracer.communicate()
    return {"status": status, "hung": not in_time}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    status: int
    stdout: str
    stderr: str
    trace: str
    hung: bool

    @property
    def last_line(self) -> str:
        return (self.stderr.strip().splitlines() or [""])[-1]


class Refused(Exception):
    """``strace`` is missing, or may not attach to processes here."""


class Server:
    """A process that runs commands in forks of itself, as on Windows if asked to; its files lie in ``folder``."""

    def __init__(self, folder: Path, *, windows: bool = False) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        settings = {
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1",
            "TMPDIR": str(folder / "tmp"),
        }  # fmt: skip
        if windows:
            settings |= {"PYTHONPATH": str(ANOTHER_SYSTEM), "IMNET_TEST_FOLDER": str(folder / CASE)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ, **settings},
        )  # fmt: skip

    def run(self, arguments: Sequence[str], strace: Sequence[str] = ()) -> Outcome:
        """Run ``imnet-prep`` with these arguments.

        Args:
            arguments: Of the command line.
            strace: Options of ``strace``; without any, it runs on its own.

        Raises:
            Refused: ``strace`` may not attach.
        """
        files = {name: self.folder / f"{name}.txt" for name in ("stdout", "stderr", "trace")}
        seed = 0 if strace else 1  # temporary names are the same in each traced run, and others in the run after it
        request = {
            "arguments": list(arguments),
            "strace": list(strace),
            "seed": seed,
            **{n: str(files[n]) for n in files},
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "refused" in answer:
            raise Refused(answer["refused"])
        texts = {name: files[name].read_text(errors="replace") if files[name].exists() else "" for name in files}
        return Outcome(answer["status"], hung=answer["hung"], **texts)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def server(*, windows: bool = False) -> Iterator[Server]:
    """Start a server with a folder of its own, in memory where there is room; its commands run as on Windows if asked.

    Raises:
        Refused: ``strace`` is missing, or may not attach to processes here.
    """
    if shutil.which("strace") is None:
        raise Refused("strace is not installed")
    with tempfile.TemporaryDirectory(prefix="interruptions-", dir=memory_disk(MEMORY_NEEDED_BYTES)) as folder:
        started = Server(Path(folder).resolve(), windows=windows)
        try:
            started.run(["--version"], ["-f"])
            yield started
        finally:
            started.close()


# --- the trace -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """A traced system call.

    Attributes:
        thread: Of the process, the main one is 0.
        name: Of the call.
        ordinal: 1 for the first call of this name in its thread, as ``strace`` counts for ``when=``.
        paths: What it is about; absolute.
        repeat: 1 for the first call of this name about these paths in its thread.
        text: As ``strace`` wrote it.
        result: What it returned, or an empty string.
    """

    thread: int
    name: str
    ordinal: int
    paths: tuple[str, ...]
    repeat: int
    text: str
    result: str = ""

    @property
    def identity(self) -> tuple[int, str, tuple[str, ...], int]:
        """What is the same in another run, where Python may open another file before it."""
        return self.thread, self.name, tuple(map(_steady, self.paths)), self.repeat

    @property
    def changes(self) -> bool:
        """Whether it changes something that another process can see."""
        if self.name in _OPENS:
            return self.name == "creat" or "O_CREAT" in self.text or "O_TRUNC" in self.text
        return self.name not in _FLUSHES

    @property
    def done(self) -> bool:
        return not self.result.startswith("-1")

    def __str__(self) -> str:
        return f"{self.name} #{self.ordinal}{f' of thread {self.thread}' if self.thread else ''}: {self.text[:300]}"


def parse(trace: str) -> list[Call]:
    """Read the output of ``strace -f -y``, in the order in which the calls began."""
    calls: list[Call] = []
    threads: dict[str, int] = {}
    counts: Counter[tuple[int, str]] = Counter()
    repeats: Counter[tuple[int, str, tuple[str, ...]]] = Counter()
    open_calls: dict[str, Call] = {}
    for line in trace.splitlines():
        if (resumed := _RESUMED.match(line)) and (call := open_calls.pop(resumed[1], None)) is not None:
            call.text += resumed[3]
            call.result = resumed[3].rpartition(" = ")[2]
        elif (found := _CALL.match(line)) and found[2] in _TRACED:
            thread = threads.setdefault(found[1], len(threads))
            name, paths = found[2], _paths(found[2], found[3])
            counts[thread, name] += 1
            repeats[thread, name, paths] += 1
            text = f"{name}({found[3]}"
            call = Call(thread, name, counts[thread, name], paths, repeats[thread, name, paths], text)
            if call.text.endswith("<unfinished ...>"):
                open_calls[found[1]] = call
            else:
                call.result = call.text.rpartition(" = ")[2]
            calls.append(call)
        elif found := re.match(r"(\d+) ", line):
            threads.setdefault(found[1], len(threads))
    return calls


def _paths(name: str, arguments: str) -> tuple[str, ...]:
    descriptors = _DESCRIPTOR.findall(arguments)
    if name in _WRITES | _FLUSHES or (name.startswith("f") and name[1:] in _OTHERS):
        return tuple(descriptors[1:] if name == "copy_file_range" else descriptors[:1])
    quoted = [os.path.normpath(os.path.join(folder or "/", path)) for folder, path in _QUOTED.findall(arguments)]
    return tuple(quoted or descriptors[:1])


def flush_faults(calls: Iterable[Call], root: str, final: Iterable[str]) -> list[str]:
    """List the renames to a final name that no flush came before and after.

    Args:
        calls: Of an uninterrupted run, in order.
        root: The traced folder.
        final: Files and folders below it that are there at the end, by path relative to ``root``.
    """
    kept = {os.path.join(root, name) for name in final}
    dirty: dict[str, Call] = {}  # changed and not flushed: data of files, names in folders
    published: dict[str, Call] = {}  # folders with a new final name in them, not flushed since
    faults = []
    for call in calls:
        if not call.done or not call.paths or not call.paths[0].startswith(root):
            continue
        path = call.paths[0]
        if call.name in _FLUSHES:
            dirty.pop(path, None)
            published.pop(path, None)
        elif call.name in _RENAMES:
            target = call.paths[1]
            final_name = target in kept and "/.work/" not in target + "/"
            moved = {name: why for name, why in dirty.items() if name == path or name.startswith(path + "/")}
            for name, why in moved.items():
                del dirty[name]
                if final_name and target + name.removeprefix(path) in kept:
                    faults.append(f"not flushed before its rename: {name}, changed by {why}; renamed by {call}")
                else:
                    dirty[target + name.removeprefix(path)] = why
            for name in [name for name in dirty if name == target]:
                if name not in {target + moving.removeprefix(path) for moving in moved}:
                    del dirty[name]  # what had the name before
            dirty[os.path.dirname(path)] = dirty[os.path.dirname(target)] = call
            if final_name:
                published[os.path.dirname(target)] = call
        elif call.name in _WRITES or call.name in ("truncate", "ftruncate"):
            dirty[path] = call
        elif call.name in _OPENS and call.changes:
            dirty[path] = dirty[os.path.dirname(path)] = call
        elif call.name in ("mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat"):
            dirty[os.path.dirname(call.paths[-1])] = call
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            dirty.pop(path, None)
    faults += [f"its folder is not flushed after it: {call}" for call in published.values()]
    faults += [
        f"never flushed: {name}, changed by {why}" for name, why in dirty.items() if name in kept and _is_data(why)
    ]
    return faults


def _is_data(call: Call) -> bool:
    return call.name in _WRITES or call.name in ("truncate", "ftruncate")


# --- what is there ---------------------------------------------------------------------------------------------------


def snapshot(root: Path) -> dict[str, str]:
    """Describe everything below a folder, hidden names too, by relative path: mode, and SHA-256 or link target."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            state = path.lstat()
            what = "folder"
            if path.is_symlink():
                what = f"link to {path.readlink()}"
            elif name in files:
                what = f"{state.st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
            found[path.relative_to(root).as_posix()] = f"{state.st_mode & 0o7777:03o} {what}"
    return found


def differences(there: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Say what is left over, missing or different, in a line each."""
    lines = [f"left over: {name} ({there[name]})" for name in sorted(there.keys() - wanted.keys())]
    lines += [f"missing: {name}" for name in sorted(wanted.keys() - there.keys())]
    both = sorted(there.keys() & wanted.keys())
    return lines + [f"{name}: {there[name]}, not {wanted[name]}" for name in both if there[name] != wanted[name]]


# --- scenarios -------------------------------------------------------------------------------------------------------

_OPTIONS = ("--shards", "1", "--max-rejected", "50%")
CONVERT = ("to-mindrecord", "{root}/source", "--out", "{root}/records", *_OPTIONS)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command, and the state of the folder that it starts from.

    Attributes:
        name: Of the scenario.
        arguments: Of the command line; ``{root}`` stands for the folder.
        prepare: Turns a folder that holds ``source`` and the finished ``records`` into the starting state.
        restores: Whether the command ends in what it was made from.
    """

    name: str
    arguments: tuple[str, ...]
    prepare: Callable[[Path], None]
    restores: bool = False


def _only_source(root: Path) -> None:
    shutil.rmtree(root / "records")


def _another_image_byte(root: Path) -> None:
    """Change one byte of an image, so that old data can be told from new; sizes stay."""
    data = bytearray((root / "records" / DATA).read_bytes())
    data[data.rindex(b"\xff\xd8\xff") + 200] ^= 1
    (root / "records" / DATA).write_bytes(data)


def _as_is(root: Path) -> None:
    """Start from the finished folder."""


def _no_manifest(root: Path) -> None:
    for path in (root / "records").rglob("*.json*"):
        path.unlink()
    (root / "records" / f"{DATA}.db").unlink()


def _no_index(root: Path) -> None:
    (root / "records" / f"{DATA}.db").unlink()


def _cut(root: Path) -> None:
    """Cut the last image of a shard in two."""
    path = root / "records" / DATA
    os.truncate(path, path.read_bytes().rindex(b"\xff\xd8\xff") + 200)


def _another_label(root: Path) -> None:
    """Flip the lowest bit of a label in a raw page, where it follows its name in MessagePack."""
    data = bytearray((root / "records" / DATA).read_bytes())
    data[data.index(b"\xa5label") + len(b"\xa5label")] ^= 1
    (root / "records" / DATA).write_bytes(data)


DATA = "train/train-00000-of-00001.mindrecord"
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("to-mindrecord", (*CONVERT, "--workers", "1"), _only_source, restores=True),
        Scenario("force-same-plan", (*CONVERT, "--force", "--workers", "1"), _another_image_byte, restores=True),
        Scenario("force-other-plan", (*CONVERT, "--force", "--seed", "1", "--workers", "1"), _as_is),
        Scenario(
            "reshard",
            ("reshard", "{root}/records", "--out", "{root}/again", "--shards", "2", "--workers", "1"),
            _as_is,
        ),
        Scenario("adopt", ("adopt", "{root}/records", "--workers", "1"), _no_manifest),
        Scenario("adopt-force", ("adopt", "{root}/records", "--force", "--workers", "1"), _as_is),
        Scenario("repair-index-deleted", ("repair-index", "{root}/records"), _no_index, restores=True),
        Scenario("repair-index-cut", ("repair-index", "{root}/records"), _cut),
        Scenario("repair-index-label", ("repair-index", "{root}/records"), _another_label, restores=True),
    )
}


class NotWhole(Exception):
    """The command does not do its work, even without an interruption."""


class Stage:
    """One scenario, set up anew for each run; runs are always in the same folder, so that their calls are the same."""

    def __init__(self, scenario: Scenario, server: Server) -> None:
        self.scenario, self.server = scenario, server
        self.root = server.folder / CASE
        self.arguments = [argument.format(root=self.root) for argument in scenario.arguments]
        self._start = server.folder / f"start-{scenario.name}"
        self._made_from = server.folder / "made-from"
        if not self._made_from.exists():
            shutil.rmtree(self.root, ignore_errors=True)
            make_image_folder(self.root / "source", 2, {"train": 4, "val": 2}, width=32, height=32)
            (self.root / "source" / "train" / WNIDS[0] / "broken.jpg").write_bytes(b"no image")
            made = server.run([argument.format(root=self.root) for argument in (*CONVERT, "--workers", "1")])
            assert made.status == 0, made.stderr
            os.rename(self.root, self._made_from)
        shutil.copytree(self._made_from, self._start)
        scenario.prepare(self._start)

    def set_up(self) -> None:
        """Put the folder into its starting state."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self._start, self.root, symlinks=True)

    @cached_property
    def whole(self) -> tuple[Outcome, dict[str, str], tuple[int, ...]]:
        """An uninterrupted run under ``strace``: itself, what is there then, and the good statuses of a second run.

        Raises:
            NotWhole: It fails, does not restore what it should, or leaves something else when it is run again.
        """
        self.set_up()
        outcome = self.server.run(self.arguments, ["-f", "-e", f"trace={','.join(f'?{name}' for name in _TRACED)}"])
        wanted = snapshot(self.root)
        again = self.server.run(self.arguments)
        faults = differences(snapshot(self.root), wanted)
        if self.scenario.restores:
            faults += differences(wanted, snapshot(self._made_from))
        if outcome.status not in (0, 3):
            faults.insert(0, f"exit {outcome.status}: {outcome.last_line}")
        if faults:
            raise NotWhole(self.report("not interrupted", faults))
        return outcome, wanted, (outcome.status, again.status)

    @cached_property
    def calls(self) -> list[Call]:
        """Every traced call of the uninterrupted run below its folder."""
        here = f"{self.root}/"
        calls = parse(self.whole[0].trace)
        return [call for call in calls if any(f"{path}/".startswith(here) for path in call.paths)]

    def places(self, kind: str) -> list[Call]:
        """List the calls to be interrupted: those that change something, or those that are to fail."""
        if kind == "kill":
            return [call for call in self.calls if call.done and call.changes]
        return [call for call in self.calls if call.done and call.name in _WRITES | _FLUSHES | _RENAMES]

    def flush_faults(self) -> list[str]:
        """List the renames of the uninterrupted run that no flush came before and after."""
        return flush_faults(self.calls, str(self.root), self.whole[1])

    def interrupt(self, kind: str, place: Call) -> tuple[Outcome, list[str]]:
        """Set up the folder and interrupt the command.

        Args:
            kind: ``kill``, or the name of the error with which the call fails.
            place: Where.

        Returns:
            How it ended, and a line for each thing that is wrong with that.
        """
        what = "signal=KILL" if kind == "kill" else f"error={kind}"
        for attempt in range(3):
            if attempt:  # a run may make a call more or less, and the ordinal is another call's: list them anew
                del self.whole, self.calls
            place = next((call for call in self.calls if call.identity == place.identity), place)
            options, ordinal = ["-e", f"trace={place.name}"], place.ordinal
            if place.thread:  # all threads count for themselves: leave the calls about other paths out
                options, ordinal = [*options, "-f", "-P", place.paths[0]], place.repeat
            self.set_up()
            outcome = self.server.run(self.arguments, [*options, "-e", f"inject={place.name}:{what}:when={ordinal}"])
            faults = ["it hung"] if outcome.hung else self._misplaced(kind, place, outcome)
            if not faults:
                break
        if kind != "kill":
            faults += self._badly_failed(outcome)
        return outcome, faults

    def _misplaced(self, kind: str, place: Call, outcome: Outcome) -> list[str]:
        """Make sure that the call that was interrupted is the one that was meant."""
        mark = " = ?" if kind == "kill" else "(INJECTED)"  # a call that its process did not survive has no result
        lines = [line for line in outcome.trace.splitlines() if line.endswith(mark)]
        if not lines or (kind == "kill") != (outcome.status == -signal.SIGKILL):
            return [f"never got there: exit {outcome.status}, {outcome.last_line}"]
        hit = parse(lines[0] if place.thread else f"0 {lines[0]}")
        if [_steady(path) for call in hit for path in call.paths] != [_steady(path) for path in place.paths]:
            return [f"interrupted another call: {lines[0][:300]}"]
        return []

    def _badly_failed(self, outcome: Outcome) -> list[str]:
        """Say what is wrong with how the command ended after one of its calls failed."""
        normal, wanted, _ = self.whole
        if "Traceback" in outcome.stderr:
            return [f"exit {outcome.status} with a traceback: {outcome.last_line}"]
        if outcome.status == 1:
            errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
            return [] if errors == [outcome.last_line] else [f"exit 1 without one line of error: {outcome.stderr!r}"]
        if outcome.status != normal.status:
            return [f"exit {outcome.status}: {outcome.last_line}"]
        now = differences(snapshot(self.root), wanted)
        return [f"exit {outcome.status} as if nothing had failed, but {line}" for line in now]

    def report(self, what: str, faults: Iterable[str]) -> str:
        """Put faults under a title, with paths relative to the folder."""
        text = "\n    ".join([f"{self.scenario.name}, {what}", *faults])
        return text.replace(f"{self.root}/", "").replace(str(self.root), ".")

    def run_again(self) -> list[str]:
        """Run the command to its end and say what is wrong then, in a line for each thing."""
        _, wanted, statuses = self.whole
        outcome = self.server.run(self.arguments)
        faults = [f"run again: {line}" for line in differences(snapshot(self.root), wanted)]
        if outcome.hung or outcome.status not in statuses or "Traceback" in outcome.stderr:
            faults.insert(0, f"run again: exit {outcome.status}: {outcome.last_line}")
        return faults


def _steady(path: str) -> str:
    """Leave out the random part of a temporary name."""
    return re.sub(r"[0-9a-f]{32}|(?<=[-.])[a-z0-9_]{8}(?=[/.]|$)", "*", path)


def sweep(stage: Stage, kind: str, places: Iterable[Call]) -> Iterator[str]:
    """Interrupt at each place and run again; yield a text for each that ends badly."""
    for place in places:
        _, faults = stage.interrupt(kind, place)
        if faults := faults + stage.run_again():
            yield stage.report(f"{kind} at {place}", faults)


def sample(places: Sequence[Call], count: int, seed: int) -> list[Call]:
    """Draw a few places; half of them renames, where most can go wrong."""
    rng = random.Random(seed)
    renames = [place for place in places if place.name in _RENAMES]
    drawn = rng.sample(renames, min(len(renames), (count + 1) // 2))
    rest = [place for place in places if place not in drawn]
    return drawn + rng.sample(rest, min(len(rest), count - len(drawn)))


# --- random moments --------------------------------------------------------------------------------------------------


def random_kills(stage: Stage, kills: int, seed: int, work_s: float) -> Iterator[str]:
    """Kill the command with two workers at random moments of its work; yield a text for each that ends badly.

    Args:
        stage: What to kill.
        kills: How often.
        seed: Of the moments.
        work_s: Moments are drawn up to this long after the first change that the command makes; a run that ends
            before its moment does not count.
    """
    rng = random.Random(seed)
    for number in range(kills):
        wait_s = rng.uniform(0, work_s)
        while not _kill_group(stage, wait_s):
            wait_s = rng.uniform(0, work_s)
        if faults := stage.run_again():
            yield stage.report(f"random kill {number}, {wait_s:.3f} s into its work", faults)


def work_seconds(stage: Stage) -> float:
    """Measure how long the command works with two workers, from the first change that it makes."""
    process = _begin(stage)
    begun = time.monotonic()
    process.wait(RUN_LIMIT_S)
    return time.monotonic() - begun


def _kill_group(stage: Stage, wait_s: float) -> bool:
    """Kill the command and its workers; tell whether it was still at work."""
    process = _begin(stage)
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        semaphores = set(_SEMAPHORE.findall(Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with suppress(ProcessLookupError):  # a worker that is still being ended may hold what it inherited
            for _ in range(200):
                os.killpg(process.pid, 0)
                time.sleep(0.01)
        for path in MEMORY_DISK.glob("sem.mp-*"):  # of multiprocessing, whose own tracker was killed as well
            with suppress(FileNotFoundError):
                if str(path.stat().st_ino) in semaphores:
                    path.unlink()
        return True
    return False


def _begin(stage: Stage) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own, and wait until it has changed something."""
    stage.set_up()
    before = _names(stage.root)
    arguments = [*stage.arguments[: stage.arguments.index("--workers")], "--workers", "2"]
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and _names(stage.root) == before:
        time.sleep(0.001)
    return process


def _names(root: Path) -> set[str]:
    return {str(path) for path in root.rglob("*")}


# --- the command line ------------------------------------------------------------------------------------------------


def main() -> None:
    """Sweep scenarios, print what goes wrong as it is found, and exit with 1 where something did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"all if not given: {', '.join(SCENARIOS)}")
    parser.add_argument(
        "--kind", choices=(*KINDS, "flush", "random"), action="append", help="all but random if not given"
    )
    parser.add_argument("--list", action="store_true", help="print the places and stop")
    parser.add_argument("--place", type=int, help="this place of --list alone")
    parser.add_argument("--keep", type=Path, help="copy the folder there after the last run")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    bad = 0
    with server() as started:
        for name in options.scenarios or SCENARIOS:
            stage = Stage(SCENARIOS[name], started)
            try:
                bad += sum(_print_faults(stage, kind, options) for kind in options.kind or ("flush", *KINDS))
            except NotWhole as error:
                bad += 1
                print(error, flush=True)
            if options.keep:
                shutil.copytree(stage.root, options.keep / name)
    sys.exit(bool(bad))


def _print_faults(stage: Stage, kind: str, options: argparse.Namespace) -> int:
    """Print what goes wrong with one kind of interruption; return how much does."""
    begun, count, bad = time.monotonic(), 1, 0
    if kind == "flush":
        texts: Iterable[str] = (stage.report("not interrupted", [fault]) for fault in stage.flush_faults())
    elif kind == "random":
        count = RANDOM_KILLS
        texts = random_kills(stage, count, 0, work_seconds(stage))
    else:
        places = stage.places(kind)
        if options.list:
            print(*(f"{number} {stage.report(str(place), [])}" for number, place in enumerate(places)), sep="\n")
            return 0
        if options.place is not None:
            places = places[options.place : options.place + 1]
        count = len(places)
        texts = sweep(stage, kind, places)
    for text in texts:
        bad += 1
        print(text, flush=True)
    print(f"# {stage.scenario.name} {kind}: {count} places, {bad} wrong, {time.monotonic() - begun:.0f} s", flush=True)
    return bad


if __name__ == "__main__":
    main()
