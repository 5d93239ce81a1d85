"""``imnet-prep doctor``: a whole installation, broken and missing libraries, and folders that do not work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.cli import doctor
from imnet_prep.cli.doctor import Report
from imnet_prep.images.native import decoder_status
from tests.records import COMMAND

NO_MINDSPORE = "import sys\nsys.modules['mindspore'] = None\n"


def run(folder: Path, *arguments: str, **modules: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor in an empty folder, with modules that go before the installed ones."""
    here, first = folder / "here", folder / "first"
    for name, text in modules.items():
        first.mkdir(exist_ok=True)
        (first / f"{name}.py").write_text(text, "utf-8")
    here.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(first)}
    command = [*COMMAND, "doctor", *arguments]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert not list(here.iterdir())
    return done


def needed(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The problems for which the exit code is 1."""
    return [problem for problem in found["problems"] if problem["needed"]]


@pytest.mark.slow
def test_a_whole_installation_is_described_without_an_import_of_mindspore(tmp_path: Path) -> None:
    done = run(tmp_path, "--json", sitecustomize=NO_MINDSPORE)
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr, found["ok"], needed(found)) == (0, "", True, [])
    assert set(found["libraries"]) >= {
        "mindspore",
        "numpy",
        "opencv-python-headless",
        "pillow",
        "distributed",
    }
    assert found["libraries"]["numpy"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= found["cores"] <= found["cores_installed"]
    assert found["memory_bytes"] > 1e8
    assert (found["folder"], found["locks_work"]) == (str(tmp_path / "here"), True)
    assert min(found["folder_free_bytes"], found["temporary_free_bytes"]) > 0
    assert (found["trial_images"], found["trial_s"] > 0) == (20, True)
    assert decoder_status()[1] in found["decoder"]
    assert found["operators"]


@pytest.mark.long
def test_the_table_ends_with_the_result(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("python")
    assert lines[-1].split(maxsplit=1) == ["result", "downloads, conversion and verification work here"]
    assert any(line.startswith("trial") and "20 images downloaded" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cv2", *(pytest.param(name, marks=pytest.mark.long) for name in ("numpy", "filelock", "jsonschema"))]
)
def test_a_library_that_raises_at_import_is_named(name: str, tmp_path: Path) -> None:
    done = run(tmp_path, "--json", **{name: "raise RuntimeError('built for\\nanother machine')"})
    found = json.loads(done.stdout)
    library = {"cv2": "opencv-python-headless"}.get(name, name)
    assert done.returncode == 1
    assert not found["ok"]
    problem = next(one for one in needed(found) if one["what"].startswith(f"{library} cannot be imported"))
    assert problem["what"].endswith("RuntimeError: built for another machine")
    assert problem["remedy"].startswith(f"pip install --force-reinstall --no-deps '{library}")
    assert found["trial_s"] is None


@pytest.mark.slow
def test_a_library_that_ends_the_process_is_named_and_the_others_are_looked_at(tmp_path: Path) -> None:
    done = run(tmp_path, cv2="import os\nos._exit(86)", certifi="raise ImportError('no certificates')")
    lines = [line for line in done.stdout.splitlines() if line.startswith("broken")]
    assert done.returncode == 1
    assert any(
        "opencv-python-headless cannot be imported, the process ended with 86: pip install" in one for one in lines
    )
    assert any("certifi cannot be imported, ImportError: no certificates" in one for one in lines)
    assert done.stdout.splitlines()[-1].endswith("downloads, conversion and verification do not work here")


def libraries(monkeypatch: pytest.MonkeyPatch, **versions: str) -> Report:
    """Examine an installation of these libraries alone; an empty version is one that is missing."""
    asked = {"mindspore": "<2.11,>=2.10", "numpy": "<2,>=1.26", "msgpack": ">=1.0", "pyyaml": ">=6.0"}
    listed = [f"{name}{asked[name]}" for name in versions]
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda _: [*listed, "flask>=3.0; extra == 'browse'", "ruff; extra == 'dev'"]
    )
    monkeypatch.setattr(doctor, "library_versions", lambda *names: {name: versions.get(name, "") for name in names})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_import", lambda modules: {})
    report = Report("3", "test")
    doctor._examine_libraries(report)
    return report


def test_a_missing_library_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    report = libraries(monkeypatch, mindspore="2.10.0", numpy="1.26.4", msgpack="", pyyaml="")
    msgpack, pyyaml = report.problems
    assert (msgpack.what, msgpack.remedy, msgpack.needed) == ("msgpack is missing", "pip install 'msgpack>=1.0'", True)
    assert (pyyaml.what, pyyaml.needed) == ("pyyaml is missing", False)  # mbv2's
    assert not report.ok
    assert report.libraries == {
        "mindspore": "2.10.0",
        "numpy": "1.26.4",
        "msgpack": None,
        "pyyaml": None,
        "flask": None,
    }


def test_without_mindspore_all_but_training_works_and_newer_versions_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    report = libraries(monkeypatch, mindspore="", numpy="2.4.0")
    assert [problem.what for problem in report.problems] == ["mbv2 needs MindSpore"]
    assert report.ok
    report = libraries(monkeypatch, mindspore="", numpy="")
    assert report.problems[-1].remedy == "pip install 'numpy>=1.26'"
    assert not report.ok


def test_numpy_2_beside_mindspore_is_a_problem_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    report = libraries(monkeypatch, mindspore="2.10.0", numpy="2.4.0")
    (problem,) = report.problems
    assert (problem.what, problem.remedy, problem.needed) == (
        "mbv2: MindSpore does not work with NumPy 2.4.0", "pip install 'numpy<2,>=1.26'", False
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="a library of Linux")
def test_the_library_that_mindspore_does_not_bring_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("ctypes.CDLL", absent)
    (problem,) = libraries(monkeypatch, mindspore="2.10.0", numpy="1.26.4").problems
    assert problem.what.startswith("mbv2: MindSpore cannot load libgomp.so.1: cannot open")
    assert (problem.remedy, problem.needed) == ("apt-get install libgomp1", False)
    assert libraries(monkeypatch, mindspore="", numpy="2.4.0").problems[0].what == "mbv2 needs MindSpore"


def refused(_: Path) -> Any:
    raise OSError(37, "No locks available")


@pytest.mark.parametrize(
    ("lock", "why"),
    [(refused, "No locks available"), (lambda _: nullcontext(), "a lock does not keep a second one out")],
)
def test_locks_that_do_not_work_are_told(lock: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "exclusive_lock", lock)
    report = Report("3", "test")
    doctor._try_locks(report, tmp_path / "work" / "lock")
    (problem,) = report.problems
    assert f"locks do not work in {tmp_path}" in problem.what
    assert why in problem.what
    assert (report.locks_work, report.ok) == (False, False)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    report = Report("3", "test")
    doctor._examine_folder(report, tmp_path / "gone")
    (problem,) = report.problems
    assert str(tmp_path / "gone") in problem.what
    assert problem.needed
    assert dict(report.rows())["trial"] == "not tried"


def test_a_trial_that_fails_names_the_stage_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TRIAL", "print('to-mindrecord'); import sys; sys.exit('error: the disk is full')")
    report = Report("3", "test")
    doctor._try(report, tmp_path)
    (problem,) = report.problems
    assert problem.what == "the trial ended in to-mindrecord, error: the disk is full (exit code 1)"
    assert report.trial_s is None
