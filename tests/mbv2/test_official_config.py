"""The official trainer's configuration files, translated."""

from __future__ import annotations

from pathlib import Path

import pytest

from imnet_prep.errors import RecipeError
from mbv2.official_config import read_official
from mbv2.recipe import load_recipe, override

# The published Ascend file's training keys, with its three YAML documents.
ASCEND = """\
enable_modelarts: False
data_url: ""
device_target: Ascend
num_classes: 1000
image_height: 224
image_width: 224
num_workers: 32
batch_size: 256
epoch_size: 200
warmup_epochs: 4
lr_init: 0.00
lr_end: 0.04
lr_max: 0.4
momentum: 0.9
weight_decay: 0.00004
label_smooth: 0.1
loss_scale: 1024
save_checkpoint_path: "./"
platform: 'Ascend'
activation: "Softmax"
dataset_path: "/cache/data"
pretrain_ckpt: ""
freeze_layer: ""
---
freeze_layer: 'freeze the weights of network from start to which layers'
---
platform: ['Ascend', 'GPU', 'CPU']
"""


def write(tmp_path: Path, text: str, name: str = "config.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_published_file_is_the_official_recipe(tmp_path: Path) -> None:
    official = read_official(write(tmp_path, ASCEND))
    recipe = override(load_recipe("official"), official.fields)
    assert (recipe.epochs, recipe.batch_size, recipe.image_size) == (200, 256, 224)
    assert (recipe.lr, recipe.lr_batch_size, recipe.warmup_frac) == (0.4, 0, 0.02)
    assert recipe.final_lr_frac == pytest.approx(0.1)
    assert (recipe.label_smoothing, recipe.weight_decay, recipe.freeze) == (0.1, 4e-5, "none")
    assert official.device_target == "Ascend"
    assert official.records is None
    assert official.pretrained is None


def test_paths_and_freezing_are_taken_over_and_shown(tmp_path: Path) -> None:
    text = (
        "dataset_path: /data/records\npretrain_ckpt: m.ckpt\nfreeze_layer: backbone\nnum_classes: 26\nplatform: CPU\n"
    )
    official = read_official(write(tmp_path, text))
    assert (official.records, official.pretrained) == (Path("/data/records"), Path("m.ckpt"))
    assert (official.fields, official.device_target) == ({"freeze": "backbone"}, "CPU")
    shown = dict(official.shown)
    assert shown.keys() == {"dataset_path", "pretrain_ckpt", "freeze_layer", "num_classes", "platform"}
    assert "records" in shown["num_classes"]


def test_config_path_is_read_first(tmp_path: Path) -> None:
    write(tmp_path, "batch_size: 150\nepoch_size: 200\n", "base.yaml")
    official = read_official(write(tmp_path, "config_path: base.yaml\nepoch_size: 15\n"))
    assert official.fields == {"batch_size": 150, "epochs": 15}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown key 'epoch'"),
        ("image_height: 224\nimage_width: 192\n", "image_height and image_width"),
        ("warmup_epochs: 4\n", "epoch_size"),
        ("warmup_epochs: four\nepoch_size: 10\n", "warmup_epochs"),
        ("lr_end: 0\nlr_max: 0\n", "lr_max"),
        ("- a\n", "mapping"),
        ("a: [\n", "not YAML"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_official(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml"):
        read_official(tmp_path / "absent.yaml")
