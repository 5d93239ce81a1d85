"""Who does the work: local processes and Dask, what is given when, and what happens when a process dies."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from imnet_prep import cluster
from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.build.shard_task import run_task
from imnet_prep.errors import ImnetError, Interrupted, PlanError
from imnet_prep.types import Progress
from tests.dask_cluster import Cluster
from tests.imnet_prep.obstacles import kill
from tests.records import digests, names, quiet, run
from tests.synthetic import make_image_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("source"), 3, 40, width=160, height=120)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "records"
    run(source, out, shards=6, workers=1)
    return digests(out)


def children() -> set[int]:
    """Worker processes of this one."""
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "spawn_main"], capture_output=True, text=True, check=False
    )
    return {int(pid) for pid in found.stdout.split()}


def test_no_task_is_no_process() -> None:
    assert list(cluster.run_tasks(run_task, [], 0, "tcp://127.0.0.1:9", lambda *_: None, task="shard")) == []


@pytest.mark.slow
def test_workers_change_no_byte(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    run(source, tmp_path / "records", shards=6, workers=3)
    assert digests(tmp_path / "records") == expected


def test_progress_ends_at_the_number_of_images(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    options = ConvertOptions(workers=2)
    convert([source], tmp_path / "r", None, PlanOptions(shards=6), options, seen.append, lambda: False)
    images = [state.done for state in seen if state.unit == "images"]
    assert images == sorted(images)
    assert images[-1] == 240


def killed_once(then: list[int]) -> None:
    """Kill the first worker process that appears."""
    for _ in range(600):
        for pid in children():
            kill(pid)
            then.append(pid)
            return
        time.sleep(0.01)


def test_killed_worker_is_an_error_and_no_hang(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=killed_once, args=(killed,))
    killer.start()
    started = time.monotonic()
    with pytest.raises(PlanError, match="worker process was killed"):
        run(source, tmp_path / "records", shards=6, workers=2)
    killer.join()
    assert killed
    assert time.monotonic() - started < 30
    assert children() == set()
    assert names(tmp_path) == {"records.partial"}
    assert names(tmp_path / "records.partial" / ".work" / "tmp") == set()
    run(source, tmp_path / "records", shards=6, workers=2)
    assert digests(tmp_path / "records") == expected


def test_stopping_finishes_what_is_in_hand(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    stopped: list[bool] = []

    def watch(state: Progress) -> None:
        if state.unit == "images" and state.done:
            stopped.append(True)

    with pytest.raises(Interrupted, match=r"of 24 shards") as caught:
        convert([source], tmp_path / "records", None, PlanOptions(shards=12), ConvertOptions(workers=1), watch,
                lambda: bool(stopped))  # fmt: skip
    assert caught.value.exit_code == 130
    done = names(tmp_path / "records.partial" / ".work" / "done")
    assert 0 < len(done) // 2 < 24
    result = run(source, tmp_path / "records", shards=12, workers=1)
    assert result.images_now < 240
    run(source, tmp_path / "whole", shards=12, workers=1)
    assert digests(tmp_path / "records") == digests(tmp_path / "whole")


def test_leaving_kills_the_workers_at_once(source: Path, tmp_path: Path) -> None:
    class Left(Exception):
        pass

    def leave(state: Progress) -> None:
        if state.unit == "images" and state.done:
            raise Left

    with pytest.raises(Left):
        convert([source], tmp_path / "r", None, PlanOptions(shards=6), ConvertOptions(workers=2), leave, lambda: False)
    assert children() == set()


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    with closing(Cluster(tmp_path / "dask", [[], []])) as running:
        yield running


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dask_gives_the_same_bytes_also_when_a_worker_is_killed_half_way(
    source: Path, expected: dict[str, str], tmp_path: Path, two_workers: Cluster
) -> None:
    def kill(state: Progress) -> None:
        if state.unit == "images" and state.done >= 40 and two_workers.workers[0].poll() is None:
            two_workers.workers[0].kill()

    options = ConvertOptions(executor="dask", scheduler=two_workers.address)
    convert([source], tmp_path / "records", None, PlanOptions(shards=6), options, kill, lambda: False)
    assert two_workers.workers[0].poll() is not None
    assert digests(tmp_path / "records") == expected


@pytest.mark.filterwarnings("ignore")
def test_dask_that_cannot_be_reached_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "CONNECT_S", 1)
    options = ConvertOptions(executor="dask", scheduler="tcp://127.0.0.1:9")
    with pytest.raises(ImnetError, match="cannot be reached"):
        convert([source], tmp_path / "records", None, PlanOptions(), options, quiet, lambda: False)
