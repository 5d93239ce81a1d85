"""Two processes under msrun do what one does with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from imnet_prep.convert import ConvertOptions, convert
from imnet_prep.plan import PlanOptions
from mbv2.checkpoint import Meta, read_checkpoint, save_checkpoint
from mbv2.model import ModelConfig
from mbv2.ranks import sum_counts, sum_floats
from mbv2.recipe import Recipe
from mbv2.runlog import read_metrics
from mbv2.train import RunOptions, train
from tests.mbv2.test_convert import random_weights
from tests.synthetic import WNIDS, picture

GLOBAL_BATCH, STEPS = 32, 10
pytestmark = pytest.mark.timeout(900)  # several compilations, on a machine that may be busy
RECIPE = Recipe(
    epochs=2, batch_size=GLOBAL_BATCH, image_size=32, width=0.35, lr=0.005, dropout=0.2, freeze="bn", warmup_frac=0
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of training images an epoch, and 45 images to score: three batches of 16, the last one short."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 170), ("val", 45)):
        for number in range(count):
            wnid = WNIDS[number % 3]
            path = folder / "images" / split / wnid / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(number % 3, number)).save(path, quality=90)
    out = folder / "records"
    convert([folder / "images"], out, None, PlanOptions(), ConvertOptions(workers=1), lambda _: None, lambda: False)
    return out


def options(records: Path, out: Path, pretrained: Path, batch: int) -> RunOptions:
    """Give the run, for one process or as one of two."""
    return RunOptions(records, out, replace(RECIPE, batch_size=batch), log_every=1, pretrained=pretrained)


def test_one_process_adds_up_to_itself() -> None:
    counts = np.array([[3, 1 << 30]])
    assert np.array_equal(sum_counts(counts), counts)
    assert sum_floats(np.ones(2, np.float32)).tolist() == [1, 1]


@pytest.mark.slow
def test_two_ranks_match_one_with_twice_the_batch(records: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.ckpt"
    config = ModelConfig(classes=3, width=RECIPE.width)
    weights = random_weights(RECIPE.width, classes=3)
    weights["classifier.weight"] *= np.float32(0.01)
    save_checkpoint(start, weights, Meta(asdict(config), (), 32, 0.875))
    one = tmp_path / "one"
    train(options(records, one, start, GLOBAL_BATCH))
    two = tmp_path / "two"
    binaries = Path(sys.executable).parent
    command = [binaries / "msrun", "--worker_num=2", "--local_worker_num=2", "--master_port=8391", "--join=True"]
    command += [f"--log_dir={tmp_path / 'log'}", "python", "-m", "tests.mbv2.test_ranks", records, two, start]
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def losses(run: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]

    assert len(losses(one)) == len(losses(two)) == STEPS
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)
    first, second = read_checkpoint(one / "last.ckpt").tensors, read_checkpoint(two / "last.ckpt").tensors
    for name, value in first.items():
        assert np.abs(second[name] - value).max() <= 1e-4 * max(1.0, float(np.abs(value).max())), name
    assert [row.val_top1 for row in read_metrics(one)] == [row.val_top1 for row in read_metrics(two)]
    assert [row.val_top5 for row in read_metrics(one)] == [row.val_top5 for row in read_metrics(two)]


if __name__ == "__main__":
    train(options(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), GLOBAL_BATCH // 2))
