"""TensorBoard events hold each row of the logs once, however the run was interrupted."""

from pathlib import Path

import pytest

from mbv2.training.logs import EpochRow, RunLog, StepRow
from tests.mbv2.training.test_pairs import losses_of_events


def add_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.add_step(StepRow(0, step, step / 4, 0.1, None, 5.0, 10.0, 0.25, "data-bound"))


@pytest.mark.parametrize("damage", ["none", "cut short", "garbage at the end", "a file lost"])
def test_events_are_cut_back_and_what_lacks_is_added(damage: str, tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 0, events=True)
    add_steps(log, 1, 5)  # and the process is killed: nothing is closed
    (path,) = (tmp_path / "events").iterdir()
    data = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "garbage at the end":
        path.write_bytes(data + (30).to_bytes(8, "little") + b"\xff" * 60)
    elif damage == "a file lost":
        path.unlink()
    log = RunLog(tmp_path, 0, 3, events=True)
    add_steps(log, 4, 6)
    log.add_epoch(EpochRow(1, 6, 0.1, 1.5, 1.25, 0.5, None, 10.0, 0.0))
    log = RunLog(tmp_path, 1, 6, events=True)
    log.close()
    assert losses_of_events(tmp_path) == [(step, step / 4) for step in range(1, 7)]
