"""What a run's folder holds decides whether a run goes on, ends at once, or is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from imnet_prep.errors import CheckpointError, TrainError
from imnet_prep.files import exclusive_lock
from imnet_prep.types import Progress
from mbv2.network.model import ModelConfig
from mbv2.training.logs import RunLog
from mbv2.training.options import BEST, CONFIG, LAST, LOCK, RunOptions, stored_run
from mbv2.training.run import train
from mbv2.training.state import find_last, run_identity
from mbv2.weights.checkpoint import Meta, read_checkpoint, save_checkpoint
from tests.imnet_prep.obstacles import names_below, small_disk
from tests.mbv2.run_standin import BATCH, RECIPE, options
from tests.mbv2.standin import memory_data

pytestmark = pytest.mark.usefixtures("small_network")
MIDDLE = {"epoch": 2, "epoch_step": 3, "step": 13, "loss_sum": 1.0, "best_top1": 0.5, "best_top5": 1.0}


def leave_run(
    out: Path,
    ranks: int = 1,
    without: tuple[str, ...] = (),
    position: Mapping[str, object] = MappingProxyType({}),
    model: Mapping[str, object] = MappingProxyType({}),
    run: RunOptions | None = None,
) -> None:
    """Write the files of a run that was stopped in mid-epoch; ``without`` are fields that it does not save."""
    out.mkdir()
    identity = run_identity(run or options(out), memory_data(batch=BATCH), ranks)
    identity = {name: value for name, value in identity.items() if name not in without}
    training = {"identity": identity, "position": MIDDLE | dict(position)}
    config = asdict(ModelConfig(classes=3, width=0.35)) | dict(model)
    meta = Meta(config, (), 32, 0.875, epoch=2, step=13, training=training)
    for name in (LAST, BEST):
        save_checkpoint(out / name, {"weight": np.ones(1, np.float32)}, meta)


def find(out: Path, ranks: int = 1) -> int:
    """Return the step that a run would go on from."""
    last, _ = find_last(options(out, resume=True), memory_data(batch=BATCH), ranks)
    assert last is not None
    return last.meta.step


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_ranks_is_refused(before: int, now: int, tmp_path: Path) -> None:
    leave_run(tmp_path / "run", before)
    with pytest.raises(TrainError, match=rf"ranks differ; expected ranks {before} .*; got {now}; .*--worker_num"):
        find(tmp_path / "run", now)
    assert find(tmp_path / "run", before) == 13


@pytest.mark.parametrize("config", [False, True])
def test_ranks_of_a_run_that_did_not_save_them_show_in_its_steps(config: bool, tmp_path: Path) -> None:
    position = {"epoch": 0, "epoch_step": 3, "step": 3} if config else {}
    leave_run(tmp_path / "run", without=("ranks", "steps_per_epoch"), position=position)
    (tmp_path / "run" / CONFIG).write_text(json.dumps({"steps_per_epoch": 5}))
    assert find(tmp_path / "run") == 13
    whole = memory_data(batch=BATCH)
    halved = replace(whole, train=memory_data(images=20, batch=BATCH).train)  # what a rank of two sees
    with pytest.raises(TrainError, match="steps_per_epoch differ; expected steps_per_epoch 5"):
        find_last(options(tmp_path / "run", resume=True), halved, 2)


def test_another_batch_size_is_not_called_another_number_of_processes(tmp_path: Path) -> None:
    leave_run(tmp_path / "run")
    given = options(tmp_path / "run", resume=True)
    given = replace(given, recipe=replace(given.recipe, batch_size=2 * BATCH))
    with pytest.raises(TrainError, match=r"steps_per_epoch, batch_size differ; expected batch_size \d+ ") as caught:
        find_last(given, memory_data(batch=2 * BATCH), 1)
    assert "--worker_num" not in str(caught.value)


def test_a_field_that_an_earlier_version_did_not_save_has_its_default(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", without=("schedule", "clip_norm"))  # the run's clip_norm is not the default
    with pytest.raises(TrainError, match=r"holds another run: clip_norm differ"):
        find(tmp_path / "run")
    leave_run(tmp_path / "other", without=("schedule", "warmup_frac"))
    assert find(tmp_path / "other") == 13


def test_a_run_that_did_not_save_its_network_s_fields_has_its_weights(tmp_path: Path) -> None:
    """Version 0.1.0 took padding and BatchNorm's constants from pretrained weights without naming them."""
    leave_run(tmp_path / "run", without=("padding", "bn_eps"), model={"padding": "same", "bn_eps": 1e-3})
    recipe = {name: value for name, value in asdict(RECIPE).items() if name not in ("padding", "bn_eps")}
    (tmp_path / "run" / CONFIG).write_text(json.dumps({"recipe": recipe}))
    stored = stored_run(tmp_path / "run")
    assert stored == (replace(RECIPE, padding="same", bn_eps=1e-3), 3)
    again = replace(options(tmp_path / "run", resume=True), recipe=stored[0])
    assert find_last(again, memory_data(batch=BATCH), 1)[0] is not None


@pytest.mark.parametrize("name", ["teacher", "start"])
def test_the_same_weights_for_other_images_make_another_run(name: str, tmp_path: Path) -> None:
    def write(path: Path, **changes: object) -> Path:
        model = asdict(ModelConfig(classes=3, width=0.35)) | changes
        save_checkpoint(path, {"weight": np.ones(1, np.float32)}, Meta(model, (), 32, 0.875))
        return path

    teacher, start, out = write(tmp_path / "teacher"), write(tmp_path / "start"), tmp_path / "run"
    recipe = replace(RECIPE, distill_from=str(teacher))
    run = replace(options(out, resume=True), recipe=recipe, pretrained=start)
    leave_run(out, run=run)
    leave_run(tmp_path / "old", without=("teacher",), run=run)
    for folder in (out, tmp_path / "old"):
        assert find_last(replace(run, out=folder), memory_data(batch=BATCH), 1)[0] is not None
    write(tmp_path / name, std=(0.5, 0.5, 0.5))
    with pytest.raises(TrainError, match=r"holds another run: (teacher|pretrained std) differ"):
        find_last(run, memory_data(batch=BATCH), 1)


def test_a_lost_best_checkpoint_is_named(tmp_path: Path) -> None:
    leave_run(tmp_path / "run")
    (tmp_path / "run" / BEST).unlink()
    with pytest.raises(TrainError, match=r"has lost its best\.ckpt"):
        find(tmp_path / "run")


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with exclusive_lock(out / LOCK), pytest.raises(TrainError, match="another process is training"):
        train(options(out), data=memory_data(batch=BATCH))
    assert names_below(tmp_path) == {"run"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.slow
def test_a_full_disk_at_a_log_row_is_one_error(tmp_path: Path) -> None:
    def fill(state: Progress) -> None:
        log = tmp_path / "run" / "log.jsonl"
        if state.done == 2 * BATCH:
            log.unlink()
            os.symlink("/dev/full", log)

    with pytest.raises(TrainError, match=r"cannot write in the run's folder .*No space left") as caught:
        train(replace(options(tmp_path / "run"), save_every=2), data=memory_data(batch=BATCH), progress=fill)
    assert caught.value.exit_code == 1
    assert read_checkpoint(tmp_path / "run" / LAST).meta.step == 2
    (tmp_path / "run" / "log.jsonl").unlink()
    RunLog(tmp_path / "run", 0, 2)  # the logs can be taken up again


def test_a_checkpoint_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    meta = Meta(asdict(ModelConfig(classes=3)), (), 32, 0.875)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        save_checkpoint(disk / LAST, {"weight": np.ones(1, np.float32)}, meta)
        with pytest.raises(CheckpointError, match=r"cannot write .*last\.ckpt"):
            save_checkpoint(disk / LAST, {"weight": np.ones(1 << 20, np.float32)}, meta)
        assert names_below(disk) == {LAST}
        assert read_checkpoint(disk / LAST).tensors["weight"].shape == (1,)
