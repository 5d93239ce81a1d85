"""Verification on Dask workers: the result is that of one machine, whatever is damaged and whoever dies."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from imnet_prep.check.verify import VerifyResult, verify
from imnet_prep.errors import PlanError, RecordsError
from imnet_prep.records import folder as records_folder
from imnet_prep.types import Progress
from tests.dask_cluster import Cluster
from tests.imnet_prep.obstacles import make_fifo
from tests.needs import needs
from tests.records import command, copy, make_records, quiet, spoil_image

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Dask's own threads and sockets
needs("distributed")


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Have several tasks in a shard; this process makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_folder, "CHUNK_ROWS", 7)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def repeat(source: Path) -> None:
        first, second = sorted(source.glob("train/*/*"))[:2]
        shutil.copy(first, second)  # a duplicate, which is a warning

    return make_records(tmp_path_factory.mktemp("verify"), per_class={"train": 30, "val": 4}, shards=3, add=repeat)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with closing(Cluster(tmp_path_factory.mktemp("dask") / "files", [[], []])) as running:
        yield running


def on(
    cluster: Cluster, records: Path, level: str = "decode", progress: Callable[[Progress], None] = quiet
) -> VerifyResult:
    return verify(records, level, None, progress, executor="dask", scheduler=cluster.address)


def first(records: Path, pattern: str = "train/*.mindrecord") -> Path:
    return sorted(records.glob(pattern))[0]


def garble_images(records: Path) -> None:
    for shard in (0, 2):
        for row in (0, 8, 9):
            spoil_image(records, shard, row, "zero the second half" if row == 9 else "flip a byte")


def change_labels(records: Path) -> None:
    with closing(sqlite3.connect(first(records, "train/*.db"))) as connection, connection:
        connection.execute("UPDATE INDEXES SET label_0 = (label_0 + 1) % 3 WHERE ROW_ID IN (4, 6)")


def cut_shard(records: Path) -> None:
    os.truncate(first(records), first(records).stat().st_size // 2)


def cut_list(records: Path) -> None:
    path = records / "train" / "records.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-200])


def forget_lines(records: Path) -> None:
    path = records / "val" / "records.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(gzip.decompress(path.read_bytes()).splitlines(keepends=True)[:-2])))


def put_a_fifo(records: Path) -> None:
    path = first(records)
    path.unlink()
    make_fifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "images": garble_images,
    "labels": change_labels,
    "shard cut": cut_shard,
    "shard gone": lambda records: first(records).unlink(),
    "shard of another": lambda records: shutil.copy(first(records, "val/*.mindrecord"), first(records)),
    "header": lambda records: first(records).open("r+b").write(bytes(64)),
    "index gone": lambda records: first(records, "train/*.db").unlink(),
    "index": lambda records: first(records, "train/*.db").write_bytes(b"no database"),
    "list cut": cut_list,
    "list short": forget_lines,
    "list gone": lambda records: (records / "train" / "records.jsonl.gz").unlink(),
    "FIFO": put_a_fifo,
    "file too many": lambda records: shutil.copy(first(records), records / "train" / "more.mindrecord"),
    "manifest": lambda records: (records / "manifest.json").write_bytes(b"{}"),
}


def test_whole_records_are_whole(whole: Path, cluster: Cluster) -> None:
    seen: list[Progress] = []
    result = on(cluster, whole, progress=seen.append)
    alone = verify(whole, "decode", 1, quiet)
    assert result == alone
    assert result.ok
    assert {warning.kind for warning in result.warnings} == {"duplicate", "near_duplicate"}
    ends = {state.unit: state for state in seen}
    assert (ends["images"].done, ends["images"].total) == (102, 102)
    assert ends["bytes"].total
    assert ends["bytes"].done == ends["bytes"].total


@pytest.mark.parametrize(
    ("levels", "names"),
    [
        (("decode",), ("images", "labels", "shard cut", "list short", "FIFO")),
        pytest.param(("hash", "decode"), tuple(DAMAGES), marks=pytest.mark.long),
    ],
)
def test_the_problems_are_those_of_one_machine(
    whole: Path, cluster: Cluster, tmp_path: Path, levels: tuple[str, ...], names: tuple[str, ...]
) -> None:
    for name in names:
        records = copy(whole, tmp_path / name)
        DAMAGES[name](records)
        for level in levels:
            alone = verify(records, level, 1, quiet)
            assert not alone.ok, name
            assert on(cluster, records, level).to_json() == alone.to_json(), name


def test_a_folder_that_was_mended_since_is_whole(whole: Path, cluster: Cluster, tmp_path: Path) -> None:
    """A worker outlives a verification, and must not go on with a file that it has opened."""
    records = copy(whole, tmp_path / "records")
    first(records).write_bytes(b"")
    assert not on(cluster, records).ok
    shutil.copy(first(whole), first(records))
    assert on(cluster, records).ok
    garble_images(records)
    assert not on(cluster, records).ok


def test_the_command_prints_and_exits_as_on_one_machine(whole: Path, cluster: Cluster, tmp_path: Path) -> None:
    garble_images(copy(whole, tmp_path / "records"))
    first(copy(whole, tmp_path / "records-2")).write_bytes(b"")
    for arguments in (["records"], ["records", "--json"], ["records-2"]):
        words = command("verify", *arguments, "--level", "decode")
        alone, together = (
            subprocess.run([*words, *more], cwd=tmp_path, capture_output=True, check=False)
            for more in ([], ["--executor", "dask", "--scheduler", cluster.address])
        )
        assert (together.returncode, together.stdout) == (3, alone.stdout)


def test_a_killed_worker_changes_nothing(whole: Path, tmp_path: Path) -> None:
    records = copy(whole, tmp_path / "records")
    garble_images(records)
    with closing(Cluster(tmp_path / "dask", [[], [], []])) as three:

        def kill(state: Progress) -> None:
            if state.unit == "images" and state.done >= 20:
                three.workers[0].kill()
            if state.unit == "images" and state.done >= 50:
                three.workers[1].kill()

        result = on(three, records, progress=kill)
        assert [worker.poll() is None for worker in three.workers] == [False, False, True]
    assert result == verify(records, "decode", 1, quiet)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8786", "tcp://127.0.0.1:none"])
def test_an_address_that_is_none_is_one_line(whole: Path, address: str) -> None:
    with pytest.raises(PlanError, match="cannot be reached"):
        verify(whole, "hash", None, quiet, executor="dask", scheduler=address)


@pytest.mark.long
def test_the_last_worker_is_missed_and_another_one_goes_on(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Cluster(tmp_path / "dask", [[]])) as one:

        def kill(state: Progress) -> None:
            if state.unit == "images" and state.done >= 20 and len(one.workers) == 1:
                one.workers[0].kill()
                one.workers[0].wait()
                one.add_worker([], after_s=6)

        assert on(one, whole, progress=kill) == verify(whole, "decode", 1, quiet)
    assert [record.message for record in caplog.records if "no Dask worker is left" in record.message]


@pytest.mark.long
def test_a_lost_scheduler_is_one_line(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Cluster(tmp_path / "dask", [[]])) as one:

        def kill(state: Progress) -> None:
            if state.unit == "images" and state.done >= 20:
                one.scheduler.kill()

        with pytest.raises(PlanError, match=r"--scheduler tcp://.*: was lost"):
            on(one, whole, progress=kill)
    assert "Traceback" not in capfd.readouterr().err


# --- workers that are not fit -----------------------------------------------------------------------------------------

NOTHING_THERE = 'mount -t tmpfs none "$0" && exec "$@"'
"""Hide a folder ($0) from a command, in a mount namespace of its own."""
OTHER_VERSION = """
import importlib.metadata as metadata
found = metadata.version
metadata.version = lambda name: "0.1.0" if name == "imnet-prep" else found(name)
"""


def refused(records: Path, tmp_path: Path, around: Sequence[str]) -> str:
    """Verify with one such worker, and return the error's text."""
    with (
        closing(Cluster(tmp_path / "dask", [around])) as one,
        pytest.raises((PlanError, RecordsError)) as caught,
    ):
        on(one, records)
    return str(caught.value)


def test_a_worker_that_does_not_see_the_folder_is_named(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    around = ["unshare", "--mount", "sh", "-c", NOTHING_THERE, str(whole)]
    if subprocess.run([*around, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces")
    text = refused(whole, tmp_path, around)
    assert text.startswith("Dask worker tcp://127.0.0.1:")
    assert f"does not see {whole}" in text
    assert "mount the folder under the same path" in text
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.long
def test_a_worker_of_another_version_is_named(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_VERSION, "utf-8")
    text = refused(whole, tmp_path, ["env", f"PYTHONPATH={tmp_path}"])
    assert re.match(r"Dask worker tcp://\S+: another version of imnet-prep; expected \S+; got 0.1.0; install", text)
