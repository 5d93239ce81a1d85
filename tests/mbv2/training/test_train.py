"""A run: what it leaves behind, and that stopping and resuming it changes nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imnet_prep.cli.render import guard, stop_requested
from imnet_prep.errors import CheckpointError, TrainError
from imnet_prep.process_pool import stop_signals
from mbv2.recipe import Recipe
from mbv2.scoring.score import network_predict, score_batches
from mbv2.training.logs import EpochRow, RunLog, StepRow, read_metrics
from mbv2.training.options import RunOptions, RunResult, stored_run
from mbv2.training.run import train
from mbv2.weights.checkpoint import build_network, read_checkpoint
from tests.mbv2.run_standin import BATCH, RECIPE, SAVE_EVERY, options, signal_at
from tests.mbv2.standin import memory_data

STEPS = 20
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("small_network")]  # the machine may be busy


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    out = tmp_path_factory.mktemp("straight") / "run"
    return out, train(options(out), data=memory_data(batch=BATCH))


@guard
def until_a_signal(out: Path) -> None:
    """Resume as ``mbv2 train`` does: a signal asks for a stop, an error becomes an exit code."""
    with stop_requested() as stop:
        progress = signal_at(14, signal.SIGINT)
        train(options(out, resume=True), data=memory_data(batch=BATCH), stop=stop, progress=progress)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, killed in mid-epoch at 9 after its save at 7, stopped at an epoch's end, and finished slowly."""
    out = tmp_path_factory.mktemp("broken") / "run"
    command = [sys.executable, "-m", "tests.mbv2.run_standin", str(out), "9"]
    assert subprocess.run(command, check=False, timeout=600).returncode == -9
    assert read_checkpoint(out / "last.ckpt").meta.step == SAVE_EVERY
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    with pytest.raises(SystemExit) as left:
        until_a_signal(out)
    for number, handler in handlers.items():  # a process that stops ignores further signals
        signal.signal(number, handler)
    assert left.value.code == 130
    assert read_checkpoint(out / "last.ckpt").meta.step == 15
    train(options(out, resume=True), data=memory_data(batch=BATCH, delay_s=0.2))
    return out


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_in_the_same_bits(straight: tuple[Path, RunResult], broken: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        one, two = read_checkpoint(straight[0] / name), read_checkpoint(broken / name)
        assert one.meta == two.meta
        assert one.tensors.keys() == two.tensors.keys()
        for tensor, value in one.tensors.items():
            assert np.array_equal(value, two.tensors[tensor]), tensor


@pytest.mark.slow
def test_a_killed_and_resumed_run_logs_the_same_losses(straight: tuple[Path, RunResult], broken: Path) -> None:
    def losses(run: Path) -> list[tuple[int, float, float, float]]:
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]

    def scores(run: Path) -> list[tuple[object, ...]]:
        return [(row.epoch, row.step, row.train_loss, row.val_loss, row.val_top1) for row in read_metrics(run)]

    assert [row[0] for row in losses(straight[0])] == list(range(1, STEPS + 1))
    assert losses(straight[0]) == losses(broken)
    assert scores(straight[0]) == scores(broken)


@pytest.mark.slow
def test_a_slowed_source_is_called_data_bound(straight: tuple[Path, RunResult], broken: Path) -> None:
    def rows(run: Path, after: int) -> list[dict[str, object]]:
        found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [row for row in found if row["step"] > after]

    slow, fast = rows(broken, 17), rows(straight[0], 2)  # the first steps of a process compile and are not counted
    assert len(slow) == 3
    assert all(str(row["verdict"]).startswith("data-bound") for row in slow)
    bound = [row for row in fast if str(row["verdict"]).startswith("data-bound")]
    assert len(bound) < len(fast) / 2


@pytest.mark.slow
def test_a_student_that_is_its_teacher_has_nothing_to_learn(straight: tuple[Path, RunResult], tmp_path: Path) -> None:
    best = straight[0] / "best.ckpt"
    recipe = Recipe(
        epochs=1, batch_size=BATCH, image_size=32, width=0.35, dropout=0, freeze="bn", lr=0.02, warmup_frac=0,
        distill_from=str(best), distill_weight=1, distill_temperature=2,
    )  # fmt: skip
    run = RunOptions(tmp_path, tmp_path / "run", recipe, log_every=1, pretrained=best)
    train(run, data=memory_data(images=16, val=0, batch=BATCH))
    first = json.loads((run.out / "log.jsonl").read_text().splitlines()[0])
    assert 0 <= first["loss"] + 1e-6 < 1e-5
    before, after = read_checkpoint(best).weights(), read_checkpoint(run.out / "last.ckpt").tensors
    assert not any(name.startswith("teacher.") for name in after)
    assert max(float(np.abs(after[name] - value).max()) for name, value in before.items()) < 1e-3


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_refused(straight: tuple[Path, RunResult], tmp_path: Path) -> None:
    recipe = replace(RECIPE, distill_from=str(straight[0] / "best.ckpt"))
    with pytest.raises(CheckpointError, match=r"distill_from .*expected the records' 2 classes.*got 3 classes"):
        train(RunOptions(tmp_path, tmp_path / "run", recipe), data=memory_data(classes=2, batch=BATCH))


@pytest.mark.slow
def test_the_run_folder_has_what_the_contract_lists(straight: tuple[Path, RunResult]) -> None:
    out, result = straight
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.csv",
        "log.jsonl",
        "last.ckpt",
        "best.ckpt",
        "curves.png",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["records_manifest_sha256"] == memory_data(batch=BATCH).digest
    assert config["versions"]["mindspore"].startswith("2.")
    assert stored_run(out) == (RECIPE, 3)
    with Image.open(out / "curves.png") as picture:
        assert len(picture.getcolors(1 << 24) or []) > 4
    assert result.epochs == 4
    assert result.images_per_s > 0
    assert 0 <= result.data_wait_frac < 1
    assert set(result.to_json()) == {"top1", "top5", "epochs", "images_per_s", "data_wait_frac", "checkpoint"}


@pytest.mark.slow
def test_the_best_checkpoint_scores_what_was_logged(straight: tuple[Path, RunResult]) -> None:
    out, result = straight
    data = memory_data(batch=BATCH)
    assert data.val is not None
    loaded = read_checkpoint(out / "best.ckpt")
    predict = network_predict(build_network(loaded))
    scores = score_batches(predict, data.val.epoch(0), classes=3, batch_size=BATCH, total=data.val_images)
    assert scores.images == 13
    assert scores.top1 == result.top1 == loaded.meta.metrics["top1"]
    assert scores.top1 == max(row.val_top1 for row in read_metrics(out) if row.val_top1 is not None)
    assert scores.loss == pytest.approx(loaded.meta.metrics["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_finished_run_asked_for_again_is_already_done(straight: tuple[Path, RunResult]) -> None:
    out, result = straight
    before = (out / "last.ckpt").stat().st_mtime_ns
    again = train(options(out), data=memory_data(batch=BATCH))
    assert again.already_done
    assert (again.top1, again.top5, again.epochs) == (result.top1, result.top5, 4)
    assert (out / "last.ckpt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_run_is_not_written_into_the_folder(straight: tuple[Path, RunResult]) -> None:
    other = replace(options(straight[0]), seed=4)
    with pytest.raises(TrainError, match="seed differ"):
        train(other, data=memory_data(batch=BATCH))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, lr=1e30, warmup_frac=0.0, schedule="constant", ema_decay=0.0, clip_norm=0.0, accumulate_steps=1
    )
    run = RunOptions(tmp_path, tmp_path / "run", recipe, log_every=3)
    with pytest.raises(TrainError, match=r"step [123] of 20 .*learning rate 1e\+30.*last good state, step 0") as caught:
        train(run, data=memory_data(val=0, batch=BATCH))
    assert caught.value.exit_code == 1
    kept = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert all(np.isfinite(value).all() for value in kept.tensors.values())


def test_tensorboard_gets_what_the_logs_get(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    log = RunLog(tmp_path, 0, 0, events=True)
    log.add_step(StepRow(0, 3, 1.5, 0.1, 0.0, 5.0, 10.0, 0.25, "data-bound"))
    log.add_epoch(EpochRow(1, 5, 0.1, 1.5, 1.25, 0.5, None, 10.0, 0.0))
    log.close()
    (path,) = (tmp_path / "events").iterdir()
    data, found = path.read_bytes(), {}
    while data:  # a record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found.update({value.tag: (event.step, value.simple_value) for value in event.summary.value})
        data = data[size + 16 :]
    assert found["train/loss"] == (3, 1.5)
    assert found["train/data_wait_frac"] == (3, 0.25)
    assert found["val/top1"] == (5, 0.5)
    assert "val/top5" not in found


def test_absent_tensorboard_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(TrainError, match=r"--tensorboard needs .*imnet-prep\[tensorboard\]"):
        RunLog(tmp_path, 0, 0, events=True)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to resume"):
        train(options(tmp_path / "run", resume=True), data=memory_data(batch=BATCH))


def test_a_damaged_last_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        train(options(tmp_path, resume=True), data=memory_data(batch=BATCH))


def test_logs_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 0)
    for epoch in (1, 2, 3):
        log.add_epoch(EpochRow(epoch, epoch * 2, 0.1, 1.5, None, None, None, 10.0, 0.0))
    for step in range(1, 7):
        log.add_step(StepRow(0, step, 1.0, 0.1, 0.0, 5.0, 10.0, 0.0, "compute-bound"))
    with (tmp_path / "metrics.csv").open("a") as handle:
        handle.write("4,8,0.1,1.")
    with (tmp_path / "log.jsonl").open("a") as handle:
        handle.write('{"epoch": 3, "st')
    RunLog(tmp_path, 2, 5)
    assert [row.epoch for row in read_metrics(tmp_path)] == [1, 2]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
