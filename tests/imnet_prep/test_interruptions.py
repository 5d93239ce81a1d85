"""Interrupted before any call that changes a file, or failing at one, a command run again ends in the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle

import pytest

from tests.imnet_prep.interruptions import (
    FAULTS,
    KINDS,
    RANDOM_KILLS,
    SCENARIOS,
    Call,
    Refused,
    Stage,
    flush_faults,
    parse,
    random_kills,
    sample,
    server,
    sweep,
    work_seconds,
)

if sys.platform != "linux":
    pytest.skip("strace, /proc and pidfd are needed", allow_module_level=True)

LONG_LIMIT_S = 3600
SURE_S = 0.2  # no command is done so soon: its workers have not started
WITH_WORKERS = ("to-mindrecord", "reshard")
ON_WINDOWS = ("to-mindrecord", "repair-index-label")
Stages = Callable[[str], Stage]


@contextmanager
def staged(*, windows: bool) -> Iterator[Stages]:
    """Set up scenarios by name, each once."""
    made: dict[str, Stage] = {}
    try:
        with server(windows=windows) as started:
            yield lambda name: made.get(name) or made.setdefault(name, Stage(SCENARIOS[name], started))
    except Refused as error:
        pytest.skip(f"calls cannot be interrupted here: {error}")


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    with staged(windows=False) as made:
        yield made


@pytest.fixture(scope="module")
def windows_stages() -> Iterator[Stages]:
    with staged(windows=True) as made:
        yield made


def check(texts: Iterator[str]) -> None:
    found = list(texts)
    assert not found, "\n".join([f"{len(found)} places end badly", *found])


def test_a_call_that_others_came_before_is_found_again(stages: Stages) -> None:
    stage = stages("repair-index-deleted")
    place = next(call for call in stage.places("kill") if call.name == "openat")
    for call in stage.calls:
        call.ordinal -= 1  # as if this run opened one more file than the one that was listed
    check(sweep(stage, "kill", [place]))


# --- a sample for every run of the tests -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault"), zip(SCENARIOS, cycle(FAULTS), strict=False))
def test_interrupted_at_a_few_places_and_run_again_it_ends_in_the_same_bytes(
    stages: Stages, name: str, fault: str
) -> None:
    stage = stages(name)
    for kind, count in (("kill", 2), (fault, 1)):
        places = sample(stage.places(kind), count, seed=13)
        assert len(places) == count
        check(sweep(stage, kind, places))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_gets_its_final_name_is_flushed_before_and_its_folder_after(stages: Stages, name: str) -> None:
    assert stages(name).flush_faults() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_WORKERS)
def test_group_killed_at_a_random_moment_and_run_again_it_ends_in_the_same_bytes(stages: Stages, name: str) -> None:
    check(random_kills(stages(name), 1, seed=13, work_s=SURE_S))


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_WINDOWS)
def test_killed_as_on_windows_and_run_again_it_ends_in_the_same_bytes(windows_stages: Stages, name: str) -> None:
    stage = windows_stages(name)
    check(sweep(stage, "kill", sample(stage.places("kill"), 2, seed=13)))


# --- every place: make test-long -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(LONG_LIMIT_S)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_interrupted_at_every_place_and_run_again_it_ends_in_the_same_bytes(
    stages: Stages, name: str, kind: str
) -> None:
    stage = stages(name)
    assert stage.places(kind)
    check(sweep(stage, kind, stage.places(kind)))


@pytest.mark.long
@pytest.mark.timeout(LONG_LIMIT_S)
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_as_on_windows_at_every_place_and_run_again_it_ends_in_the_same_bytes(
    windows_stages: Stages, name: str
) -> None:
    stage = windows_stages(name)
    check(sweep(stage, "kill", stage.places("kill")))


@pytest.mark.long
@pytest.mark.timeout(LONG_LIMIT_S)
@pytest.mark.parametrize("name", WITH_WORKERS)
def test_group_killed_at_many_random_moments_and_run_again_it_ends_in_the_same_bytes(stages: Stages, name: str) -> None:
    stage = stages(name)
    check(random_kills(stage, RANDOM_KILLS, 0, work_seconds(stage)))


# --- the means -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_comes_before_the_call(stages: Stages) -> None:
    stage = stages("to-mindrecord")
    publish = next(call for call in stage.places("kill") if call.paths[-1] == str(stage.root / "records"))
    outcome, faults = stage.interrupt("kill", publish)
    assert (outcome.status, faults) == (-9, [])
    assert not (stage.root / "records").exists()


@pytest.mark.slow
def test_other_call_than_the_one_meant_is_noticed(stages: Stages) -> None:
    stage = stages("to-mindrecord")
    first, *_, last = stage.places("EIO")
    wrong = Call(first.thread, first.name, first.ordinal, last.paths, 10_000, last.text)  # no such call is listed
    assert "interrupted another call" in stage.interrupt("EIO", wrong)[1][0]
    beyond = Call(first.thread, first.name, 10_000, first.paths, 10_000, first.text)
    assert "never got there" in stage.interrupt("EIO", beyond)[1][0]


SOUND = """\
7 openat(AT_FDCWD</>, "/case/out.tmp", O_WRONLY|O_CREAT|O_CLOEXEC, 0666) = 3</case/out.tmp>
7 write(3</case/out.tmp>, "data", 4) = 4
7 fsync(3</case/out.tmp>) = 0
7 rename("/case/out.tmp", "/case/out") = 0
7 fsync(3</case>) = 0
"""


def faults_of(trace: str) -> list[str]:
    return flush_faults(parse(trace), "/case", ["out"])


def test_sound_order_of_calls_has_no_fault() -> None:
    assert faults_of(SOUND) == []
    assert faults_of(SOUND.replace('"/case/out")', '"/case/.work/out")')) == []


@pytest.mark.parametrize(
    ("line", "with_line", "fault"),
    [
        ("7 fsync(3</case/out.tmp>) = 0\n", "", "not flushed before its rename: /case/out.tmp"),
        (
            "7 fsync(3</case/out.tmp>) = 0\n",
            "7 fsync(3</case/out.tmp>) = -1 EIO (x)\n",
            "not flushed before its rename",
        ),
        ("7 rename", '7 pwrite64(3</case/out.tmp>, "x", 1, 0) = 1\n7 rename', "not flushed before its rename"),
        ("7 fsync(3</case>) = 0\n", "", "its folder is not flushed after it"),
        ("7 fsync(3</case>) = 0\n", '7 fsync(3</case>) = 0\n7 write(3</case/out>, "x", 1) = 1\n', "never flushed"),
    ],
)
def test_missing_flush_is_found(line: str, with_line: str, fault: str) -> None:
    assert line in SOUND
    assert [text.startswith(fault) for text in faults_of(SOUND.replace(line, with_line))] == [True]


def test_folder_is_renamed_only_once_what_is_in_it_is_flushed() -> None:
    trace = """\
7 mkdir("/case/out.tmp", 0777) = 0
7 openat(AT_FDCWD</>, "/case/out.tmp/a", O_WRONLY|O_CREAT|O_CLOEXEC, 0666) = 3</case/out.tmp/a>
7 write(3</case/out.tmp/a>, "data", 4 <unfinished ...>
8 fsync(4</case/out.tmp>) = 0
7 <... write resumed>) = 4
7 renameat(AT_FDCWD</case>, "out.tmp", AT_FDCWD</case>, "out") = 0
7 fsync(4</case>) = 0
"""
    calls = parse(trace)
    assert [(call.thread, call.name, call.ordinal) for call in calls[2:4]] == [(0, "write", 1), (1, "fsync", 1)]
    (fault,) = flush_faults(calls, "/case", ["out", "out/a"])
    assert fault.startswith("not flushed before its rename: /case/out.tmp/a, changed by write #1")
