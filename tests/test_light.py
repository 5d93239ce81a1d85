"""Without MindSpore, and without the C++ libraries: what still works, and what is said."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from imnet_prep.images.native import decoder_status
from tests.imnet_prep.download.servers import Server, images, write_list
from tests.records import COMMAND
from tests.synthetic import make_image_folder

ROOT = Path(__file__).parents[1]
NO_MINDSPORE = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.split(".")[0] == "mindspore" else find(name, path, target)
PathFinder.find_spec = find_others
sys.modules["mindspore"] = None
"""
NO_EDITABLE = "import sys; sys.meta_path[:] = [one for one in sys.meta_path if isinstance(one, type)]"  # its finder
IS_HIDDEN = (
    "from importlib.util import find_spec; assert find_spec('mindspore') is None; import imnet_prep; print('so')"
)
BATCHES = """
import sys
from imnet_prep import EvalOptions, TrainOptions, open_batches
for options in (TrainOptions(4, 32, randaugment_ops=2, mixup_alpha=0.2), EvalOptions(4, 32)):
    with open_batches(sys.argv[1], "train", options) as batches:
        print(sum(len(batch) for batch in batches))
"""
COMMANDS = """
import json, sys
from importlib import import_module
from click.testing import CliRunner
for words in json.loads(sys.argv[2]):
    done = CliRunner().invoke(import_module(sys.argv[1]).main, words)
    print(json.dumps([done.exit_code, done.stdout, done.stderr]))
"""
EXAMINE = """
import json
from imnet_prep.cli import doctor
report = doctor.Report("3", "test")
doctor._examine_parts(report)  # all of it tries a download and a conversion as well; tests/test_doctor.py does
print(json.dumps(report.to_json()))
"""
PREP, MOBILENET = "imnet_prep.cli.prep", "imnet_prep.cli.mobilenet"
Run = Callable[..., subprocess.CompletedProcess[str]]
Results = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture(scope="module")
def without_mindspore(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program in an empty folder where MindSpore cannot be found, in its worker processes neither."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "hidden").mkdir()
    (folder / "hidden" / "sitecustomize.py").write_text(NO_MINDSPORE, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder / "hidden")}

    def run(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        words = list(map(str, command))
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=folder)
        assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    assert run(sys.executable, "-c", IS_HIDDEN).stdout == "so\n"
    return run


@pytest.fixture(scope="module")
def results(without_mindspore: Run) -> Results:
    """Run commands one after another in one such process; return exit code, output and errors of each."""

    def run(module: str, *commands: list[str]) -> list[tuple[int, str, str]]:
        done = without_mindspore(sys.executable, "-c", COMMANDS, module, json.dumps(commands))
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="module")
def records(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of downloaded images, made and verified without MindSpore."""
    folder = tmp_path_factory.mktemp("records")
    with Server(images) as server:
        lists = write_list(folder / "list", [server.url(f"/{number}") for number in range(12)])
        found = results(
            PREP,
            ["download", "--urls", str(lists), "--out", str(folder / "images"), "--allow-private"],
            ["to-mindrecord", str(folder / "images"), "--out", str(folder / "records"), "--shards", "2"],
            ["verify", str(folder / "records"), "--level", "decode"],
        )
    assert [code for code, *_ in found] == [0, 0, 0], found
    return folder / "records"


@pytest.mark.slow
def test_the_commands_need_no_mindspore(records: Path, results: Results, tmp_path: Path) -> None:
    damaged, plain = (Path(shutil.copytree(records, tmp_path / name)) for name in ("damaged", "plain"))
    min(damaged.glob("train/*.db")).unlink()
    (plain / "manifest.json").unlink()
    found = results(
        PREP,
        ["info", str(records)],
        ["report", str(records), "--out", str(tmp_path / "out.html")],
        ["export", str(records), "--to", "imagefolder", "--out", str(tmp_path / "exported")],
        ["reshard", str(records), "--shards", "1", "--out", str(tmp_path / "resharded")],
        ["bench", str(records), "--batch-size", "4", "--image-size", "32", "--seconds", "0.2"],
        ["repair-index", str(damaged)],
        ["adopt", str(plain), "--workers", "1"],
    )
    assert [code for code, *_ in found] == [0] * 7, found
    assert {path.name for path in tmp_path.iterdir()} == {"damaged", "plain", "out.html", "exported", "resharded"}
    assert (plain / "manifest.json").exists()
    assert len(list(damaged.glob("train/*.db"))) == 2


@pytest.mark.slow
def test_batches_are_read_without_it(records: Path, without_mindspore: Run) -> None:
    assert without_mindspore(sys.executable, "-c", BATCHES, records).stdout == "12\n12\n"


@pytest.mark.slow
def test_records_are_browsed_without_it(records: Path, without_mindspore: Run) -> None:
    pytest.importorskip("flask")
    program = f"""
from pathlib import Path
from imnet_prep.show.browse import create_app
print(create_app(Path({str(records)!r})).test_client().get("/").status_code)
"""
    assert without_mindspore(sys.executable, "-c", program).stdout == "200\n"


@pytest.mark.slow
def test_training_says_in_one_line_that_it_needs_mindspore(records: Path, results: Results) -> None:
    found = results(
        MOBILENET,
        ["train", "--records", str(records), "--out", "run"],
        ["bench"],
        ["eval", "--records", str(records), "--split", "train", "--checkpoint", "none"],
        ["export", "--checkpoint", "none", "--format", "onnx", "--out", "model.onnx"],
    )
    assert len(found) == 4
    for code, out, said in found:
        assert (code, out) == (1, "")
        assert said.startswith("error: this command needs MindSpore, which is not installed; pip install imnet-prep")
        assert said.count("\n") == 1


def requirements(lines: list[str]) -> dict[str, set[str]]:
    """The bounds of each requirement, by name."""
    found = (re.match(r"([\w-]+)(.*)", line) for line in lines if line and not line.startswith("#"))
    return {match[1]: set(filter(None, match[2].strip().split(","))) for match in found if match}


def test_the_light_requirements_are_those_of_the_package_without_mindspore() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    package, light = (
        requirements(lines)
        for lines in (project["dependencies"], (ROOT / "requirements-light.txt").read_text("utf-8").splitlines())
    )
    assert package.pop("mindspore")
    assert light == {name: {part for part in bounds if part[0] == ">"} for name, bounds in package.items()}
    assert package["numpy"] > light["numpy"]  # the bound is MindSpore's


# --- what is in use --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules as an installation without a compiler leaves them, and images to convert."""
    folder = tmp_path_factory.mktemp("plain")
    skip = shutil.ignore_patterns("*.so", "*.cc", "*.h", "*.inl", "__pycache__")
    for source, target in (("imnet_prep", ""), ("mbv2", ""), ("cli", "imnet_prep"), ("manifests", "imnet_prep")):
        shutil.copytree(ROOT / source, folder / "site" / target / source, ignore=skip)
    (folder / "site" / "sitecustomize.py").write_text(NO_EDITABLE, "utf-8")
    make_image_folder(folder / "photos", 2, {"train": 12, "val": 2})
    return folder


def run_plain(plain: Path, module: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command from there: without site, so that the editable installation is out of reach."""
    paths = [str(plain / "site"), *(path for path in sys.path if path.endswith("-packages"))]
    command = [sys.executable, "-S", "-P", "-m", module, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
    done = subprocess.run(command, cwd=plain, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_conversion_says_once_which_decoder_is_in_use(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "photos", 2, {"train": 8, "val": 2})
    command = [*COMMAND, "to-mindrecord", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, check=True)
    built, text = decoder_status()
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"C++ decoder ({text})" if built else "OpenCV and Pillow decode")
    assert first.endswith("; processes: at most 2")
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["images"] == 20
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stderr == ""  # nothing is decoded


@pytest.mark.slow
def test_without_the_library_a_conversion_says_why_and_what_it_costs(plain: Path, tmp_path: Path) -> None:
    words = ("to-mindrecord", "photos", "--shards", 2, "--workers", 2, "--json", "--out")
    done = run_plain(plain, "imnet_prep", *words, tmp_path / "missing")
    said = r"OpenCV and Pillow decode, about [\d.]+ times slower: the C\+\+ decoder is not built: install .*"
    assert re.fullmatch(said + "; processes: at most 2\n", done.stderr)
    assert json.loads(done.stdout)["images"] == 28
    broken = Path(shutil.copytree(plain, tmp_path / "broken"))
    (broken / "site" / "imnet_prep" / "images" / "native" / "imnet_native.so").write_bytes(b"no library")
    done = run_plain(broken, "imnet_prep", *words, tmp_path / "unloadable")
    assert re.search(r"times slower: the C\+\+ decoder does not load: .*imnet_native\.so", done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_download_says_once_which_decoder_is_in_use(plain: Path, tmp_path: Path) -> None:
    with Server(images) as server:
        lists = write_list(tmp_path / "list", [server.url(f"/{number}") for number in range(8)])
        words = ("download", "--urls", lists, "--out", tmp_path / "out", "--allow-private", "--json")
        done = run_plain(plain, "imnet_prep", *words)
        again = run_plain(plain, "imnet_prep", *words)
    said = [line for line in done.stderr.splitlines() if "decode" in line]
    assert len(said) == 1
    assert re.fullmatch(r"OpenCV and Pillow .* not built: .*; processes: \d+, threads in each: \d+", said[0])
    assert json.loads(done.stdout)["ok"] == 8
    assert "decode" not in again.stderr  # nothing is fetched


@pytest.mark.slow
def test_without_the_libraries_the_doctor_says_what_installs_them(plain: Path) -> None:
    (plain / "site" / "examine.py").write_text(EXAMINE, "utf-8")
    found = json.loads(run_plain(plain, "examine").stdout)
    (problem,) = found["problems"]
    assert problem["what"].startswith("C++ decoder and operators")
    assert (found["ok"], problem["needed"]) == (True, False)
    assert "apt-get install g++ libjpeg-dev" in problem["remedy"]
    assert "not built" in found["decoder"]
    assert found["instruction_set"] == ""


@pytest.mark.slow
def test_a_build_without_a_compiler_leaves_the_libraries_out(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(
        [*command, f"-Cbuild-dir={tmp_path / 'build'}", str(ROOT)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    with zipfile.ZipFile(next(tmp_path.glob("imnet_prep-*-none-any.whl"))) as archive:
        names = archive.namelist()
    assert "imnet_prep/cli/doctor.py" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.long
def test_training_says_once_which_operators_and_decoder_are_in_use(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("mindspore")
    run_plain(plain, "imnet_prep", "to-mindrecord", "photos", "--out", tmp_path / "records", "--workers", 1)
    words = ("train", "--records", tmp_path / "records", "--epochs", 1, "--batch-size", 8, "--image-size", 32,
             "--width", 0.35, "--json", "--out", tmp_path / "run")  # fmt: skip
    done = run_plain(plain, "mbv2", *words)
    first, second = done.stderr.splitlines()[:2]
    assert re.fullmatch(
        r"standard operators \(the C\+\+ operators are not built: .*\), .* slower \(\d+ threads?\)", first
    )
    assert re.fullmatch(r"OpenCV and Pillow decode, about [\d.]+ times slower: .*; threads: \d+", second)
    assert done.stderr.count("operators (") == done.stderr.count(" decode,") == 1
    assert json.loads(done.stdout)["epochs"] == 1
