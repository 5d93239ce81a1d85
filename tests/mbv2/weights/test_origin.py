"""What is told of padding and normalisation from a file's name and from the first layer's statistics."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mbv2.network.model import IMAGENET_MEAN, IMAGENET_STD
from mbv2.weights.checkpoint import read_checkpoint
from mbv2.weights.convert import ConvertOptions, convert_weights
from mbv2.weights.origin import HALF, Input, assume, stem_input
from tests.mbv2.weights.test_convert import foreign, random_weights, write

Stem = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
NO_STEM: Stem = (np.zeros((8, 3, 3, 3), np.float32), np.zeros(8, np.float32), np.ones(8, np.float32))


def stem(mean: tuple[float, ...], std: tuple[float, ...]) -> Stem:
    """Random kernels, and the statistics of their outputs on images with the spectrum and colours of photographs."""
    rng = np.random.default_rng(0)
    rows, columns = np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64), indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / 64)  # 1/f
    spectrum = np.fft.fft2(rng.normal(size=(24, 64, 64, 4)), axes=(1, 2))
    planes = np.fft.ifft2(spectrum * amplitude[None, :, :, None], axes=(1, 2)).real
    planes /= planes.std((0, 1, 2))
    colours = np.sqrt(0.93) * planes[..., :1] + np.sqrt(0.07) * planes[..., 1:]  # (24, 64, 64, 3)
    images = ((np.array(IMAGENET_MEAN) + np.array(IMAGENET_STD) * colours) - mean) / std
    kernel = (rng.normal(size=(16, 3, 3, 3)) + rng.normal(size=(16, 3, 1, 1))).astype(np.float32)
    taps = (images[:, i : 62 + i : 4, j : 62 + j : 4] @ kernel[:, :, i, j].T for i in range(3) for j in range(3))
    out = sum(taps).reshape(-1, 16).astype(np.float32)
    return kernel, out.mean(0), out.var(0)


@pytest.mark.parametrize(
    ("mean", "std", "told"),
    [(IMAGENET_MEAN, IMAGENET_STD, Input.IMAGENET), (HALF, HALF, Input.HALF), ((0.0,) * 3, (1.0,) * 3, None)],
)
def test_the_first_layer_tells_how_images_were_normalised(
    mean: tuple[float, ...], std: tuple[float, ...], told: Input | None
) -> None:
    assert stem_input(*stem(mean, std)) is told


@pytest.mark.parametrize("name", ["tf_mobilenetv2_100.pth", "mobilenetv2_100_tf.safetensors", "mobilenet_v2-TF.ckpt"])
def test_the_name_tells_where_the_first_layer_does_not(name: str) -> None:
    assumed = assume(name, *NO_STEM)
    assert (assumed.padding, assumed.mean, assumed.std, assumed.doubt) == ("same", HALF, HALF, "")


@pytest.mark.parametrize("name", ["mobilenetv2_100.safetensors", "outfit.pth", "gtf4.ckpt"])
def test_where_nothing_tells_the_usual_is_assumed_with_a_doubt(name: str) -> None:
    assumed = assume(name, *NO_STEM)
    assert (assumed.padding, assumed.mean, assumed.std) == ("symmetric", IMAGENET_MEAN, IMAGENET_STD)
    assert "--padding same --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5" in assumed.doubt


def test_a_name_against_the_first_layer_is_a_doubt() -> None:
    assumed = assume("tf_mobilenetv2.pth", *stem(IMAGENET_MEAN, IMAGENET_STD))
    assert (assumed.padding, assumed.mean) == ("same", IMAGENET_MEAN)
    assert "both paddings are possible" in assumed.doubt


def test_a_doubt_is_a_warning_unless_all_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, out = tmp_path / "theirs.safetensors", tmp_path / "ours.ckpt"
    weights = random_weights(0.35)
    weights["stem.bn.moving_variance"] *= 100  # of no normalisation
    write(path, foreign(weights, "timm"))
    with caplog.at_level(logging.WARNING):
        result = convert_weights(path, "timm", out, ConvertOptions(std=HALF))
    assert result.assumed == ("padding", "mean")
    assert "padding, mean assumed: neither name nor weights tell" in caplog.text
    caplog.clear()
    result = convert_weights(path, "timm", out, ConvertOptions("same", HALF, HALF))
    assert (result.assumed, caplog.text) == ((), "")
    assert result.model.bn_eps == 1e-3


@pytest.mark.real_data
def test_weights_from_tensorflow_are_told_without_their_name(shared_data: Path, timm: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "mobilenetv2_100_tf.safetensors", tmp_path / "model.safetensors")
    convert_weights(tmp_path / "model.safetensors", "timm", tmp_path / "told.ckpt", ConvertOptions())
    assert read_checkpoint(tmp_path / "told.ckpt").meta.model == read_checkpoint(timm).meta.model
