"""The commands that look at, mend and make over records folders: exit codes, one JSON object, files that are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imnet_prep.cli.mobilenet import main as mobilenet
from imnet_prep.cli.prep import main
from tests.records import copy, flip, make_records


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("inspect"), per_class=5)


@pytest.fixture
def records(whole: Path, tmp_path: Path) -> Path:
    return copy(whole, tmp_path / "records")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize("command", ["report", "browse", "repair-index", "adopt", "reshard", "verify"])
def test_help_says_what_it_does_with_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Example: imnet-prep " + command in " ".join(result.output.split())


def test_verify_decode_exits_3_and_names_the_row(records: Path) -> None:
    assert answer("verify", records, "--level", "decode")["ok"] is True
    path = sorted(records.glob("train/*.mindrecord"))[0]
    flip(path, 8 * (path.stat().st_size // 3))
    document = answer("verify", records, "--level", "decode", code=3)
    assert document["ok"] is False
    assert {problem["file"] for problem in document["problems"]} == {"train/" + path.name}
    text = call("verify", records, "--level", "decode")
    assert text.exit_code == 3
    assert f"train/{path.name}" in text.stdout
    assert "problem(s)" in text.stdout


def test_verify_expect(records: Path) -> None:
    assert answer("verify", records, "--level", "quick", "--expect", "ilsvrc2012", code=3)["ok"] is False


def test_repair_index_mends_and_exits_3_where_rows_are_lost(records: Path) -> None:
    index, data = sorted(records.glob("train/*.db"))[0], sorted(records.glob("val/*.mindrecord"))[0]
    index.unlink()
    assert answer("repair-index", records)["rebuilt"] == 1
    assert call("verify", records).exit_code == 0
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size // 2)
    document = answer("repair-index", records, code=3)
    assert document["salvaged"] == 1
    assert document["rows_lost"] > 0


def test_reshard_and_adopt_give_folders_that_verify(records: Path, tmp_path: Path) -> None:
    document = answer("reshard", records, "--shards", 3, "--out", tmp_path / "three")
    assert (document["images"], document["shards"], document["labels_unchanged"]) == (30, 6, True)
    assert len(document["proof"]) == 64
    (tmp_path / "three" / "manifest.json").unlink()
    (tmp_path / "three" / "rejected.jsonl").unlink()
    assert answer("adopt", tmp_path / "three")["images"] == {"train": 15, "val": 15}
    assert call("verify", tmp_path / "three", "--level", "decode").exit_code == 0


def test_report_writes_its_file_and_prints_one_object(records: Path, tmp_path: Path) -> None:
    document = answer("report", records, "--out", tmp_path / "r.html")
    assert document["bytes"] == (tmp_path / "r.html").stat().st_size
    assert document["images"] == 30


def test_missing_folders_are_one_line_and_exit_1(tmp_path: Path) -> None:
    none = tmp_path / "none"
    commands = (
        ("verify", none), ("repair-index", none), ("adopt", none), ("report", none), ("browse", none),
        ("reshard", none, "--out", tmp_path / "out"),
    )  # fmt: skip
    for arguments in commands:
        result = call(*arguments)
        assert result.exit_code == 1, arguments
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert CliRunner().invoke(mobilenet, ["report", str(none)]).exit_code == 1


def test_quick_and_hash_need_neither_opencv_nor_mindspore(whole: Path) -> None:
    script = (
        "import sys; from imnet_prep.cli.prep import main\n"
        "main(['verify', sys.argv[1], '--level', 'hash'], standalone_mode=False)\n"
        "assert not {'cv2', 'mindspore', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(whole)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "command", [("verify", "--level", "decode"), ("report",), ("reshard", "--out", "out"), ("adopt", "--force")]
)
def test_no_workers_is_out_of_range(records: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *rest = (str(tmp_path / part) if part == "out" else part for part in command)
    result = call(name, records, *rest, "--workers", "0")
    assert result.exit_code == 1
    assert "--workers is out of range" in result.stderr
