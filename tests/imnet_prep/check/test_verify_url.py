"""Verify records behind a URL: what is missing, changed or too much is named as for a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from imnet_prep.check.verify import VerifyResult, verify
from imnet_prep.errors import RecordsError, RemoteError
from imnet_prep.records.manifest import MANIFEST
from tests.needs import needs
from tests.records import entries, flip, prep, quiet, write_folder
from tests.served import served

needs("fsspec", "aiohttp")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "records", {"train": entries(12)}, shards=3)


def check(records: Path, level: str = "hash") -> VerifyResult:
    return verify(f"file://{records}/", level, 2, quiet)


@pytest.mark.parametrize("level", ["quick", "hash"])
def test_whole_records_are_ok(records: Path, level: str) -> None:
    result = check(records, level)
    assert result == verify(records, level, 1, quiet)
    assert (result.ok, result.shards, result.records) == (True, 3, 12)
    with served(records) as server:
        assert verify(server.url, level, 1, quiet) == result


def test_each_fault_is_named(records: Path) -> None:
    first, second, third = sorted((records / "train").glob("*.mindrecord"))
    flip(first, 8 * (first.stat().st_size - 100))
    second.unlink()
    third.write_bytes(third.read_bytes() + b"more")
    (records / "train" / "extra").write_bytes(b"")
    here, there = verify(records, "hash", 1, quiet), check(records)
    assert {(problem.kind, problem.file) for problem in there.problems} == {
        ("digest", f"train/{first.name}"),
        ("missing", f"train/{second.name}"),
        ("size", f"train/{third.name}"),
        ("unexpected", "train/extra"),
    }
    found = {(problem.kind, problem.file) for problem in here.problems if problem.kind != "header"}
    assert found >= {(problem.kind, problem.file) for problem in there.problems}
    assert {problem.kind for problem in check(records, "quick").problems} == {"missing", "size", "unexpected"}


def test_a_changed_manifest_is_a_problem_and_a_missing_one_an_error(records: Path) -> None:
    flip(records / MANIFEST, 8 * 400)
    assert [problem.kind for problem in check(records).problems] == ["manifest"]
    (records / MANIFEST).unlink()
    with pytest.raises(RemoteError, match=r"manifest\.json does not exist"):
        check(records)


def test_rows_behind_a_url_are_not_decoded(records: Path) -> None:
    with pytest.raises(RecordsError, match="level quick or hash"):
        check(records, "decode")


def test_other_commands_say_that_they_take_no_url(records: Path) -> None:
    done = prep("report", f"file://{records}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: file:/")
    assert done.stderr.endswith("copy them to a folder\n")


@pytest.mark.slow
def test_the_commands_take_a_url_and_hide_what_is_secret_in_it(records: Path) -> None:
    with served(records) as server:
        url = server.url.replace("://", "://user:hunter2@")
        described = prep("info", url, "--json")
        assert described.returncode == 0, described.stderr
        (records / "train" / "records.jsonl.gz").write_bytes(b"")
        damaged = prep("verify", url)
        assert damaged.returncode == 3
        assert f"{server.url}: 1 problem(s) at level hash: 3 shards, 12 records" in damaged.stdout
        for done in (described, damaged):
            assert "hunter2" not in done.stdout + done.stderr
