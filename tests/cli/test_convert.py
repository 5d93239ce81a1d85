"""``mbv2 convert`` as a person meets it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mbv2.network.model import ModelConfig
from mbv2.weights.checkpoint import Meta, read_checkpoint, save_checkpoint
from tests.cli.test_mobilenet import run
from tests.mbv2.weights.test_convert import random_weights
from tests.synthetic import WNIDS


@pytest.mark.real_data
def test_convert_keeps_what_it_is_told_about_preprocessing(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "timm.ckpt"
    result = run(
        *("convert", shared_data / "mobilenetv2_100_tf.safetensors", "--from", "timm", "--out", out),
        *("--padding", "same", "--bn-eps", "0.002", "--mean", "0.5", "0.4", "0.3", "--std", "0.1", "0.2", "0.3"),
        *("--image-size", "160"),
    )
    assert result.exit_code == 0, result.output
    meta = read_checkpoint(out).meta
    assert (meta.model["padding"], meta.model["bn_eps"], meta.image_size) == ("same", 0.002, 160)
    assert (list(meta.model["mean"]), list(meta.model["std"])) == ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--from", "timm", "--to", "timm"],
        ["--to", "timm", "--padding", "same"],
        ["--to", "timm", "--mean", 0, 0, 0],
    ],
)
def test_convert_goes_one_way_at_a_time(wrong: list[str], tmp_path: Path) -> None:
    result = run("convert", "x.ckpt", "--out", tmp_path / "x.safetensors", *map(str, wrong))
    assert result.exit_code == 2
    assert "--to" in result.stderr


def test_convert_prints_the_model_that_takes_the_weights(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "best.ckpt", tmp_path / "best.safetensors"
    model = asdict(ModelConfig(classes=3, width=0.35))
    save_checkpoint(checkpoint, random_weights(0.35, classes=3), Meta(model, WNIDS[:3], 32, 0.875))
    result = run("convert", checkpoint, "--to", "timm", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["file"], printed["tensors"], printed["image_size"]) == (str(out), 262, 32)
    assert printed["model"] == "timm.create_model('mobilenetv2_035', num_classes=3, bn_eps=1e-05)"
