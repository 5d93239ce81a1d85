"""Finished files and folders get their names: all of them, whatever interrupts it, and nothing outside the folder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imnet_prep.errors import RecordsError
from imnet_prep.records.manifest import FORMAT
from imnet_prep.records.publish import (
    WORK,
    WORK_JOURNAL,
    WORK_LOCK,
    Move,
    changing,
    finish,
    publish,
    refuse_inside_records,
    refuse_interrupted,
)


class Killed(BaseException):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"old {name}")
        (tmp_path / f"{name}.new").write_text(f"new {name}")
    return tmp_path


def moves(folder: Path) -> list[Move]:
    return [Move(folder / f"{name}.new", folder / name, folder / "kept" / name) for name in ("a", "b")]


def contents(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


DONE = {"a": "new a", "b": "new b", "kept/a": "old a", "kept/b": "old b"}


def killing(step: int) -> Callable[..., None]:
    """Let the n-th rename be the last thing that happens."""
    left, rename = [step], os.rename

    def dying(one: Path, other: Path) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        rename(one, other)

    return dying


def test_all_get_their_names_and_what_stood_there_is_kept(folder: Path) -> None:
    publish(folder / "journal", moves(folder))
    assert contents(folder) == DONE


@pytest.mark.parametrize("step", range(5))
def test_killed_before_any_rename_the_next_run_finishes(
    folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = killing(step)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        patch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            publish(folder / "journal", moves(folder))
    if step == 0:  # before the journal has its name: nothing was begun
        assert not finish(folder / "journal")
        publish(folder / "journal", moves(folder))
    else:
        assert finish(folder / "journal")
    assert contents(folder) == DONE
    assert not finish(folder / "journal")


def test_what_was_kept_before_is_not_written_over(folder: Path) -> None:
    (folder / "kept").mkdir()
    (folder / "kept" / "a").write_text("the first a")
    publish(folder / "journal", moves(folder))
    assert contents(folder) == {**DONE, "kept/a": "the first a"}


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_a_journal_of_someone_else_moves_nothing_outside_the_folder(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.write_text("mine")
    (folder / "journal").write_text(json.dumps({"moves": [["a.new", name, None]], "discard": []}))
    with pytest.raises(RecordsError, match="is not the journal"):
        finish(folder / "journal")
    (folder / "journal").write_text(json.dumps({"moves": [], "discard": [name]}))
    with pytest.raises(RecordsError, match="is not the journal"):
        finish(folder / "journal")
    assert outside.read_text() == "mine"
    assert contents(folder)["a.new"] == "new a"


def test_a_journal_of_someone_else_moves_nothing_through_links(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("home")
    (outside / "keys").write_text("mine")
    (folder / "link").symlink_to(outside)
    for document in ({"moves": [["a.new", "link/keys", None]], "discard": []}, {"moves": [], "discard": ["link/keys"]}):
        (folder / "journal").write_text(json.dumps(document))
        with pytest.raises(RecordsError, match="a path outside the folder"):
            finish(folder / "journal")
    assert (outside / "keys").read_text() == "mine"


def test_a_journal_may_name_only_what_its_command_moves(folder: Path) -> None:
    (folder / "journal").write_text(json.dumps({"moves": [["a.new", "a", None]], "discard": ["b"]}))
    with pytest.raises(RecordsError, match="may not name: b"):
        finish(folder / "journal", among=[folder / "a.new", folder / "a"])
    assert contents(folder)["b"] == "old b"
    assert contents(folder)["a"] == "old a"


def test_a_change_is_published_as_a_whole_and_leaves_nothing(folder: Path) -> None:
    with changing(folder) as change:
        for name in ("a", "deep/c"):
            change.stage(folder / name).write_text("changed")
        assert contents(folder)["a"] == "old a"
        change.publish([folder / "a", folder / "deep" / "c"])
    assert contents(folder) == {"a": "changed", "deep/c": "changed", "a.new": "new a", "b": "old b", "b.new": "new b"}


def test_a_change_that_fails_leaves_everything_as_it_was(folder: Path) -> None:
    before = contents(folder)

    def fail() -> None:
        with changing(folder) as change:
            change.stage(folder / "a").write_text("changed")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RecordsError, match="cannot be written or read; got No space left"):
        fail()
    assert contents(folder) == before
    assert {path.name for path in folder.iterdir()} == set(before)


def test_one_change_at_a_time(folder: Path) -> None:
    with changing(folder), pytest.raises(RecordsError, match="another command is changing it"), changing(folder):
        pass
    assert not {WORK, WORK_JOURNAL, WORK_LOCK} & {path.name for path in folder.iterdir()}


def test_readers_are_told_of_an_interrupted_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_interrupted(folder)

    def die() -> None:
        with changing(folder) as change, monkeypatch.context() as patch:
            change.stage(folder / "a").write_text("changed")
            patch.setattr(os, "replace", killing(1))
            change.publish([folder / "a"])

    with pytest.raises(Killed):
        die()
    with pytest.raises(RecordsError, match="was interrupted while it changed it"):
        refuse_interrupted(folder)
    with changing(folder) as change:
        assert change.resumed
    assert contents(folder)["a"] == "changed"
    refuse_interrupted(folder)


def test_a_place_in_a_records_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "manifest.json").write_text(json.dumps({"format": FORMAT}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"manifest_version": 3}')
    (tmp_path / "half.partial" / ".work").mkdir(parents=True)
    for place in ("records/x", "records/train/x.html", "half.partial/x"):
        with pytest.raises(RecordsError, match="lies in the records folder"):
            refuse_inside_records(tmp_path / place)
    for place in ("records", "other/x", "records-2/x"):
        refuse_inside_records(tmp_path / place)
