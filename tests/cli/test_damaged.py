"""The commands that only read, on records folders that are damaged or forged: one line and an exit code, no waiting."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from imnet_prep.cli.prep import main
from imnet_prep.records.manifest import MANIFEST
from tests.imnet_prep.obstacles import make_fifo, no_hang
from tests.records import copy, keep_permissions, make_records, reseal

pytest.importorskip("flask")


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """End what waits, for a FIFO's writer say, with an error that no command expects."""
    with no_hang(100):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("damaged"), per_class=3)


@pytest.fixture
def records(whole: Path, tmp_path: Path) -> Path:
    return copy(whole, tmp_path / "records")


def endings(records: Path) -> dict[str, tuple[int, str]]:
    """Run info, report and browse; return their exit codes and what they say on stderr, which is one line at most."""
    found = {}
    with socket.socket() as taken:  # so that a browse that finds nothing wrong ends, too
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, *options in (
            ["info"],
            ["report", "--workers=1", f"--out={records}.html"],
            ["browse", "--port", port],
        ):
            result = CliRunner().invoke(main, [name, str(records), *options])
            assert result.stderr.count("\n") == (result.exit_code != 0), (name, result)
            assert result.exit_code == 0 or result.stderr.startswith("error: "), (name, result)
            found[name] = result.exit_code, result.stderr
    return found


def split_of(document: Any) -> Any:
    return document["splits"]["train"]


def many_rows(document: Any) -> None:
    split_of(document)["shards"][0]["rows"] = 10**18


def many_records(document: Any) -> None:
    """Numbers that agree with each other, and with nothing else."""
    split = split_of(document)
    split["shards"][0] |= {"rows": 10**18, "size_bytes": 10**20}
    split["images"] = split["found"] = 10**18 + split["shards"][1]["rows"]
    split["class_counts"][0] = split["images"] - sum(split["class_counts"][1:])


def no_classes(document: Any) -> None:
    document["classes"] = []


def short_counts(document: Any) -> None:
    split_of(document)["class_counts"].pop()


def shard_twice(document: Any) -> None:
    split_of(document)["shards"][1] = split_of(document)["shards"][0]


def broken_number(document: Any) -> None:
    split_of(document)["shards"][0]["rows"] = float(split_of(document)["shards"][0]["rows"])


def other_list(document: Any) -> None:
    split_of(document)["records"]["file"] = "val/records.jsonl.gz"


FORGED = [many_rows, no_classes, short_counts, shard_twice, broken_number, other_list]


@pytest.mark.parametrize("forge", FORGED)
def test_a_forged_manifest_is_refused(forge: Callable[[Any], None], records: Path) -> None:
    reseal(records, forge)
    for code, said in endings(records).values():
        assert code == 3
        assert MANIFEST in said


def test_numbers_that_agree_with_each_other_alone_end_what_reads_the_records(records: Path) -> None:
    reseal(records, many_records)
    found = endings(records)
    assert found["info"] == (0, "")  # it reads the manifest alone
    assert "records.jsonl.gz: line " in found["report"][1]
    assert "bytes, expected" in found["browse"][1]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"[" * 100_000, 3), (b'{"a":' * 100_000, 3), (b"", 3), (b"\xff\xfe", 3), (b'"\\ud800"', 3), (b"[]", 1),
        (b"null", 1), (b"9" * 5000, 3), (b'{"format": "imnet-prep/records", "format_version": 1}', 3),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_manifest_is_refused(data: bytes, code: int, records: Path) -> None:
    (records / MANIFEST).write_bytes(data)
    for got, said in endings(records).values():
        assert got == code, said
        assert MANIFEST in said


def test_a_manifest_with_half_a_character_is_refused(records: Path) -> None:
    """JSON can write one that no text file can hold."""
    path = records / MANIFEST
    document = json.loads(path.read_bytes())
    document["label_convention"] = "\ud800"
    path.write_text(json.dumps(document))
    assert {code for code, _ in endings(records).values()} == {3}


FILES = [MANIFEST, "train/records.jsonl.gz", "train/*-00000-of-*.mindrecord", "train/*-00000-of-*.mindrecord.db"]


def check_named(command: str, code: int, said: str, path: Path) -> None:
    if command == "browse" or path.suffix != ".db":
        assert code == 1, (command, path, said)
        assert path.name in said or path.name == MANIFEST
    else:
        assert (code, said) == (0, "")  # report finds the rows by the data file's pages


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("put", ["pipe", "folder", "nothing", "/dev/zero", "loop"])
def test_what_is_no_file_is_named(name: str, put: str, records: Path) -> None:
    path = min(records.glob(name))
    path.unlink()
    if put == "pipe":
        make_fifo(path)
    elif put == "folder":
        path.mkdir()
    elif put != "nothing":
        path.symlink_to(path if put == "loop" else put)
    for command, (code, said) in endings(records).items():
        if command != "info" or name == MANIFEST:
            check_named(command, code, said, path)
        else:
            assert (code, said) == (0, "")


@pytest.mark.slow
def test_a_file_without_permission_is_named(records: Path) -> None:
    for name in FILES:
        path = min(records.glob(name))
        path.chmod(0)
        command = [sys.executable, "-m", "imnet_prep", "report", str(records), "--workers=1"]
        done = subprocess.run(
            [*command, f"--out={records}.html"],
            preexec_fn=keep_permissions,
            capture_output=True,
            text=True,
            check=False,
        )
        check_named("report", done.returncode, done.stderr, path)
        path.chmod(0o644)
