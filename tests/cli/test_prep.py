"""``imnet-prep to-mindrecord``, ``verify`` and ``info`` as a user meets them: JSON, exit codes, one-line errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.cli.prep import main, to_mindrecord
from tests.records import names, prep, prep_json, prep_process
from tests.synthetic import make_image_folder, make_imagenet

CONVERT_KEYS = {"images", "rejected", "shards", "bytes", "seconds", "images_per_s", "manifest"}
VERIFY_KEYS = {"ok", "level", "shards", "records", "problems"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("source"), 2, 6)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "records"
    assert prep("to-mindrecord", source, "--out", out, "--shards", 2).returncode == 0
    return out


@pytest.fixture
def records(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "records"))


def call(*arguments: object) -> Result:
    """Run a command in this process; for what ends before workers start."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(result: Result, code: int = 1) -> str:
    """The error line of a command that must fail with it and nothing else."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]


def test_json_is_one_object_and_nothing_else(source: Path, tmp_path: Path) -> None:
    done = prep_process("to-mindrecord", source, "--out", tmp_path / "records", "--json")
    result = json.loads(done.stdout)
    assert set(result) >= CONVERT_KEYS
    assert result["images"] == 24
    assert result["rejected"] == {}
    assert result["shards"] == 2
    assert Path(result["manifest"]).is_file()
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "records").glob("*/*.mindrecord*"))


@pytest.mark.slow
def test_same_plan_again_is_done_already(source: Path, records: Path) -> None:
    assert prep_json("to-mindrecord", source, "--out", records, "--shards", 2)["already_done"] is True


def test_another_plan_is_refused(source: Path, records: Path) -> None:
    assert "--force" in one_line(call("to-mindrecord", source, "--out", records, "--shards", 3))


def test_dry_run_prints_a_plan_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    result = call("to-mindrecord", source, "--out", tmp_path / "records", "--dry-run", "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert set(plan) >= {"images", "classes", "shards", "bytes", "seconds_estimated", "disk_needed", "disk_free"}
    assert names(tmp_path) == set()


def missing(folder: Path) -> Path:
    return folder / "none"


def empty(folder: Path) -> Path:
    (folder / "in").mkdir()
    return folder / "in"


def no_classes(folder: Path) -> Path:
    (folder / "in").mkdir()
    (folder / "in" / "a.txt").write_text("hello")
    return folder / "in"


def half_a_tar(folder: Path) -> Path:
    made = make_imagenet(folder / "archives", classes=2, per_class=3, odd=False)
    made.train.write_bytes(made.train.read_bytes()[: made.train.stat().st_size // 2])
    return made.train


def no_devkit(folder: Path) -> Path:
    path = folder / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(b"\x1f\x8bnot a devkit")
    return path


@pytest.mark.parametrize("make", [missing, empty, no_classes, half_a_tar, no_devkit])
def test_bad_input_is_one_line(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    given = make(tmp_path)
    line = one_line(call("to-mindrecord", given, "--out", tmp_path / "records", "--workers", 1))
    assert given.name in line
    assert names(tmp_path) <= {"in", "archives", "ILSVRC2012_devkit_t12.tar.gz"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "0"], "--workers"), (["--shards", "0"], "--shards"), (["--seed", "-1"], "--seed"),
        (["--label-space", "imagenet"], "imagenet1k"), (["--quality", "0"], "--quality"),
        (["--short-side", "1"], "--short-side"), (["--max-rejected", "few"], "--max-rejected"),
        (["--executor", "dask"], "--scheduler"), (["--keep-classes", "/none"], "/none"),
    ],
)  # fmt: skip
def test_wrong_values_are_one_line_with_the_choices(
    source: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    assert said in one_line(call("to-mindrecord", source, "--out", tmp_path / "records", *arguments))
    assert names(tmp_path) == set()


def test_usage_errors_exit_2(source: Path) -> None:
    assert call("to-mindrecord", source).exit_code == 2
    assert call("to-mindrecord", source, "--out", "x", "--nonsense").exit_code == 2


def test_over_budget_exits_3(tmp_path: Path) -> None:
    source = make_image_folder(tmp_path / "in", 2, 3, ())
    min(source.rglob("*.jpg")).write_bytes(b"")
    done = prep_process("to-mindrecord", source, "--out", tmp_path / "records", "--workers", 1)
    assert done.returncode == 3
    assert "1 of 6 images rejected (empty 1)" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_finds_nothing_in_a_fresh_folder(records: Path) -> None:
    for level in ("quick", "hash"):
        result = call("verify", records, "--level", level, "--json")
        assert result.exit_code == 0
        told = json.loads(result.stdout)
        assert set(told) >= VERIFY_KEYS
        assert (told["ok"], told["shards"], told["records"], told["problems"]) == (True, 4, 24, [])


def flip(records: Path) -> str:
    path = sorted((records / "train").glob("*.mindrecord"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.name


def remove(records: Path) -> str:
    path = sorted((records / "val").glob("*.mindrecord"))[0]
    path.unlink()
    return path.name


def edit(records: Path) -> str:
    path = records / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 5'))
    return path.name


@pytest.mark.parametrize("damage", [flip, remove, edit])
def test_verify_names_what_is_damaged_and_exits_3(records: Path, damage: Callable[[Path], str]) -> None:
    name = damage(records)
    result = call("verify", records, "--level", "hash", "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    assert told["ok"] is False
    assert any(name in problem["file"] for problem in told["problems"])


@pytest.mark.parametrize("command", ["verify", "info"])
def test_folder_without_manifest_is_one_line(command: str, tmp_path: Path) -> None:
    assert "manifest.json" in one_line(call(command, tmp_path))
    assert "no such folder" in one_line(call(command, tmp_path / "none"))


def test_info_prints_what_is_there(records: Path) -> None:
    told = json.loads(call("info", records, "--json").stdout)
    assert told["images"] == 24
    assert re.search(r"^train +\d+ images in", call("info", records).stdout, re.MULTILINE)


@pytest.mark.parametrize("command", [[], ["to-mindrecord"], ["verify"], ["info"]])
def test_help_says_what_it_does_and_gives_an_example(command: list[str]) -> None:
    text = call(*command, "--help").output
    assert "imnet-prep" in text
    assert not command or "Example:" in text


def test_the_defaults_of_to_mindrecord_are_the_library_s() -> None:
    shown = {parameter.name: parameter.default for parameter in to_mindrecord.params}
    plan, options = PlanOptions(), ConvertOptions()
    assert (shown["seed"], shown["label_space"], shown["duplicates"]) == (plan.seed, plan.label_space, plan.duplicates)
    assert shown["quality"] == plan.store.quality
    assert (shown["max_rejected"], shown["executor"]) == (options.max_rejected, options.executor)
