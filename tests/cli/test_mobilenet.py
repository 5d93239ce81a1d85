"""``mbv2`` as a person meets it: help, JSON, exit codes, one-line errors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cli.mobilenet import main
from imnet_prep.convert import ConvertOptions, convert
from imnet_prep.plan import PlanOptions
from mbv2.recipe import recipe_names
from tests.synthetic import WNIDS, picture

CLASSES = 3


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """Run a command that must fail with exit code 1; give its one line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return errors[0]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 24 training and 11 validation images: no whole number of batches."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("val", 11)):
        for number in range(count):
            wnid = WNIDS[number % CLASSES]
            path = folder / "images" / split / wnid / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(number % CLASSES, number)).save(path, quality=90)
    out = folder / "records"
    convert([folder / "images"], out, None, PlanOptions(), ConvertOptions(workers=1), lambda _: None, lambda: False)
    return out


@pytest.fixture(scope="module")
def trained(records: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = run(
        *("train", "--records", records, "--out", out, "--image-size", "32", "--epochs", "2", "--width", "0.35"),
        *("--batch-size", "8", "--set", "label_smoothing=0.05", "--json"),
    )
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["convert"], ["predict"], ["export"]])
def test_help_imports_no_mindspore(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from cli.mobilenet import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as left: assert left.code == 0\n"
        "assert 'mindspore' not in sys.modules and 'cv2' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Example: mbv2" in done.stdout


@pytest.mark.slow
def test_train_prints_one_json_object(trained: tuple[Path, dict[str, object]]) -> None:
    out, printed = trained
    assert printed.keys() == {"top1", "top5", "epochs", "images_per_s", "data_wait_frac", "checkpoint"}
    assert printed["epochs"] == 2
    assert printed["checkpoint"] == str(out / "best.ckpt")
    assert json.loads((out / "config.json").read_text())["recipe"]["label_smoothing"] == 0.05


@pytest.mark.slow
def test_eval_scores_every_image_as_training_did(
    records: Path, trained: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    out, printed = trained
    table, matrix = tmp_path / "classes.csv", tmp_path / "matrix.png"
    result = run(
        *("eval", "--records", records, "--checkpoint", out / "best.ckpt", "--json"),
        *("--per-class", table, "--confusion", matrix),
    )
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores.keys() == {"top1", "top5", "correct1", "correct5", "images"}
    assert scores["images"] == 11
    assert scores["top1"] == printed["top1"] == scores["correct1"] / 11
    assert scores["top5"] == 1.0
    with Image.open(matrix) as drawn:
        assert drawn.size == (230 + 3 * 40 + 30, 40 + 3 * 40 + 40)
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert sum(int(row["images"]) for row in rows) == 11
    assert sum(int(row["correct1"]) for row in rows) == scores["correct1"]


@pytest.mark.slow
def test_the_same_command_again_is_already_done(records: Path, trained: tuple[Path, dict[str, object]]) -> None:
    out, printed = trained
    result = run(
        *("train", "--records", records, "--out", out, "--image-size", "32", "--epochs", "2", "--width", "0.35"),
        *("--batch-size", "8", "--set", "label_smoothing=0.05"),
    )
    assert result.exit_code == 0
    assert "already done" in result.stderr
    resumed = run("train", "--records", records, "--out", out, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["top1"] == printed["top1"]
    assert "epochs" in refused("train", "--records", records, "--out", out, "--resume", "--epochs", "3")


@pytest.mark.slow
def test_predict_names_classes_and_draws_a_sheet(
    records: Path, trained: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    images = records.parent / "images" / "val"
    sheet = tmp_path / "sheet.png"
    checkpoint = trained[0] / "best.ckpt"
    result = run("predict", "--checkpoint", checkpoint, images, "--top", "2", "--sheet", sheet, "--json")
    assert result.exit_code == 0, result.output
    predictions = json.loads(result.stdout)["predictions"]
    assert len(predictions) == 11
    for prediction in predictions:
        guesses = prediction["guesses"]
        assert [guess["class"] in WNIDS[:CLASSES] for guess in guesses] == [True, True]
        assert guesses[0]["probability"] >= guesses[1]["probability"]
        assert guesses[0]["words"]
    with Image.open(sheet) as picture_:
        assert picture_.size == (1000, 3 * 244)
    plain = run("predict", "--checkpoint", checkpoint, images)
    assert len(plain.stdout.splitlines()) == 11


@pytest.mark.slow
def test_a_checkpoint_for_another_class_count_is_refused(
    trained: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for split in ("train", "val"):
        for label in range(2):
            path = folder / split / WNIDS[label] / f"{WNIDS[label]}_0.JPEG"
            path.parent.mkdir(parents=True)
            Image.fromarray(picture(label, 0)).save(path)
    out = tmp_path / "records"
    convert([folder], out, None, PlanOptions(), ConvertOptions(workers=1), lambda _: None, lambda: False)
    line = refused("eval", "--records", out, "--checkpoint", trained[0] / "best.ckpt")
    assert "class count" in line
    assert "expected 2" in line
    assert "got 3" in line


def test_bad_input_is_named_in_one_line(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "manifest" in refused("train", "--records", tmp_path, "--out", out)
    assert str(tmp_path / "absent") in refused("train", "--records", tmp_path / "absent", "--out", out)
    unknown = refused("train", "--records", records, "--out", out, "--recipe", "inception")
    assert all(name in unknown for name in recipe_names())
    assert "dropout" in refused("train", "--records", records, "--out", out, "--set", "dropot=0.1")
    assert "image_size" in refused("train", "--records", records, "--out", out, "--image-size", "300")
    assert "24" in refused("train", "--records", records, "--out", out, "--batch-size", "25")
    assert "nothing to resume" in refused("train", "--records", records, "--out", out, "--resume")
    assert "CPU, GPU, Ascend" in refused(
        "train", "--records", records, "--out", out, "--batch-size", "8", "--device-target", "TPU"
    )
    assert "absent.ckpt" in refused("eval", "--records", records, "--checkpoint", tmp_path / "absent.ckpt")
    assert "train, val" in refused("eval", "--records", records, "--checkpoint", "x", "--split", "test")
    assert "mindir, onnx" in refused("export", "--checkpoint", "x", "--format", "tflite", "--out", out)
    assert "timm, torchvision" in refused("convert", "x.ckpt", "--from", "keras", "--out", out)
    assert "no such file" in refused("predict", "--checkpoint", "x", tmp_path / "absent.jpg")
    assert not out.exists()


def test_a_truncated_checkpoint_is_named(records: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes(b"\x0a\x20\x0a\x04stem")
    assert "cut.ckpt" in refused("eval", "--records", records, "--checkpoint", path)


def test_missing_records_is_a_usage_error(tmp_path: Path) -> None:
    result = run("train", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "--records" in result.stderr


@pytest.mark.slow
def test_an_official_configuration_trains(records: Path, tmp_path: Path) -> None:
    config = tmp_path / "official.yaml"
    config.write_text(
        f"dataset_path: {records}\nplatform: CPU\nbatch_size: 8\nepoch_size: 1\nwarmup_epochs: 0\nlr_max: 0.01\n"
        "image_height: 32\nimage_width: 32\nnum_classes: 3\nlabel_smooth: 0\n",
        encoding="utf-8",
    )
    result = run("train", "--config", config, "--width", "0.35", "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    assert "lr_max -> lr 0.01" in result.stderr
    assert "num_classes -> not needed" in result.stderr
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert (recipe["name"], recipe["lr"], recipe["label_smoothing"]) == ("official", 0.01, 0)
