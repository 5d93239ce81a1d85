"""``mbv2`` as a person meets it: help, JSON, exit codes, one-line errors."""

from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.cli.mobilenet import main
from imnet_prep.errors import Interrupted
from mbv2 import kernels
from mbv2.recipe import Recipe, recipe_names
from mbv2.training.options import RunOptions
from mbv2.weights.checkpoint import read_checkpoint
from tests.synthetic import WNIDS, picture

CLASSES = 3
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("small_network")  # test_convert.py runs what needs a whole one


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
def official(records: Path) -> Path:
    """A configuration in the words of MindSpore's own trainer."""
    config = records.parent / "official.yaml"
    config.write_text(
        f"dataset_path: {records}\nplatform: CPU\nbatch_size: 8\nepoch_size: 2\nwarmup_epochs: 0\nlr_max: 0.01\n"
        "image_height: 32\nimage_width: 32\nnum_classes: 3\nlabel_smooth: 0.05\n",
        encoding="utf-8",
    )
    return config


@pytest.fixture(scope="module")
def trained(official: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("runs") / "run"
    given = ("--config", official, "--width", "0.35", "--set", "dropout=0.1", "--tensorboard", "--json")
    result = run("train", "--out", out, *given)
    assert result.exit_code == 0, result.output
    assert "lr_max -> lr 0.01" in result.stderr
    assert "num_classes -> not needed" in result.stderr
    return out, json.loads(result.stdout)


def test_help_imports_no_mindspore() -> None:
    code = (
        "import sys\n"
        "from imnet_prep.cli.mobilenet import main\n"
        "for command in ([], *([name] for name in main.commands)):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit as left: assert left.code == 0\n"
        "    assert 'mindspore' not in sys.modules and 'cv2' not in sys.modules, command"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Example: mbv2") == 1 + len(main.commands)


@pytest.mark.slow
def test_an_official_configuration_trains_and_prints_one_json_object(trained: tuple[Path, dict[str, object]]) -> None:
    out, printed = trained
    assert printed.keys() == {"top1", "top5", "epochs", "images_per_s", "data_wait_frac", "checkpoint"}
    assert printed["epochs"] == 2
    assert list((out / "events").iterdir())
    assert printed["checkpoint"] == str(out / "best.ckpt")
    recipe = json.loads((out / "config.json").read_text())["recipe"]
    assert (recipe["name"], recipe["lr"], recipe["label_smoothing"]) == ("official", 0.01, 0.05)
    assert (recipe["image_size"], recipe["width"], recipe["dropout"]) == (32, 0.35, 0.1)


@pytest.mark.slow
def test_eval_scores_every_image_as_training_did(
    records: Path, trained: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    out, printed = trained
    plain = ("eval", "--records", records, "--checkpoint", out / "best.ckpt")
    assert "behind a URL" in refused(*plain, "--cache", tmp_path, "--cache-bytes", "1000000")
    table, matrix, real = tmp_path / "classes.csv", tmp_path / "matrix.png", tmp_path / "real.json"
    names = [f"{WNIDS[number % CLASSES]}_{number}.JPEG" for number in range(11)]
    real.write_text(json.dumps({name: [number % CLASSES] for number, name in enumerate(names[:9])}))
    result = run(*plain, "--json", "--per-class", table, "--confusion", matrix, "--real-labels", real)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    reals = {key: scores.pop(key) for key in list(scores) if key.startswith("real_")}
    assert (reals["real_images"], reals["real_left_out"]) == (9, 2)
    assert scores["correct1"] - 2 <= reals["real_correct1"] <= scores["correct1"]
    assert scores.keys() == {"top1", "top5", "correct1", "correct5", "images"}
    assert scores["images"] == 11
    assert scores["top1"] == printed["top1"] == scores["correct1"] / 11
    assert scores["top5"] == 1.0
    with Image.open(matrix) as drawn:
        assert drawn.size == (230 + 3 * 40 + 30, 40 + 3 * 40 + 40)
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert sum(int(row["images"]) for row in rows) == 11
    assert sum(int(row["correct1"]) for row in rows) == scores["correct1"]
    if kernels.available():
        near = run(*plain, "--json", "--precision", "bfloat16")
        assert near.exit_code == 0, near.output
        assert abs(json.loads(near.stdout)["correct1"] - scores["correct1"]) <= 1


@pytest.mark.slow
def test_the_same_command_again_is_already_done(
    records: Path, official: Path, trained: tuple[Path, dict[str, object]]
) -> None:
    out, printed = trained
    result = run("train", "--out", out, "--config", official, "--width", "0.35", "--set", "dropout=0.1")
    assert result.exit_code == 0
    assert re.search("^already done ", result.stdout, re.MULTILINE)
    resumed = run("train", "--records", records, "--out", out, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["top1"] == printed["top1"]
    assert "epochs" in refused("train", "--records", records, "--out", out, "--resume", "--epochs", "1")


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
def test_how_many_bad_records_are_passed_over_is_a_word_or_a_number(records: Path, tmp_path: Path) -> None:
    line = refused("train", "--records", records, "--out", tmp_path / "run", "--on-bad-record", "many")
    assert "fail" in line
    assert "got many" in line.replace("'", "")


@pytest.mark.slow
def test_records_of_some_classes_are_scored_and_of_others_refused(
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
    scores = run("eval", "--records", out, "--checkpoint", trained[0] / "best.ckpt", "--json")
    assert scores.exit_code == 0, scores.output
    assert json.loads(scores.stdout)["images"] == 2
    (folder / "train" / WNIDS[0]).rename(folder / "train" / "another")
    (folder / "val" / WNIDS[0]).rename(folder / "val" / "another")
    convert([folder], tmp_path / "b", None, PlanOptions(), ConvertOptions(workers=1), lambda _: None, lambda: False)
    assert "another" in refused("eval", "--records", tmp_path / "b", "--checkpoint", trained[0] / "best.ckpt")


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
    assert run("train", "--records", records, "--out", out, "--device-target", "TPU").exit_code == 2
    assert "absent.ckpt" in refused("eval", "--records", records, "--checkpoint", tmp_path / "absent.ckpt")
    assert "train, val" in refused("eval", "--records", records, "--checkpoint", "x", "--split", "test")
    assert "no such file" in refused("predict", "--checkpoint", "x", tmp_path / "absent.jpg")
    assert "behind a URL" in refused(
        "train", "--records", records, "--out", out, "--batch-size", "8", "--cache-bytes", "1000000"
    )
    assert not out.exists()


def test_a_run_keeps_its_command_line_without_passwords(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []

    def begin(options: RunOptions, **_: object) -> None:
        kept.append(options.command)
        raise Interrupted("far enough")

    monkeypatch.setattr("mbv2.training.run.train", begin)
    monkeypatch.setattr(sys, "argv", ["mbv2", "train", "--records=https://me:pa@ss@host/x?signature=1", "--out", "r"])
    assert run("train", "--records", records, "--out", tmp_path / "r").exit_code == Interrupted.exit_code
    assert kept == ["mbv2 train '--records=https://host/x' --out r"]


def test_a_truncated_checkpoint_is_named(records: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes(b"\x0a\x20\x0a\x04stem")
    assert "cut.ckpt" in refused("eval", "--records", records, "--checkpoint", path)


def test_missing_records_is_a_usage_error(tmp_path: Path) -> None:
    result = run("train", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "--records" in result.stderr


@pytest.mark.slow
def test_fine_tuning_trains_the_head_on_features_kept_where_told(
    records: Path, trained: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    best, out, features = trained[0] / "best.ckpt", tmp_path / "run", tmp_path / "features"
    result = run(
        *("train", "--records", records, "--out", out, "--pretrained", best, "--freeze", "backbone", "--epochs", "2"),
        *("--image-size", "32", "--batch-size", "8", "--lr", "0.01", "--features", features, "--save-every", "2"),
    )
    assert result.exit_code == 0, result.output
    assert any(path.name.startswith("train-0-") for path in features.iterdir())
    recipe = json.loads((out / "config.json").read_text())["recipe"]
    assert (recipe["lr"], recipe["lr_batch_size"], recipe["freeze"], recipe["width"]) == (0.01, 0, "backbone", 0.35)
    before, after = read_checkpoint(best).tensors, read_checkpoint(out / "last.ckpt").tensors
    changed = {name for name, value in before.items() if not (after[name] == value).all()}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.slow
def test_bench_prints_its_figures() -> None:
    command = ("bench", "--batch-size", "2", "--image-size", "32", "--width", "0.35", "--steps", "2")
    result = run(*command, "--mode", "eval", "--standard-ops", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["kernels"] == "standard operators"
    assert printed["images_per_s"] == pytest.approx(2000 / printed["step_ms"])
    assert (printed["mode"], printed["steps"], printed["width"]) == ("eval", 2, 0.35)
    assert "width" in refused("bench", "--width", "2")
    assert "the C++ operators" in refused("bench", "--precision", "bfloat16", "--standard-ops")


@cache
def all_text(files: str, but: str = "") -> str:
    """Return what all such files say, read once."""
    return "\n".join(path.read_text() for path in ROOT.glob(files) if path.name != but)


def options() -> list[tuple[str, str, str]]:
    """Return (command, flag, name of the argument that carries it) of every option."""
    return [
        (name, max(option.opts, key=len), str(option.name))
        for name, command in main.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and option.name not in ("quiet", "verbose")  # taken by the guard
    ]


@pytest.mark.parametrize(("command", "flag", "argument"), options(), ids=lambda value: value)
def test_every_option_is_read_and_named(command: str, flag: str, argument: str) -> None:
    """The command's body uses the value, and both a page of docs/ and a test or an example name the flag."""
    function = inspect.unwrap(main.commands[command].callback or pytest.fail("a command without code"))
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    rest = {item.name for item in inspect.signature(function).parameters.values() if item.kind is item.VAR_KEYWORD}
    assert argument in read or rest & read  # passed on whole, to a function that refuses a name it does not know
    named = re.compile(rf"{re.escape(flag)}(?![\w-])")
    assert named.search(all_text("docs/*.md")), f"no page names {flag}"
    assert named.search(all_text("tests/**/test_*.py")), f"no test names {flag}"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe)])
def test_every_field_of_a_recipe_is_read_and_documented(field: str) -> None:
    code = all_text("mbv2/**/*.py", but="recipe.py")
    assert re.search(rf"recipe\.{field}\b|\"{field}\"", code), f"nothing reads {field}"
    about = {"name", "command", "source", "expected_top1"}
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert field in about or f"`{field}`" in page, f"docs/recipes.md does not name {field}"
