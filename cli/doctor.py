"""Examine this machine: what is installed, whether it works, and the commands that mend what does not.

Libraries are imported, and the C++ parts loaded, in processes of their own: a broken one may raise anything, or crash.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from imnet_prep.cpu import OPENCV, cpu_count, library_versions, memory_bytes
from imnet_prep.errors import ImnetError
from imnet_prep.files import exclusive_lock

PACKAGE = "imnet-prep"
MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}  # where it is not the library's name
FOR_TRAINING = ("mindspore", "pyyaml", "safetensors")  # mbv2 alone needs them
NOT_IMPORTED = ("mindspore",)  # its import takes a second and 400 MB
PER_CLASS = {"train": 1, "val": 1}  # images of the trial
WAIT_S = 300
_IMPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        why = ""
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
    print("\\n" + json.dumps([name, " ".join(why.split())]), flush=True)
"""
_PARTS = """
import json
from imnet_prep.images.native import decoder_status
from mbv2 import kernels
print(json.dumps([*decoder_status(), kernels.available(), kernels.describe(), kernels.instruction_set()]))
"""
_TRIAL = "import sys; from imnet_prep.cli.doctor import run_trial; run_trial(sys.argv[1])"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is missing or broken.

    Attributes:
        what: What is wrong.
        remedy: What mends it: a command where there is one.
        needed: Downloads, conversion or verification do not work without it.
    """

    what: str
    remedy: str
    needed: bool


@dataclass(slots=True)
class Report:
    """What was found. Sizes are in bytes; 0 is unknown, None was not tried or is not there.

    Attributes:
        python: Its version.
        system: Operating system and processor, as in ``linux-x86_64``.
        libraries: The version of each library that the package or one of its extras needs; None where it is missing.
        decoder: Which decoder of JPEGs is in use.
        operators: Which operators train.
        instruction_set: What the C++ operators use; empty without them.
        cores: Cores that this process may use.
        cores_installed: Cores of the machine.
        memory_bytes: Memory of the machine or of the container.
        folder: The current folder: where downloads and records go unless told otherwise.
        folder_free_bytes: Free space there.
        tells_case_apart: Whether its file system can hold two names that differ in case alone.
        locks_work: Whether a lock there keeps a second one out.
        temporary: The folder for temporary files.
        temporary_free_bytes: Free space there.
        trial_images: Images that were downloaded from this machine, converted and verified.
        trial_s: How long that took.
        problems: What is missing or broken.
    """

    python: str
    system: str
    libraries: dict[str, str | None] = field(default_factory=dict)
    decoder: str | None = None
    operators: str | None = None
    instruction_set: str = ""
    cores: int = 0
    cores_installed: int = 0
    memory_bytes: int = 0
    folder: str = ""
    folder_free_bytes: int = 0
    tells_case_apart: bool | None = None
    locks_work: bool | None = None
    temporary: str | None = None
    temporary_free_bytes: int = 0
    trial_images: int = 0
    trial_s: float | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether downloads, conversion and verification work."""
        return not any(problem.needed for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        return {"ok": self.ok, **asdict(self)}

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the table."""
        here = f"{_size(self.folder_free_bytes)} free"
        if self.tells_case_apart is not None:
            here += f", tells upper and lower case {'apart' if self.tells_case_apart else 'not apart'}"
        if self.locks_work is not None:
            here += f", locks {'work' if self.locks_work else 'do not work'}"
        trial = "not tried"
        if self.trial_s is not None:
            trial = f"{self.trial_images} images downloaded, converted and verified in {self.trial_s:.1f} s"
        return [
            ("python", f"{self.python} on {self.system}"),
            *((name, version or "not installed") for name, version in self.libraries.items()),
            ("decoder", self.decoder or "cannot be told"),
            ("operators", self.operators or "cannot be told"),
            ("cores", f"{self.cores} of {self.cores_installed}"),
            ("memory", _size(self.memory_bytes) if self.memory_bytes else "cannot be told"),
            ("folder", f"{self.folder}: {here}"),
            ("temporary", f"{self.temporary}: {_size(self.temporary_free_bytes)} free" if self.temporary else "none"),
            ("trial", trial),
            *(("broken" if one.needed else "missing", f"{one.what}: {one.remedy}") for one in self.problems),
            ("result", f"downloads, conversion and verification {'work' if self.ok else 'do not work'} here"),
        ]


def examine(folder: Path) -> Report:
    """Examine this machine and a folder, and try a small download, conversion and verification there.

    Nothing is left in the folder. It takes some seconds.
    """
    report = Report(platform.python_version(), sysconfig.get_platform())
    report.cores, report.cores_installed, report.memory_bytes = cpu_count(), os.cpu_count() or 0, memory_bytes()
    _examine_libraries(report)
    _examine_parts(report)
    _examine_temporary(report)
    _examine_folder(report, folder.absolute())
    return report


def run_trial(place: str) -> None:
    """Download, convert and verify a few drawn images in an empty folder; print the name of each stage as it begins."""
    from contextlib import nullcontext

    from imnet_prep.cli.small_set import Stage, make_records, verify_records

    def stage(name: str) -> Any:
        print(name, flush=True)
        return nullcontext(lambda progress: None)

    named: Stage = stage
    try:
        Path(place).mkdir()
        make_records(Path(place), PER_CLASS, named)
        print(verify_records(Path(place) / "records", named).records)
    except ImnetError as error:
        sys.exit(str(error))


# --- libraries -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Library:
    """A library that the package asks for: its name, the versions, and the extra that it belongs to, if any."""

    name: str
    versions: str
    extra: str

    @property
    def module(self) -> str:
        return MODULES.get(self.name, self.name)

    @property
    def needed(self) -> bool:
        return not self.extra and self.name not in FOR_TRAINING

    def installed(self) -> str | None:
        """Return its version, or None. OpenCV has several names; conda and own builds may tell no version."""
        names = OPENCV if self.name in OPENCV else (self.name,)
        found = next(filter(None, library_versions(*names).values()), None)
        return found or ("unknown version" if importlib.util.find_spec(self.module) else None)

    def install(self, light: bool, *options: str) -> str:
        """Return the command that installs it; without MindSpore, newer versions will do."""
        versions = ",".join(part for part in self.versions.split(",") if part.startswith(">=") or not light)
        return " ".join(["pip install", *options, f"'{self.name}{versions}'"])


def _asked_for() -> Iterator[_Library]:
    for text in importlib.metadata.requires(PACKAGE) or ():
        match = re.match(r"([\w.-]+)\s*([^;]*?)\s*(?:;.*extra == .(\w+).*)?$", text)
        if match is not None and match[3] != "dev":
            yield _Library(match[1], match[2], match[3] or "")


def _examine_libraries(report: Report) -> None:
    try:
        libraries = list(_asked_for())
    except importlib.metadata.PackageNotFoundError:
        report.problems.append(Problem(f"{PACKAGE} is not installed", "pip install it, see docs/install.md", True))
        return
    report.libraries = {library.name: library.installed() for library in libraries}
    light = report.libraries.get("mindspore") is None
    present = [one for one in libraries if report.libraries[one.name] and one.name not in NOT_IMPORTED]
    broken = _import([one.module for one in present])
    for library in libraries:
        if report.libraries[library.name] is None:
            if library.name == "mindspore":
                what, remedy = "mbv2 needs MindSpore", f"pip install {PACKAGE}, in an environment of its own"
                report.problems.append(Problem(what, remedy, False))
            elif not library.extra:
                report.problems.append(Problem(f"{library.name} is missing", library.install(light), library.needed))
        elif why := broken.get(library.module):
            remedy = library.install(light, "--force-reinstall", "--no-deps")
            report.problems.append(Problem(f"{library.name} cannot be imported, {why}", remedy, library.needed))
    numpy = next(one for one in libraries if one.name == "numpy")
    if not light and not (report.libraries["numpy"] or "1").startswith("1."):
        what = f"mbv2: MindSpore does not work with NumPy {report.libraries['numpy']}"
        report.problems.append(Problem(what, numpy.install(light), False))
    if not light and sysconfig.get_platform().startswith("linux"):
        try:
            ctypes.CDLL("libgomp.so.1")
        except OSError as error:  # the one library that MindSpore's wheel does not bring
            report.problems.append(Problem(f"mbv2: MindSpore cannot load {error}", "apt-get install libgomp1", False))


def _import(modules: list[str]) -> dict[str, str]:
    """Import modules in another process; return why, for each that cannot be imported."""
    broken: dict[str, str] = {}
    todo = modules
    while todo:
        done = _child(_IMPORT, *todo)
        lines = [line for line in done.stdout.splitlines() if line.startswith('["')]
        broken |= {name: why for name, why in map(json.loads, lines) if why}
        todo = todo[len(lines) :]
        if todo:  # the process has died of it
            broken[todo[0]] = f"the process ended with {done.returncode}"
            todo = todo[1:]
    return broken


def _child(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in another process."""
    command = [sys.executable, "-c", code, *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=WAIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {WAIT_S} s")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


# --- the C++ parts, and folders --------------------------------------------------------------------------------------


def _examine_parts(report: Report) -> None:
    done = _child(_PARTS)
    try:
        built, decoder, available, operators, report.instruction_set = json.loads(_last_line(done.stdout))
    except ValueError:
        what = f"the C++ parts cannot be examined, {_last_line(done.stderr)} (exit code {done.returncode})"
        report.problems.append(Problem(what, f"pip install --force-reinstall --no-deps {PACKAGE}", True))
        return
    report.decoder = f"C++ decoder ({decoder})" if built else f"OpenCV and Pillow ({decoder})"
    report.operators = operators
    if not (built and available):
        remedy = "install a C++17 compiler and libjpeg-turbo's headers (Debian: apt-get install g++ libjpeg-dev), then "
        remedy += "pip install --force-reinstall --no-deps . in the source folder of this package"
        parts = [name for name, there in (("decoder", built), ("operators", available)) if not there]
        report.problems.append(Problem(f"C++ {' and '.join(parts)}, without which much is slower", remedy, False))


def _examine_temporary(report: Report) -> None:
    try:
        report.temporary = tempfile.gettempdir()
        report.temporary_free_bytes = shutil.disk_usage(report.temporary).free
    except OSError as error:
        report.problems.append(Problem(f"no folder for temporary files, {error}", "set TMPDIR to a folder", True))


def _examine_folder(report: Report, folder: Path) -> None:
    report.folder = str(folder)
    try:
        report.folder_free_bytes = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(prefix=".imnet-prep-", dir=folder, ignore_cleanup_errors=True) as name:
            place = Path(name)
            (place / "Case").touch()
            report.tells_case_apart = not (place / "cASE").exists()
            if report.ok:  # a broken library would be told again
                _try_locks(report, place / "lock")
                _try(report, place)
    except OSError as error:
        report.problems.append(Problem(f"{folder} cannot be written, {error}", "go to a folder of your own", True))


def _try_locks(report: Report, path: Path) -> None:
    try:
        with exclusive_lock(path):
            try:
                with exclusive_lock(path):
                    report.locks_work = False
                    why = "a lock does not keep a second one out"
            except BlockingIOError:
                report.locks_work = True
                return
    except OSError as error:
        report.locks_work, why = False, str(error)
    what = f"locks do not work in {path.parent.parent}, {why}"
    report.problems.append(Problem(what, "work in a folder on a local disk", True))


def _try(report: Report, place: Path) -> None:
    started = time.monotonic()
    done = _child(_TRIAL, str(place / "trial"))
    lines = done.stdout.split("\n")
    if done.returncode == 0:
        report.trial_images, report.trial_s = int(lines[-2]), time.monotonic() - started
        return
    stage = lines[-2] if len(lines) > 1 else "the start"
    what = f"the trial ended in {stage}, {_last_line(done.stderr)} (exit code {done.returncode})"
    report.problems.append(Problem(what, "see what the line says, and run this again", True))


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
