"""Records that the loader's tests read, and a check that they leave nothing behind."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imnet_prep.loader.runs import TRAIN, VAL
from tests.records import Entry, entries, write_folder


@pytest.fixture(scope="session")
def train_entries() -> list[Entry]:
    return entries(TRAIN)


@pytest.fixture(scope="session")
def val_entries() -> list[Entry]:
    return entries(VAL, seed=1)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory, train_entries: list[Entry], val_entries: list[Entry]) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "records"
    return write_folder(folder, {"train": train_entries, "val": val_entries}, shards=3)


@pytest.fixture
def copy(records: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(records, tmp_path / "records"))


def decoding() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("imnet-decode")]


@pytest.fixture(autouse=True)
def _no_thread_or_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No decode thread outlives a test, and none leaves a file in the working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield
    if decoding():
        gc.collect()  # not after each test, as it takes 0.2 s
    assert not decoding()
    assert list(work.iterdir()) == []
