"""Two processes under msrun do what one does with twice the batch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.cli.render import guard, stop_requested
from imnet_prep.cpu import cpu_count
from imnet_prep.loader.batches import Batches
from imnet_prep.types import Progress
from mbv2.data import open_run_data
from mbv2.network.model import ModelConfig
from mbv2.recipe import Recipe
from mbv2.runtime import Runtime, runtime
from mbv2.training.logs import read_metrics
from mbv2.training.options import RunOptions
from mbv2.training.ranks import sum_counts, sum_floats
from mbv2.training.run import train
from mbv2.weights.checkpoint import Meta, read_checkpoint, save_checkpoint
from tests.mbv2.small_network import shrink
from tests.mbv2.training.test_reference_values import accumulated
from tests.mbv2.weights.test_convert import random_weights
from tests.records import spoil_image
from tests.synthetic import WNIDS, picture

GLOBAL_BATCH, STEPS = 32, 10
pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("small_network")]  # the machine may be busy
RECIPE = Recipe(
    epochs=2, batch_size=GLOBAL_BATCH, image_size=32, width=0.35, lr=0.001, dropout=0.2, freeze="bn", warmup_frac=0
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of training images an epoch, and 45 images to score: three batches of 16, the last one short."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 170), ("val", 45)):
        for number in range(count):
            label = (0, 0, 0, 1, 1, 2)[number % 6]  # other class weights on each rank
            wnid = WNIDS[label]
            path = folder / "images" / split / wnid / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(label, number)).save(path, quality=90)
    out = folder / "records"
    convert([folder / "images"], out, None, PlanOptions(), ConvertOptions(workers=1), lambda _: None, lambda: False)
    return out


@pytest.fixture(scope="module")
def damaged(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same records, three of them damaged."""
    out = tmp_path_factory.mktemp("damaged") / "records"
    shutil.copytree(records, out)
    for row in (3, 90, 91):
        spoil_image(out, 0, row)
    return out


WHOLE = replace(
    RECIPE,
    epochs=1,
    lr=0.001,
    freeze="none",
    dropout=0,
    ema_decay=0.9,
    clip_norm=1,
    accumulate_steps=2,
    schedule="constant",
    class_weights="balanced",
    backbone_lr_factor=0.5,
)


def options(
    records: Path, out: Path, pretrained: Path, batch: int, *, resume: bool = False, recipe: Recipe = RECIPE
) -> RunOptions:
    """Return the run, for one process or as one of two."""
    recipe = replace(recipe, batch_size=batch)
    return RunOptions(records, out, recipe, save_every=3, log_every=1, resume=resume, pretrained=pretrained)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that every run starts from."""
    path = tmp_path_factory.mktemp("start") / "start.ckpt"
    weights = random_weights(RECIPE.width, classes=3)
    weights["classifier.weight"] *= np.float32(0.01)
    save_checkpoint(path, weights, Meta(asdict(ModelConfig(classes=3, width=RECIPE.width)), (), 32, 0.875))
    return path


def on_two_ranks(out: Path, *arguments: str | Path) -> int:
    """Run this module under msrun; give its exit code."""
    missed_s = 10 if "SIGKILL" in arguments else 60
    return under_msrun(Path(f"{out}-log"), "-m", "tests.mbv2.training.test_ranks", out, *arguments, missed_s=missed_s)


def under_msrun(log: Path, *arguments: str | Path, missed_s: int = 60) -> int:
    """Run Python on two ranks; give msrun's exit code.

    Args:
        log: The folder for what the processes say.
        arguments: Python's.
        missed_s: How long a rank is silent until msrun gives it up: one that was killed, or on a busy machine waits.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    binaries = Path(sys.executable).parent
    command = [binaries / "msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={port}", "--join=True"]
    command += [f"--log_dir={log}", "python", *arguments]
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    environment["MS_NODE_TIMEOUT"] = str(missed_s)
    return subprocess.run(
        [str(part) for part in command], capture_output=True, check=False, timeout=600, env=environment
    ).returncode


@pytest.fixture(scope="module")
def two(records: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks, undisturbed, and beside it the weights of :func:`accumulated`."""
    out = tmp_path_factory.mktemp("two") / "run"
    code = on_two_ranks(out, records, start)
    assert code == 0, "\n".join(log.read_text()[-2000:] for log in sorted((out.parent / "run-log").iterdir()))
    return out


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]  # others name skipped records


def test_one_process_adds_up_to_itself() -> None:
    counts = np.array([[3, 1 << 30]])
    assert np.array_equal(sum_counts(counts), counts)
    assert sum_floats(np.ones(2, np.float32)).tolist() == [1, 1]


def test_ranks_share_the_threads_that_decode(records: Path) -> None:
    with ExitStack() as stack:
        data = open_run_data(records, RECIPE, 0, stack, Runtime("CPU", threads=3, rank=1, ranks=2))
        assert isinstance(data.train, Batches)
        assert isinstance(data.val, Batches)
        assert (data.train.workers, data.val.workers) == (3, 3)
        assert (data.train.loading.rank, data.train.loading.ranks) == (1, 2)


@pytest.mark.slow
def test_two_ranks_match_one_with_twice_the_batch(records: Path, start: Path, two: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    train(options(records, one, start, GLOBAL_BATCH))
    assert len(losses(one)) == len(losses(two)) == STEPS
    # Sums of gradients are rounded in another order. Measured: losses 7e-8, weights 5e-7 of their largest, momentum
    # 8e-5, where a value lies at a bound of ReLU6.
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-6)
    first, second = read_checkpoint(one / "last.ckpt").tensors, read_checkpoint(two / "last.ckpt").tensors
    for name, value in first.items():
        largest = float(np.abs(value).max())
        within = 1e-4 * max(1.0, largest) if name.startswith("momentum.") else 1e-5 * largest
        assert np.abs(second[name] - value).max() <= within, name
    assert [row.val_top1 for row in read_metrics(one)] == [row.val_top1 for row in read_metrics(two)]
    assert [row.val_top5 for row in read_metrics(one)] == [row.val_top5 for row in read_metrics(two)]


@pytest.mark.slow
def test_weighted_classes_on_two_ranks_equal_one_with_all_images(two: Path) -> None:
    for one, both in zip(accumulated(0, 1), np.load(f"{two}-accumulated.npz").values(), strict=True):
        np.testing.assert_allclose(both, one, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_killed_stopped_and_resumed_end_in_the_same_bits(damaged: Path, start: Path, tmp_path: Path) -> None:
    """Killed at step 4 after the save at 3; then one rank alone gets SIGINT, and both stop after the step.

    What they skip is what one process with twice the batch skips. The second rank does not see the run's folder.
    """
    out, two, single = tmp_path / "run", tmp_path / "two", tmp_path / "one"
    assert on_two_ranks(two, damaged, start) == 0
    assert on_two_ranks(out, damaged, start, "SIGKILL", "4", "apart") != 0
    assert read_checkpoint(out / "last.ckpt").meta.step == 3
    assert on_two_ranks(out, damaged, start, "SIGINT", "6", "resume", "apart") != 0
    assert read_checkpoint(out / "last.ckpt").meta.step == 7
    assert on_two_ranks(out, damaged, start, "resume", "apart") == 0
    assert not (tmp_path / "apart").exists()
    train(options(damaged, single, start, GLOBAL_BATCH))
    np.testing.assert_allclose(losses(two), losses(single), rtol=3e-5)
    skipped = read_checkpoint(single / "last.ckpt").meta.training["skipped"]
    assert len(skipped["train"]) == 3
    assert read_checkpoint(two / "last.ckpt").meta.training["skipped"] == skipped
    one, again = read_checkpoint(two / "last.ckpt"), read_checkpoint(out / "last.ckpt")
    assert one.meta == again.meta
    assert one.tensors.keys() == again.tensors.keys()
    for name, value in one.tensors.items():
        assert np.array_equal(value, again.tensors[name]), name
    assert losses(two) == losses(out)


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_that_accumulate_train_and_average_all_weights_as_one_does(
    records: Path, start: Path, tmp_path: Path
) -> None:
    """Two ranks that add up two steps have the gradients of one that adds up four, BatchNorm's own batches included.

    The moving statistics move once a step, so they are others.
    """
    two, one = tmp_path / "two", tmp_path / "one"
    assert on_two_ranks(two, records, start, "whole") == 0
    run = options(records, one, start, GLOBAL_BATCH // 2, recipe=replace(WHOLE, accumulate_steps=4))
    train(run)
    pairs = np.array(losses(one)).reshape(-1, 2).mean(1)
    np.testing.assert_allclose(losses(two), pairs, rtol=0.05)  # a logged loss is divided by its own step's weights
    before = read_checkpoint(start).tensors
    first, second = read_checkpoint(one / "last.ckpt").tensors, read_checkpoint(two / "last.ckpt").tensors
    assert first.keys() == second.keys()
    compared = [name for name in first if "moving_" not in name and not name.startswith("accumulated.")]
    assert len([name for name in compared if name.startswith("ema.")]) == 23
    for name in compared:  # gradients of up to 0.1; some are 0 but for rounding, as BatchNorm follows
        change = first[name] - before.get(name.removeprefix("ema."), np.float32(0))
        assert np.abs(second[name] - first[name]).max() <= 0.02 * np.abs(change).max() + 1e-6, name


@pytest.mark.long
def test_two_ranks_print_one_score(records: Path, two: Path, tmp_path: Path) -> None:
    command = "tests.mbv2.small_mbv2"
    arguments: list[str | Path] = ["-m", command, "eval", "--records", records, "--checkpoint", two / "best.ckpt"]
    arguments.append("--json")
    assert under_msrun(tmp_path / "log", *arguments) == 0
    printed = "".join((tmp_path / "log" / f"worker_{rank}.log").read_text() for rank in (0, 1))
    scores = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [score["images"] for score in scores] == [45]
    assert scores[0]["top1"] == max(row.val_top1 or 0 for row in read_metrics(two))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("seed", "rank 1 was started for another run than the first: seed differ; expected seed 0; got 1; start every"),
        ("goes on", "rank 1 was started with other options than the first; expected no --resume; got --resume; start"),
    ],
)
def test_a_rank_with_other_options_is_named(records: Path, start: Path, tmp_path: Path, other: str, says: str) -> None:
    assert on_two_ranks(tmp_path / "run", records, start, other) != 0
    assert f"error: {says}" in (tmp_path / "run-log" / "worker_1.log").read_text()


PRINT_EXIT = "import subprocess, sys; print('exit', subprocess.run([sys.executable, *sys.argv[1:]]).returncode)"


@pytest.mark.long
@pytest.mark.slow
def test_ranks_that_are_stopped_exit_with_130_each(records: Path, start: Path, tmp_path: Path) -> None:
    """SIGINT to one of them, as msrun itself passes none on."""
    run: list[str | Path] = ["-m", "tests.mbv2.training.test_ranks", tmp_path / "run", records, start, "SIGINT", "6"]
    assert under_msrun(tmp_path / "log", "-c", PRINT_EXIT, *run) == 0
    for rank in (0, 1):
        printed = (tmp_path / "log" / f"worker_{rank}.log").read_text()
        assert "Traceback" not in printed
        assert printed.splitlines().count("error: stopped after step 7 of 10, saved; continue with --resume") == 1
        assert printed.splitlines()[-1] == "exit 130"


@guard
def main() -> None:
    """Train as one rank: OUT RECORDS PRETRAINED [SIGNAL STEP] [resume] [whole] [apart] [seed | goes on].

    SIGINT goes to rank 1 alone, and the last three words are for it: it has another folder, seed or command.
    """
    out, records, pretrained, *rest = sys.argv[1:]
    second = os.environ.get("RANK_ID") == "1"
    resume = "resume" in rest or (second and "goes on" in rest)
    if second and "apart" in rest:
        out = str(Path(out).with_name("apart"))
    recipe = WHOLE if "whole" in rest else RECIPE
    name, step = (rest[0], int(rest[1])) if rest and rest[0].startswith("SIG") else ("SIGTERM", -1)

    def progress(state: Progress) -> None:
        spared = name == "SIGINT" and runtime().rank == 0
        if state.done == step * GLOBAL_BATCH and not spared:
            os.kill(os.getpid(), signal.Signals[name])

    with stop_requested() as stop:
        run = options(Path(records), Path(out), Path(pretrained), GLOBAL_BATCH // 2, resume=resume, recipe=recipe)
        train(replace(run, seed=1) if second and "seed" in rest else run, stop=stop, progress=progress)
    assert (runtime().local_ranks, runtime().threads) == (2, max(1, cpu_count() // 2))
    if not rest:
        weights = accumulated(runtime().rank, 2)
        if runtime().rank == 0:
            np.savez(f"{out}-accumulated.npz", *weights)


if __name__ == "__main__":
    shrink()
    main()
