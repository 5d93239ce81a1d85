"""The report of a run: what its logs and its checkpoint say, readable by everybody, fetching nothing."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from imnet_prep.errors import CheckpointError, RecordsError, TrainError
from imnet_prep.loader.bad_rows import SkippedRow
from imnet_prep.types import Batch
from mbv2.recipe import load_recipe
from mbv2.scoring.guesses import GuessCollector, best_guesses
from mbv2.scoring.score import score_batches
from mbv2.show.report import RunReportOptions, write_run_report
from mbv2.training.logs import EpochRow, RunLog, StepRow, read_skipped
from tests.chromium import Chromium, needs_chromium
from tests.records import make_records, quiet
from tests.synthetic import WNIDS

pytestmark = pytest.mark.usefixtures("small_network")


def make_run(folder: Path, epochs: int = 3) -> Path:
    """A run's folder as training leaves it, without its checkpoints."""
    folder.mkdir()
    log = RunLog(folder, 0, 0)
    for epoch in range(1, epochs + 1):
        for step in (1, 2):
            row = StepRow(
                epoch - 1, 500 * (2 * epoch - 2 + step), 2.0 / epoch, 0.1, 0.0, 12.5, 80.0, 0.02, "compute-bound"
            )
            log.add_step(row)
        log.add_epoch(EpochRow(epoch, 1000 * epoch, 0.1 / epoch, 2 / epoch, 1.9 / epoch, 0.2 * epoch, 0.9, 81.5, 0.03))
    config = {"recipe": {"name": "tiny", "lr": 0.1, "image_size": 32}, "seed": 5, "versions": {"mindspore": "2.10.0"}}
    config["commands"] = ["mbv2 train --records records --out run --recipe tiny --pretrained weights.ckpt --width 0.35"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def words(page: Path) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")).split())


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("records"), per_class={"train": 2, "val": 5}, shards=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of random weights, whose mistakes are many."""
    from mbv2.network.model import MobileNetV2, ModelConfig
    from mbv2.weights.checkpoint import Meta, parameter_tensors, save_checkpoint

    folder = make_run(tmp_path_factory.mktemp("run") / "run")
    config = ModelConfig(classes=3, width=0.35)
    meta = Meta(asdict(config), WNIDS[:3], image_size=32, eval_crop=0.875, batch_size=8, epoch=3)
    save_checkpoint(folder / "best.ckpt", parameter_tensors(MobileNetV2(config).get_parameters()), meta)
    return folder


def test_logs_and_recipe_are_in_it_without_records(tmp_path: Path) -> None:
    result = write_run_report(make_run(tmp_path / "run"), tmp_path / "r.html", RunReportOptions(), quiet)
    said = words(tmp_path / "r.html")
    assert result["epochs"] == 3
    assert "top1" not in result
    for text in ("best top-1, epoch 3", "60.0%", "image_size", "2.10.0", "compute-bound", "Without --records"):
        assert text in said
    assert not re.findall(r'(?:src|href)="(?!data:|#)', (tmp_path / "r.html").read_text())


def test_what_differs_from_the_recipe_comes_before_all_its_fields(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config |= {"recipe": asdict(load_recipe("tiny")) | {"lr": 0.02}, "commands": ["mbv2 train --lr 0.02"]}
    (run / "config.json").write_text(json.dumps(config))
    write_run_report(run, tmp_path / "r.html", RunReportOptions(), quiet)
    said = words(tmp_path / "r.html")
    first = "mbv2 train --lr 0.02 What differs from the recipe tiny field here in the recipe lr 0.02 0.05 All fields"
    assert first in said


def test_a_run_that_was_only_begun_is_reported(tmp_path: Path) -> None:
    write_run_report(make_run(tmp_path / "run", epochs=0), tmp_path / "r.html", RunReportOptions(), quiet)
    assert "No epoch is finished" in words(tmp_path / "r.html")


def test_skipped_records_and_the_live_weights_are_in_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    bad = SkippedRow(3, f"{WNIDS[0]}/bad<1>.JPEG", "train-00000, row 3", "its SHA-256 is another")
    log = RunLog(run, 3, 6, live=True)
    for step in (4, 6):
        log.add_skipped([bad], 1, step)
    log.add_epoch(EpochRow(4, 8, 0.1, 1.0, 1.1, 0.5, 0.9, 81.5, 0.03, 1.2, 0.45, 0.9))
    write_run_report(run, tmp_path / "r.html", RunReportOptions(), quiet)
    said = words(tmp_path / "r.html")
    assert "skipped records 1" in said
    assert said.count(f"{WNIDS[0]}/bad&lt;1&gt;.JPEG its SHA-256 is another") == 1
    assert "top-1 of the live weights" in said
    again = RunLog(run, 3, 3)  # cut back before it was found
    again.add_skipped([bad], 1, 4)
    assert read_skipped(run) == [(bad.file_name, bad.reason)]


def test_every_image_is_guessed_once_and_the_filling_is_left_out() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(11, 4)).astype(np.float32)
    label = rng.integers(0, 4, 11).astype(np.int32)

    def predict(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        return logits[image[:, 0, 0, 0]]

    rows = np.arange(11)
    image = np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (11, 2, 2, 3))
    parts = [Batch(image[p], label[p], p.astype(np.uint64)) for p in (rows[:8], rows[8:])]
    collector = GuessCollector()
    score_batches(predict, parts, classes=4, batch_size=8, total=11, observers=[collector])
    labels, guesses, confidences = collector.found()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert labels.tolist() == label.tolist()
    assert guesses.tolist() == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(confidences, shares.max(axis=1), rtol=1e-5)


@pytest.mark.slow
def test_confusion_classes_and_mistakes_are_the_checkpoint_s(run: Path, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    result = write_run_report(run, out, RunReportOptions(records), quiet)
    found = best_guesses(run, records, "val", "CPU", quiet)
    assert result["top1"] == found.scores.top1 == float((found.label == found.guess).mean())
    assert found.scores.images == 15
    assert np.bincount(found.label).tolist() == [5, 5, 5]
    wrong = int((found.label != found.guess).sum())
    assert f"{wrong} of 15 images are taken for another class" in words(out)
    assert out.read_text().count("<img") == min(24, wrong)
    assert "tench" in words(out)


@needs_chromium
@pytest.mark.slow
def test_run_report_in_a_browser(run: Path, records: Path, tmp_path: Path) -> None:
    write_run_report(run, tmp_path / "r.html", RunReportOptions(records), quiet)
    with Chromium() as browser:
        for width, dark in ((1200, False), (400, True)):
            browser.open((tmp_path / "r.html").as_uri(), width, 900, dark=dark)
            assert not browser.scrolls_sideways()
            assert browser.violations() == []
        assert browser.broken_images() == []
        assert browser.errors == []


def test_what_is_no_run_is_named(run: Path, records: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainError, match=r"no config.json"):
        write_run_report(tmp_path / "empty", tmp_path / "r.html", RunReportOptions(), quiet)
    bare = make_run(tmp_path / "bare")
    with pytest.raises(TrainError, match="no checkpoint"):
        write_run_report(bare, tmp_path / "r.html", RunReportOptions(records), quiet)
    with pytest.raises(RecordsError, match="no such folder"):
        write_run_report(run, tmp_path / "r.html", RunReportOptions(tmp_path / "none"), quiet)
    other = make_records(tmp_path, classes=4, per_class=2)
    with pytest.raises(CheckpointError, match="other classes"):
        write_run_report(run, tmp_path / "r.html", RunReportOptions(other), quiet)
    (bare / "config.json").write_text("[]")
    with pytest.raises(TrainError, match="not a run"):
        write_run_report(bare, tmp_path / "r.html", RunReportOptions(), quiet)
