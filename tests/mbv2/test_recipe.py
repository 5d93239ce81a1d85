"""Recipes: by name, from a file, with overrides; anything unknown is refused with the choices."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from imnet_prep.errors import RecipeError, TrainError
from mbv2.recipe import (
    Recipe,
    load_recipe,
    override,
    parse_assignments,
    recipe_names,
    resolve_recipe,
    stored_fields,
)
from mbv2.training.options import RunOptions
from mbv2.weights.convert import ConvertOptions
from mbv2.weights.pretrained import network_config


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe_states_command_source_and_expectation(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert "train" in recipe.command or recipe.command.startswith("imnet-prep ")
    assert recipe.source
    assert recipe.expected_top1


def test_unknown_recipe_lists_the_choices() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("inception")
    for name in recipe_names():
        assert name in str(caught.value)


def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="label_smoothing"):
        override(Recipe(), {"label_smothing": "0.1"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", "0"),
        ("epochs", "2.5"),
        ("epochs", "many"),
        ("lr", "nan"),
        ("lr", "-1"),
        ("width", "1.5"),
        ("image_size", "31"),
        ("image_size", "289"),
        ("optimizer", "lamb"),
        ("schedule", "cyclic"),
        ("dropout", "1"),
        ("crop_min", "0"),
        ("epochs", True),
        ("name", ["a"]),
        ("trivialaugment", "1"),
        ("beta2", "1"),
        ("sampling", "fair"),
        ("eval_size", "31"),
        ("backbone_lr_factor", "0"),
    ],
)
def test_bad_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(RecipeError, match=field):
        override(Recipe(), {field: value})


def test_a_text_without_a_value_is_empty(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("distill_from:\nsource: ~\n")
    assert load_recipe(str(tmp_path / "mine.yaml")) == Recipe()


def test_crop_range_must_not_be_empty() -> None:
    with pytest.raises(RecipeError, match="crop_max"):
        override(Recipe(), {"crop_min": 0.9, "crop_max": 0.5})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"optimizer": "adamw", "rms_decay": 0.999}, "beta2"),
        ({"optimizer": "adamw", "momentum": 0.8}, "beta1"),
        ({"beta1": 0.8}, "momentum"),
        ({"mixup_prob": 0.5}, "mixup_alpha"),
        ({"mixup_last_epoch": 5}, "cutmix_alpha"),
        ({"score_live": True}, "ema_decay"),
        ({"freeze": "backbone", "backbone_lr_factor": 0.1}, "freeze"),
        ({"trivialaugment": True, "randaugment_ops": 2}, "randaugment_ops"),
        ({"freeze": "backbone", "trivialaugment": True}, "images to augment"),
        ({"freeze": "backbone", "cutmix_alpha": 1, "mixup_last_epoch": 5}, "images"),
        ({"epochs": 5, "warmup_epochs": 5}, "epochs"),
    ],
)
def test_a_field_that_would_change_nothing_is_refused_and_says_what_it_needs(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecipeError, match=named):
        override(Recipe(), fields)


def test_fields_are_checked_together_however_each_is_given() -> None:
    recipe = resolve_recipe("tiny", {"epochs": 2}, {"warmup_epochs": "1.5", "trivialaugment": "True"})
    assert (recipe.epochs, recipe.warmup_epochs, recipe.trivialaugment) == (2, 1.5, True)


def test_a_run_that_was_stored_before_a_field_existed_has_its_default() -> None:
    fields = {"optimizer": "sgd", "momentum": 0.8, "rms_decay": 0.99}
    assert Recipe(**stored_fields(fields)) == Recipe(**fields)  # type: ignore[arg-type]


def test_a_run_of_adamw_that_was_stored_before_its_betas_existed_keeps_them() -> None:
    old = stored_fields({"optimizer": "adamw", "momentum": 0.8, "rms_decay": 0.99})
    assert Recipe(**old) == Recipe(optimizer="adamw", beta1=0.8, beta2=0.99)
    assert stored_fields(old) == old
    new = Recipe(optimizer="adamw")
    assert (new.beta1, new.beta2) == (0.9, 0.999)
    assert stored_fields(dataclasses.asdict(new)) == dataclasses.asdict(new)


def test_file_is_read_and_its_errors_name_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nepochs: 3\nlr: 1e-2\n", encoding="utf-8")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.epochs, recipe.lr) == ("mine", 3, 0.01)
    for text in ("- a\n- b\n", "epochs: [1\n", "epoch: 3\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=r"mine\.yaml"):
            load_recipe(str(path))
    with pytest.raises(RecipeError, match=r"absent\.yaml"):
        load_recipe(str(tmp_path / "absent.yaml"))


def test_assignments_win_over_flags_and_flags_over_the_recipe() -> None:
    recipe = resolve_recipe("tiny", {"epochs": 3, "width": 0.5, "lr": None}, parse_assignments(["width=0.75"]))
    assert (recipe.epochs, recipe.width) == (3, 0.75)
    assert recipe.lr == load_recipe("tiny").lr


@pytest.mark.parametrize(("flags", "assignments"), [({"lr": 0.3}, {}), ({}, {"lr": "0.3"})])
def test_a_given_rate_is_not_scaled_however_it_is_given(flags: dict[str, float], assignments: dict[str, str]) -> None:
    assert load_recipe("tiny").lr_batch_size > 0
    recipe = resolve_recipe("tiny", flags, assignments)
    assert (recipe.lr, recipe.lr_batch_size) == (0.3, 0)
    assert resolve_recipe("tiny", flags, {**assignments, "lr_batch_size": "64"}).lr_batch_size == 64


def test_the_paper_s_recipe_has_the_paper_s_network() -> None:
    config = network_config(load_recipe("paper"), 1000, None)
    assert (config.padding, config.bn_eps, config.bn_momentum) == ("same", 1e-3, 0.997)


def test_assignment_without_equals_is_refused() -> None:
    with pytest.raises(RecipeError, match="FIELD=VALUE"):
        parse_assignments(["epochs"])


def documented(field: dataclasses.Field[Any]) -> str:
    """Return the row of a field in the table of ``docs/recipes.md``, from its declaration and the class's docstring."""
    assert Recipe.__doc__ is not None
    found = re.search(rf"^ {{8}}{field.name}: ((?:.+\n)(?: {{12}}.+\n)*)", Recipe.__doc__, re.MULTILINE)
    assert found is not None, f"{field.name} is not documented"
    meaning = " ".join(found[1].split()).replace("``", "`")
    values, default, limits = "", field.default, field.metadata
    if "choices" in limits:
        values = ", ".join(f"`{choice}`" for choice in limits["choices"])
    elif "low" in limits:
        opened = "below " if limits["end"] == ")" else ""
        values = (
            f"{limits['low']:g} to {opened}{limits['high']:g}"
            if limits["high"] < math.inf
            else f"{limits['low']:g} or more"
        )
    elif field.type is bool:
        values, default = "`true`, `false`", str(default).lower()
    return f"| `{field.name}` | {f'`{default}`' if default != '' else ''} | {values} | {meaning} |"


def test_the_table_of_fields_is_the_recipe_s() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    assert rows == [documented(field) for field in dataclasses.fields(Recipe)]


@pytest.mark.parametrize("field", ["save_every", "log_every"])
def test_an_option_of_a_run_that_is_out_of_range_is_named_alone(field: str, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {field: -1}
    with pytest.raises(TrainError, match=rf"^{field}; expected \d or more; got -1$"):
        RunOptions(tmp_path, tmp_path, Recipe(), **wrong)


def test_weights_are_converted_for_sizes_that_the_network_takes() -> None:
    with pytest.raises(TrainError, match="expected 32 to 288; got 5"):
        ConvertOptions(image_size=5)
