"""Each two options of a run together: it trains, is killed at a random step, and ends in the same bytes."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imnet_prep.build.convert import convert
from imnet_prep.build.options import ConvertOptions, PlanOptions
from imnet_prep.errors import RecipeError
from mbv2.network.model import ModelConfig
from mbv2.recipe import Recipe, recipe_from_fields
from mbv2.training.logs import read_metrics, read_skipped
from mbv2.training.run import train
from mbv2.weights.checkpoint import Meta, save_checkpoint
from tests.mbv2.training.run_pairs import run_options
from tests.mbv2.weights.test_convert import random_weights
from tests.records import spoil_image
from tests.synthetic import WNIDS, picture

pytestmark = pytest.mark.usefixtures("small_network")

BASE: dict[str, Any] = {"epochs": 2, "batch_size": 4, "image_size": 32, "width": 0.35, "lr": 0.01, "warmup_frac": 0}
TEACHER, BAD, GOOD = "<teacher>", "<bad>", "<good>"
Level = dict[str, Any]
# By factor, its levels: fields of the recipe, and under "run" and "records" what is no field.
FACTORS: dict[str, tuple[Level, ...]] = {
    "optimizer": (
        {},
        {"optimizer": "nesterov", "momentum": 0.8},
        {"optimizer": "adamw", "beta1": 0.8, "beta2": 0.99},
        {"optimizer": "rmsprop", "rms_decay": 0.8, "epsilon": 1e-3},
    ),
    "schedule": ({}, {"schedule": "step", "step_epochs": 0.5}, {"schedule": "linear"}, {"schedule": "constant"}),
    "warm-up": ({}, {"warmup_epochs": 0.7}, {"warmup_frac": 0.3}),
    "backbone": ({}, {"backbone_lr_factor": 0.1}),
    "freeze": ({}, {"freeze": "bn"}, {"freeze": "backbone", "feature_views": 1}),
    "averages": ({}, {"ema_decay": 0.8}, {"ema_decay": 0.8, "score_live": True}),
    "clipping": ({}, {"clip_norm": 1.0}),
    "accumulation": ({}, {"accumulate_steps": 3}),
    "teacher": ({}, {"distill_from": TEACHER, "distill_temperature": 2}),
    "classes": ({}, {"class_weights": "balanced"}),
    "sampling": ({}, {"sampling": "balanced"}),
    "smoothing": ({}, {"label_smoothing_over": "others"}, {"label_smoothing": 0}),
    "colour": (
        {},
        {"color_jitter": 0.4, "erasing_prob": 0.5},
        {"randaugment_ops": 2},
        {"trivialaugment": True, "crop_min": 0.3, "flip": 0},
    ),
    "mixing": (
        {},
        {"mixup_alpha": 0.2, "mixup_prob": 0.5},
        {"cutmix_alpha": 1.0, "mixup_last_epoch": 1},
        {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    ),
    "scoring": ({}, {"eval_size": 48, "eval_crop": 1.0}, {"eval_every": 2}),
    "ending": ({}, {"patience": 1}, {"keep_every": 1}),
    "dropout": ({}, {"dropout": 0}),
    "network": ({}, {"padding": "same", "bn_momentum": 0.8}),
    "saving": ({}, {"run": {"save_every": 2}}),
    "events": ({}, {"run": {"tensorboard": True}}),
    "operators": ({}, {"run": {"kernels": "standard"}}, {"precision": "bfloat16"}),
    "threads": ({}, {"run": {"workers": 1}}),
    "records": ({}, {"records": BAD}),
}
Row = dict[str, int]  # the level of each factor
Pair = tuple[str, int, str, int]


def document(row: Row) -> dict[str, Any]:
    """Put the fields and options of a row together."""
    fields, records = dict(BASE), GOOD
    run: dict[str, Any] = {}
    for factor, level in row.items():
        chosen = dict(FACTORS[factor][level])
        run |= chosen.pop("run", {})
        records = chosen.pop("records", records)
        fields |= chosen
    return {"recipe": fields, "run": run, "records": records}


def goes_together(row: Row) -> bool:
    """Say whether the recipe takes the levels of a row together, the pretrained network's fields included."""
    if row.get("freeze") == 2 and row.get("network"):
        return False  # the weights bring padding and BatchNorm's constants
    with suppress(RecipeError):
        recipe_from_fields(document(row)["recipe"], where="a row")
        return True
    return False


def pair(a: str, i: int, b: str, k: int) -> Pair:
    return (a, i, b, k) if ORDER[a] < ORDER[b] else (b, k, a, i)


def pairs(row: Row) -> set[Pair]:
    return {pair(a, i, b, k) for (a, i), (b, k) in combinations(row.items(), 2)}


@cache
def all_pairs() -> set[Pair]:
    """Return each two levels of different factors that go together."""
    return {
        (a, i, b, k)
        for a, b in combinations(FACTORS, 2)
        for i in range(len(FACTORS[a]))
        for k in range(len(FACTORS[b]))
        if goes_together({a: i, b: k})
    }


@cache
def covering_rows() -> list[Row]:
    """Choose rows greedily until each pair is in one of them."""
    draw, rows, missing = random.Random(0), [], set(all_pairs())
    while missing:
        candidates = [_row_with(draw, min(missing), missing) for _ in range(20)]
        rows.append(max(candidates, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


def _row_with(draw: random.Random, first: Pair, missing: set[Pair]) -> Row:
    row = {first[0]: first[1], first[2]: first[3]}
    for factor in draw.sample(list(FACTORS), len(FACTORS)):
        if factor not in row:
            gains = []
            for level in range(len(FACTORS[factor])):
                new = [pair(factor, level, other, chosen) for other, chosen in row.items()]
                if all(one in all_pairs() for one in new):
                    gains.append((sum(one in missing for one in new), draw.random(), level))
            row[factor] = max(gains)[2]
    return row


ORDER = {factor: number for number, factor in enumerate(FACTORS)}
ROWS = 28  # covering_rows() would cost each process of the tests a second
SAMPLE = 22  # of make test, with few layers to compile; make test-long runs the others


def test_the_rows_hold_every_field_and_every_pair() -> None:
    rows = covering_rows()
    assert len(rows) == ROWS
    assert set.union(*(pairs(row) for row in rows)) == all_pairs()
    assert all(goes_together(row) for row in rows)
    tried = {name for levels in FACTORS.values() for level in levels for name in level} | set(BASE)
    fixed = {"name", "command", "source", "expected_top1", "lr_batch_size", "weight_decay", "final_lr_frac"}
    numbers = {"bn_eps", "step_gamma", "crop_max", "randaugment_magnitude", "distill_weight"}
    assert set(asdict(Recipe())) - tried == fixed | numbers


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Records of 26 and 9 images, the same with a bad one, and weights to start and to learn from."""
    folder = tmp_path_factory.mktemp("pairs")
    found = {}
    for records in (GOOD, BAD):
        place = folder / records.strip("<>")
        for split, count in (("train", 26), ("val", 9)):
            for number in range(count):
                label = number % 3 if number % 5 else 0  # class 0 has more
                path = place / "images" / split / WNIDS[label] / f"{WNIDS[label]}_{number}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(label, number)).save(path, quality=90)
        out = place / "records"
        convert([place / "images"], out, None, PlanOptions(), ConvertOptions(workers=1), lambda _: None, lambda: False)
        found[records] = str(out)
    spoil_image(Path(found[BAD]), 0, 7, "flip a byte")
    weights = random_weights(BASE["width"], classes=3)
    weights["classifier.weight"] *= np.float32(0.01)
    save_checkpoint(folder / "start.ckpt", weights, Meta(asdict(ModelConfig(3, width=BASE["width"])), (), 32, 0.875))
    return found | {TEACHER: str(folder / "start.ckpt")}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "number", [SAMPLE, *(pytest.param(row, marks=pytest.mark.long) for row in range(ROWS) if row != SAMPLE)]
)
def test_a_row_resumes(number: int, places: dict[str, str], tmp_path: Path) -> None:
    """Run a row undisturbed, and killed and resumed; compare what they leave."""
    row, folder = covering_rows()[number], tmp_path
    run = document(row)
    run |= {"records": places[run["records"]], "pretrained": places[TEACHER], "out": str(folder / "killed")}
    if run["recipe"].get("distill_from"):
        run["recipe"]["distill_from"] = places[TEACHER]
    straight, killed = folder / "straight", folder / "killed"
    (folder / "run.json").write_text(json.dumps(run))
    result = train(run_options(run, straight))
    assert (result.skipped != ()) == bool(row["records"])
    last = max(step for step, *_ in steps(straight))
    kill_after = random.Random(str(row)).randint(1, last - 1)
    assert killed_in_a_process(folder / "run.json", kill_after), f"after step {kill_after}"
    train(run_options(run, killed, resume=True))
    kept = sorted(path.name for path in straight.glob("*.ckpt"))
    assert kept == sorted(path.name for path in killed.glob("*.ckpt"))
    for name in kept:
        assert (straight / name).read_bytes() == (killed / name).read_bytes(), (name, kill_after, run)
    assert list(steps(straight)) == list(steps(killed))
    assert [scores(line) for line in read_metrics(straight)] == [scores(line) for line in read_metrics(killed)]
    assert read_skipped(straight) == read_skipped(killed)
    if run["run"].get("tensorboard"):
        assert (
            losses_of_events(killed) == losses_of_events(straight) == [(step, loss) for step, loss, *_ in steps(killed)]
        )


def killed_in_a_process(run: Path, step: int) -> bool:
    command = [sys.executable, "-m", "tests.mbv2.training.run_pairs", str(run), str(step)]
    return subprocess.run(command, check=False, timeout=600).returncode == -9


def steps(run: Path) -> Iterator[tuple[int, float, float, float | None]]:
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        if "loss" in row:
            yield row["step"], row["loss"], row["lr"], row["grad_norm"]


def scores(row: Any) -> tuple[Any, ...]:
    pace = ("images_per_s", "data_wait_frac")
    return tuple(value for name, value in asdict(row).items() if name not in pace)


def losses_of_events(run: Path) -> list[tuple[int, float]]:
    """Return step and loss of every event, in order; the loss is float32 in them, as it was computed."""
    from mbv2.training.events import _records

    data = b"".join(path.read_bytes() for path in sorted((run / "events").iterdir()))
    found = [(event.step, value) for _, event in _records(data) for value in event.summary.value]
    return sorted((step, value.simple_value) for step, value in found if value.tag == "train/loss")
