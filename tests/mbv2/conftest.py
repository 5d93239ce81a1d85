"""MindSpore started once for all tests of the package; published weights and real photographs, made once."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from imnet_prep.build import options as build
from imnet_prep.build.convert import convert
from mbv2.runtime import start_mindspore
from mbv2.weights.convert import ConvertOptions, convert_weights


@pytest.fixture(scope="session", autouse=True)
def mindspore_started() -> None:
    start_mindspore("CPU")


@pytest.fixture(scope="session")
def timm(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that timm's published weights become."""
    out = tmp_path_factory.mktemp("timm") / "mobilenetv2.ckpt"
    options = ConvertOptions("same", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    result = convert_weights(shared_data / "mobilenetv2_100_tf.safetensors", "timm", out, options)
    assert (result.model.width, result.model.classes) == (1.0, 1000)
    return out


@pytest.fixture(scope="session")
def photographs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of 250 photographs under ImageNet's labels."""
    return few_photographs(shared_data, tmp_path_factory.mktemp("photographs"), 250)


def few_photographs(shared_data: Path, folder: Path, count: int) -> Path:
    """Convert the first ``count`` of them, under ImageNet's labels."""
    with tarfile.open(shared_data / "imagenet-samples-250.tar") as archive:
        files = [member for member in archive if member.isfile()]
        archive.extractall(folder / "images", files[:count], filter="data")
    plan, options, out = build.PlanOptions(label_space="imagenet1k"), build.ConvertOptions(), folder / "records"
    convert([folder / "images"], out, "val", plan, options, lambda _: None, lambda: False)
    return out
