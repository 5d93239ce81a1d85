"""``imnet-prep bench`` and the example that trains a stock Model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from imnet_prep.cli.records import bench as command
from imnet_prep.errors import PipelineError
from imnet_prep.loader.bench import BenchOptions, bench, limit_sentence
from imnet_prep.types import StageTimes
from tests.records import Entry, write_folder
from tests.synthetic import encode

ROOT = Path(__file__).parents[3]


def _coloured(count: int, seed: int) -> list[Entry]:
    """Three classes that a network tells apart in seconds: mostly red, green or blue."""
    rng = np.random.default_rng(seed)
    found: list[Entry] = []
    for number in range(count):
        label = number % 3
        noise = rng.integers(0, 90, (8, 8, 3))
        noise[..., label] += 140
        pixels = cv2.resize(noise.astype(np.uint8), (48, 40), interpolation=cv2.INTER_CUBIC)
        found.append((f"n{label:08d}/n{label:08d}_{number}.JPEG", label, encode(pixels)))
    return found


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "records"
    return write_folder(folder, {"train": _coloured(96, 0), "val": _coloured(31, 1)})


@pytest.mark.parametrize(("mode", "split"), [("train", "train"), ("eval", "val")])
def test_bench_measures_rate_stages_and_cores(records: Path, mode: str, split: str) -> None:
    result = bench(records, BenchOptions(mode, 16, 32, 2, 0.1))
    assert (result.mode, result.split, result.batch_size, result.workers) == (mode, split, 16, 2)
    assert result.slowest <= result.images_per_s <= result.fastest
    assert result.images_per_s > 10
    assert result.decode_ms > 0
    assert 0 < result.cores_used_frac <= 1.1
    assert "limit" in result.limit


def test_the_command_prints_one_json_object(records: Path) -> None:
    arguments = [str(records), "--batch-size", "8", "--image-size", "32", "--seconds", "0.1", "--json"]
    found = CliRunner().invoke(command, arguments)
    assert found.exit_code == 0
    result = json.loads(found.stdout)
    assert {"images_per_s", "mode", "batch_size", "workers", "decoder", "limit"} <= set(result)


def test_the_command_says_which_decoder_ran_and_what_limits_it(records: Path) -> None:
    arguments = [str(records), "--batch-size", "8", "--image-size", "32", "--seconds", "0.1", "--native", "off"]
    found = CliRunner().invoke(command, arguments)
    assert found.exit_code == 0
    assert "portable" in found.stdout
    assert "limit" in found.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seconds", "0"], "seconds"),
        (["--batch-size", "0"], "batch_size"),
        (["--image-size", "-3"], "image_size"),
        (["--workers", "0"], "workers"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_1(records: Path, arguments: list[str], named: str) -> None:
    found = CliRunner().invoke(command, [str(records), *arguments])
    assert found.exit_code == 1
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert named in found.stderr


def test_a_folder_without_records_is_one_line_and_exit_1(tmp_path: Path) -> None:
    found = CliRunner().invoke(command, [str(tmp_path / "nothing")])
    assert found.exit_code == 1
    assert "no such folder" in found.stderr


def test_a_batch_larger_than_the_split_is_named(records: Path) -> None:
    with pytest.raises(PipelineError, match="does not fill one batch"):
        bench(records, BenchOptions(batch_size=1000))


@pytest.mark.parametrize(
    ("times", "cores_used", "workers", "says"),
    [
        (StageTimes(0.1, 0.1, 1.8, 0.0, 100), 0.98, 2, "The cores limit it"),
        (StageTimes(0.1, 0.1, 0.2, 0.0, 100), 0.3, 2, "The caller limits it"),
        (StageTimes(1.8, 0.0, 0.2, 0.0, 100), 0.2, 2, "The storage limits it"),
        (StageTimes(0.0, 0.0, 1.0, 0.0, 100), 0.5, 1, "The number of workers limits it"),
        (StageTimes(0.0, 0.0, 2.0, 0.0, 100), 0.4, 2, "Other work on this machine limits it"),
    ],
)
def test_the_limit_is_named(times: StageTimes, cores_used: float, workers: int, says: str) -> None:
    assert says in limit_sentence(times, 1.0, cores_used, workers, 2)


def test_the_command_line_imports_neither_mindspore_nor_opencv_for_help() -> None:
    program = "import sys, imnet_prep.cli.records; sys.exit(any(name in sys.modules for name in ('mindspore', 'cv2')))"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0


@pytest.mark.long
def test_a_stock_model_trains_on_our_dataset(records: Path) -> None:
    pytest.importorskip("mindspore")
    # In a process of its own: MindSpore compiles from source files and remembers its settings.
    example = [sys.executable, str(ROOT / "examples" / "stock_model.py"), str(records)]
    options = ["--epochs", "6", "--batch-size", "16", "--image-size", "32"]
    done = subprocess.run([*example, *options], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"accuracy ([\d.]+) on 31 images", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.8
