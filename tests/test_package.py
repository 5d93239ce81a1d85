"""What is installed: two packages and nothing else, with their data, that work beside modules of any name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from imnet_prep.cli.mobilenet import main as mobilenet
from imnet_prep.cli.prep import main as prep
from tests.synthetic import make_image_folder

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
OWN = ("cli", "manifests", "types")  # modules that a user's folder may well hold


def run(command: list[str], folder: Path, **environment: str) -> str:
    variables = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, without its C++ libraries, which other tests build."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*command, "-Cwheel.cmake=false", f"-Cbuild-dir={folder / 'build'}", "-w", str(folder), str(ROOT)], folder)
    return next(folder.glob("*.whl"))


def test_the_citation_names_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert project["version"] == version(project["name"])
    assert f"## {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder whose modules fail when they are imported."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in OWN:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('imported {name} of the current folder')\n")
    return folder


@pytest.mark.slow
def test_the_wheel_holds_two_packages_with_their_data_and_no_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/LICENSE-libjpeg-turbo"} < names
    expected = {
        target + path.relative_to(ROOT).as_posix()
        for target, package in (("", "imnet_prep"), ("", "mbv2"), ("imnet_prep/", "cli"), ("imnet_prep/", "manifests"))
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.name != "CMakeLists.txt" and path.suffix not in {".cc", ".h", ".inl", ".so", ".pyc"}
    }
    assert {name for name in names if not name.startswith(info)} == expected
    for name in ("imnet_prep/cli/prep.py", "imnet_prep/manifests/counts.json", "imnet_prep/py.typed", "mbv2/py.typed"):
        assert name in expected
    assert [name for name in expected if "/templates/" in name]
    assert "mbv2/recipes/tiny.yaml" in expected


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_the_wheel_finds_its_data(wheel: Path, tmp_path: Path, zipped: bool) -> None:
    place = wheel
    if not zipped:
        place = tmp_path / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    script = f"import sys; sys.path.insert(0, {str(place)!r}); from imnet_prep import catalog; print(catalog.__file__)"
    told = run([sys.executable, "-I", "-S", "-c", f"{script}; assert len(catalog.synsets()) == 1000"], tmp_path)
    assert told.startswith(str(place))


@pytest.mark.slow
def test_the_wheel_converts_and_verifies_beside_modules_of_the_same_names(wheel: Path, own: Path) -> None:
    """Without site, so that the editable install is out of reach; -P, as Python itself fails beside a types.py."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(own / "site")
    paths = [str(own / "site"), *(path for path in sys.path if path.endswith("-packages"))]
    convert_and_check([sys.executable, "-S", "-P", "-m", "imnet_prep"], own, PYTHONPATH=os.pathsep.join(paths))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [str(SCRIPTS / "imnet-prep")],
        pytest.param([sys.executable, "-P", "-m", "imnet_prep"], marks=pytest.mark.long),
    ],
)
def test_the_installed_command_converts_and_verifies_there(command: list[str], own: Path) -> None:
    convert_and_check(command, own)


def convert_and_check(command: list[str], folder: Path, **environment: str) -> None:
    """Use worker processes too: they start in the same folder."""
    make_image_folder(folder / "photos", 2, {"train": 12, "val": 2})
    words = ("to-mindrecord", "photos", "--out", "records", "--shards", "2", "--workers", "2", "--json")
    assert json.loads(run([*command, *words], folder, **environment))["images"] == 28
    told = run([*command, "verify", "records", "--level", "decode", "--workers", "2"], folder, **environment)
    assert "ok at level decode" in told
    assert json.loads(run([*command, "info", "records", "--json"], folder, **environment))["images"] == 28


@pytest.mark.long
def test_every_command_starts_there(own: Path) -> None:
    for script, group in (("imnet-prep", prep), ("mbv2", mobilenet)):
        for name in group.commands:
            assert "Usage:" in run([str(SCRIPTS / script), name, "--help"], own)


def test_the_packages_run_as_modules_in_a_folder_with_a_cli_of_its_own(own: Path) -> None:
    (own / "types.py").unlink()  # beside one, no python -m works
    for package, script in (("imnet_prep", "imnet-prep"), ("mbv2", "mbv2")):
        assert f"Usage: {script} " in run([sys.executable, "-m", package, "--help"], own)


def test_nothing_else_can_be_imported_from_elsewhere(tmp_path: Path) -> None:
    script = "from importlib.util import find_spec\nprint([name for name in {!r} if find_spec(name)])"
    names = ["cli", "manifests", "tests", "benchmarks", "imnet_prep.cli", "imnet_prep.manifests", "mbv2"]
    told = run([sys.executable, "-c", script.format(names)], tmp_path)
    assert told.strip() == "['imnet_prep.cli', 'imnet_prep.manifests', 'mbv2']"
