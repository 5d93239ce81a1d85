"""The house rules that code can check: direction of imports, what ``--help`` costs, and where facts are found."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {"imnet_prep": {"imnet_prep"}, "mbv2": {"mbv2", "imnet_prep"}, "cli": {"cli", "mbv2", "imnet_prep"}}
HEAVY = ("mindspore", "cv2", "torch", "scipy", "dask", "distributed", "matplotlib", "pandas")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in ALLOWED or top in ALLOWED[package], f"{path} imports {name}"


def test_nothing_installed_imports_tests_or_benchmarks() -> None:
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            assert not {name.split(".")[0] for name in imported(path)} & {"tests", "benchmarks"}, path


@pytest.mark.parametrize("module", ["cli.prep", "cli.mobilenet"])
def test_help_imports_nothing_heavy(module: str) -> None:
    script = (
        f"import sys, json\nfrom {module} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "Usage:" in done.stdout
    loaded = set(json.loads(done.stderr.strip().splitlines()[-1]))
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}


@pytest.mark.parametrize("module", ["imnet_prep.verify", "imnet_prep.convert", "imnet_prep.download"])
def test_mindspore_is_not_needed_before_the_pipeline(module: str) -> None:
    script = f"import sys, {module}\nassert 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_facts_are_found_beside_the_package() -> None:
    from imnet_prep import catalog

    assert catalog.FOLDER == ROOT / "manifests"
    assert len(catalog.synsets()) == 1000


@pytest.mark.slow
def test_wheel_carries_the_facts(tmp_path: Path) -> None:
    """The wheel is built without its C++ parts, and its catalogue read from the unpacked wheel."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-Cwheel.cmake=false",
         "-w", str(tmp_path), str(ROOT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "scikit_build_core" in done.stderr and "No module" in done.stderr:
        pytest.skip("the build backend is not installed here")
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "from imnet_prep import catalog; print(catalog.FOLDER); assert len(catalog.synsets()) == 1000"
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {script}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() == str(tmp_path / "site" / "manifests")
