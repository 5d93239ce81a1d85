"""Foreign weights: names by table, every tensor accounted for, the same function as a plain NumPy forward."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from imnet_prep.errors import CheckpointError, TrainError
from mbv2.network import model
from mbv2.network.model import MobileNetV2, ModelConfig, block_shapes
from mbv2.weights.checkpoint import Checkpoint, Meta, Tensors, build_network, read_checkpoint, save_checkpoint
from mbv2.weights.convert import ConvertOptions, convert_weights, return_weights
from mbv2.weights.names import SOURCES, source_name

Array = NDArray[np.float64]
# What each project calls a few of the parameters, read off its own model.
KNOWN = {
    "timm": {
        "stem.conv.weight": "conv_stem.weight",
        "stem.bn.moving_mean": "bn1.running_mean",
        "blocks.0.depthwise.conv.weight": "blocks.0.0.conv_dw.weight",
        "blocks.0.project.bn.gamma": "blocks.0.0.bn2.weight",
        "blocks.2.project.conv.weight": "blocks.1.1.conv_pwl.weight",
        "blocks.16.expand.bn.beta": "blocks.6.0.bn1.bias",
        "head.bn.moving_variance": "bn2.running_var",
        "classifier.bias": "classifier.bias",
    },
    "torchvision": {
        "stem.conv.weight": "features.0.0.weight",
        "blocks.0.depthwise.conv.weight": "features.1.conv.0.0.weight",
        "blocks.0.project.bn.moving_mean": "features.1.conv.2.running_mean",
        "blocks.1.depthwise.bn.beta": "features.2.conv.1.1.bias",
        "blocks.16.project.bn.gamma": "features.17.conv.3.weight",
        "head.conv.weight": "features.18.0.weight",
        "classifier.weight": "classifier.1.weight",
    },
    "mindcv": {
        "stem.bn.gamma": "features.1.gamma",
        "blocks.0.project.conv.weight": "features.3.layers.3.weight",
        "blocks.1.depthwise.conv.weight": "features.4.layers.3.weight",
        "blocks.16.project.bn.beta": "features.19.layers.7.beta",
        "head.conv.weight": "features.20.weight",
        "classifier.bias": "classifier.1.bias",
    },
    "mindspore-models": {
        "stem.conv.weight": "features.0.features.0.weight",
        "blocks.0.depthwise.bn.gamma": "features.1.conv.0.features.1.gamma",
        "blocks.0.project.conv.weight": "features.1.conv.1.weight",
        "blocks.3.project.bn.moving_mean": "features.4.conv.3.moving_mean",
        "head.bn.beta": "features.18.features.1.beta",
        "classifier.weight": "dense.weight",
    },
}


def random_weights(width: float, classes: int = 7) -> Tensors:
    """Return weights of our own network that are all different and keep the activations in range."""
    return {name: value.copy() for name, value in _random_weights(model._STAGES, width, classes).items()}


@cache  # to build the network takes half a second
def _random_weights(stages: object, width: float, classes: int) -> Tensors:
    net = MobileNetV2(ModelConfig(classes=classes, width=width), kernels="standard")
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    for parameter in net.get_parameters():
        noise = rng.normal(size=parameter.shape).astype(np.float32)
        if parameter.name.endswith("moving_variance"):
            noise = 1 + 0.1 * np.abs(noise)
        elif parameter.name.endswith("gamma"):
            noise = 1 + 0.1 * noise
        elif parameter.name.endswith("conv.weight"):
            noise *= np.float32(np.sqrt(2 / np.prod(parameter.shape[1:])))
        tensors[parameter.name] = noise
    return tensors


def foreign(weights: Tensors, source: str) -> Tensors:
    return {source_name(source, name): value for name, value in weights.items()}


def write(path: Path, tensors: Tensors) -> Path:
    if path.suffix == ".ckpt":
        ms.save_checkpoint([{"name": n, "data": ms.Tensor(v)} for n, v in tensors.items()], str(path))
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_names_are_the_project_s_own(source: str) -> None:
    assert {name: source_name(source, name) for name in KNOWN[source]} == KNOWN[source]
    names = list(random_weights(0.35))
    assert len({source_name(source, name) for name in names}) == len(names) == 262


@pytest.mark.parametrize(("source", "width"), [("timm", 1.4), ("torchvision", 0.35), ("mindcv", 0.75)])
def test_every_tensor_arrives_and_the_width_is_found(tmp_path: Path, source: str, width: float) -> None:
    weights = random_weights(width)
    suffix = ".ckpt" if source == "mindcv" else ".safetensors"
    path = write(tmp_path / f"theirs{suffix}", foreign(weights, source))
    result = convert_weights(path, source, tmp_path / "ours.ckpt", ConvertOptions())
    assert (result.model.width, result.model.classes, result.tensors, result.dropped) == (width, 7, 262, ())
    loaded = read_checkpoint(tmp_path / "ours.ckpt")
    assert loaded.meta.model["bn_eps"] == 1e-5
    for name, value in weights.items():
        assert np.array_equal(loaded.tensors[name], value), name


def test_optimiser_state_and_prefixes_of_the_official_trainer_are_dropped(tmp_path: Path) -> None:
    theirs = foreign(random_weights(0.35), "mindspore-models")
    theirs["head.dense.bias"] = theirs.pop("dense.bias")
    theirs["moments.dense.weight"] = np.zeros((7, 1280), np.float32)
    theirs["learning_rate"] = np.ones(3, np.float32)
    path = write(tmp_path / "official.ckpt", theirs)
    result = convert_weights(path, "mindspore-models", tmp_path / "ours.ckpt", ConvertOptions())
    assert result.dropped == ("learning_rate", "moments.dense.weight")


def test_a_tensor_too_many_too_few_or_misshapen_is_named(tmp_path: Path) -> None:
    good = foreign(random_weights(0.35), "timm")
    bads: list[tuple[Tensors, str]] = [
        ({**good, "blocks.0.0.se.weight": np.zeros(3, np.float32)}, r"left over blocks\.0\.0\.se\.weight"),
        ({name: value for name, value in good.items() if name != "bn1.bias"}, r"missing bn1\.bias"),
        ({**good, "bn1.bias": np.zeros(5, np.float32)}, r"tensor bn1\.bias; expected shape"),
    ]
    for tensors, message in bads:
        path = write(tmp_path / "theirs.safetensors", tensors)
        with pytest.raises(CheckpointError, match=message):
            convert_weights(path, "timm", tmp_path / "ours.ckpt", ConvertOptions())
    assert not (tmp_path / "ours.ckpt").exists()


def test_unusable_files_are_named(tmp_path: Path) -> None:
    def refused(path: Path, source: str, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            convert_weights(path, source, tmp_path / "ours.ckpt", ConvertOptions())

    good = write(tmp_path / "good.safetensors", foreign(random_weights(0.35), "timm"))
    refused(good, "keras", "timm, torchvision, mindcv, mindspore-models")
    refused(good, "torchvision", "holds no MobileNetV2 of torchvision")
    refused(tmp_path / "absent.safetensors", "timm", "No such file")
    refused(tmp_path / "weights.h5", "timm", "unknown kind of weights")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:5000])
    refused(tmp_path / "cut.safetensors", "timm", "not a safetensors file")


# --- the function, against NumPy in float64 --------------------------------------------------------------------------


def convolve(x: Array, weight: Array, stride: int, depthwise: bool, same: bool) -> Array:
    """Convolve NHWC with OIHW; SAME padding puts the odd row and column at the end."""
    kernel = weight.shape[2]
    if kernel == 1:
        return x @ weight[:, :, 0, 0].T
    height = -(-x.shape[1] // stride)
    total = max((height - 1) * stride + kernel - x.shape[1], 0)
    before, after = (total // 2, total - total // 2) if same else (1, 1)
    padded = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    height = (padded.shape[1] - kernel) // stride + 1
    out: Array | float = 0.0
    for row in range(kernel):
        for column in range(kernel):
            window = padded[:, row : row + stride * height : stride, column : column + stride * height : stride]
            window = window[:, :height, :height]
            tap = weight[:, :, row, column]
            out = out + (window * tap[:, 0] if depthwise else window @ tap.T)
    assert isinstance(out, np.ndarray)
    return out


def reference_logits(loaded: Checkpoint, image: NDArray[np.uint8]) -> Array:
    """Run the network as the paper's table 2 describes it."""
    tensors = {name: value.astype(np.float64) for name, value in loaded.tensors.items()}
    model = loaded.meta.model
    same, eps = model["padding"] == "same", float(model["bn_eps"])

    def unit(x: Array, name: str, stride: int = 1, *, depthwise: bool = False, relu: bool = True) -> Array:
        x = convolve(x, tensors[f"{name}.conv.weight"], stride, depthwise, same)
        mean, variance = tensors[f"{name}.bn.moving_mean"], tensors[f"{name}.bn.moving_variance"]
        x = (x - mean) / np.sqrt(variance + eps) * tensors[f"{name}.bn.gamma"] + tensors[f"{name}.bn.beta"]
        return np.clip(x, 0, 6) if relu else x

    x = (image.astype(np.float64) / 255 - np.array(model["mean"])) / np.array(model["std"])
    x = unit(x, "stem", 2)
    for index, shape in enumerate(block_shapes(float(model["width"]))):
        y = unit(x, f"blocks.{index}.expand") if index else x
        y = unit(y, f"blocks.{index}.depthwise", shape.stride, depthwise=True)
        y = unit(y, f"blocks.{index}.project", relu=False)
        x = x + y if shape.residual else y
    pooled = unit(x, "head").mean((1, 2))
    return pooled @ tensors["classifier.weight"].T + tensors["classifier.bias"]


@pytest.mark.slow
@pytest.mark.parametrize(("padding", "size"), [("same", 64), ("same", 75), ("symmetric", 64)])
def test_logits_equal_a_numpy_forward(tmp_path: Path, padding: str, size: int) -> None:
    path = write(tmp_path / "theirs.safetensors", foreign(random_weights(0.35), "timm"))
    options = ConvertOptions(padding, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    convert_weights(path, "timm", tmp_path / "ours.ckpt", options)
    loaded = read_checkpoint(tmp_path / "ours.ckpt")
    image = np.random.default_rng(5).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    want = reference_logits(loaded, image)
    got = build_network(loaded)(ms.Tensor(image)).asnumpy()
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.real_data
def test_published_weights_on_photographs_equal_a_numpy_forward(shared_data: Path, timm: Path) -> None:
    import io
    import tarfile

    from PIL import Image

    with tarfile.open(shared_data / "imagenet-samples-250.tar") as archive:
        members = [member for member in archive if member.isfile()][:4]
        files = [archive.extractfile(member) for member in members]
        images = [Image.open(io.BytesIO(file.read())).convert("RGB").resize((224, 224)) for file in files if file]
    image = np.stack([np.asarray(picture) for picture in images])
    loaded = read_checkpoint(timm)
    got = build_network(loaded)(ms.Tensor(image)).asnumpy()
    assert np.abs(got - reference_logits(loaded, image)).max() < 1e-3


@pytest.mark.slow
@pytest.mark.real_data
def test_published_weights_score_as_their_authors_code_does(photographs: Path, timm: Path) -> None:
    from mbv2.scoring.evaluate import evaluate_checkpoint

    scores, names = evaluate_checkpoint(photographs, timm)
    assert (scores.images, len(names)) == (250, 1000)
    assert scores.correct1 >= 226  # timm itself: 228
    assert scores.correct5 >= 246  # timm itself: 248


# --- and back --------------------------------------------------------------------------------------------------------


def test_weights_for_timm_are_the_averaged_ones_under_timm_s_names(tmp_path: Path) -> None:
    weights = random_weights(0.5)
    averaged = {name: value + 1 for name, value in weights.items() if name.endswith("weight")}
    state = {"momentum.classifier.bias": weights["classifier.bias"]}
    meta = Meta(asdict(ModelConfig(7, 0.5, padding="same", bn_eps=1e-3)), tuple("abcdefg"), 96, 0.875)
    save_checkpoint(tmp_path / "ours.ckpt", {**weights, **{f"ema.{n}": v for n, v in averaged.items()}, **state}, meta)
    result = return_weights(tmp_path / "ours.ckpt", "timm", tmp_path / "theirs.safetensors")
    assert result.model == "timm.create_model('mobilenetv2_050', num_classes=7, pad_type='same', bn_eps=0.001)"
    assert (result.tensors, result.image_size, result.mean) == (262, 96, meta.model_config().mean)
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert set(theirs) == {source_name("timm", name) for name in weights}
    for name, value in {**weights, **averaged}.items():
        assert np.array_equal(theirs[source_name("timm", name)], value), name


def test_a_width_without_a_name_in_timm_is_made_by_multiplier(tmp_path: Path) -> None:
    weights = random_weights(0.4)
    save_checkpoint(tmp_path / "ours.ckpt", weights, Meta(asdict(ModelConfig(7, 0.4)), (), 96, 0.875))
    model = return_weights(tmp_path / "ours.ckpt", "timm", tmp_path / "x.safetensors").model
    assert "_gen_mobilenet_v2('mobilenetv2_100', channel_multiplier=0.4, num_classes=7, bn_eps=1e-05)" in model


def test_what_cannot_be_brought_back_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours.ckpt", random_weights(0.35), Meta(asdict(ModelConfig(7, 0.35)), (), 96, 0.875))
    for target, out, told in (
        ("keras", "x.safetensors", "unknown --to; expected one of timm; got 'keras'"),
        ("timm", "x.pth", r"ending in \.safetensors; got \.pth"),
    ):
        with pytest.raises(CheckpointError, match=told):
            return_weights(tmp_path / "ours.ckpt", target, tmp_path / out)
    with pytest.raises(TrainError, match="existing folder"):
        return_weights(tmp_path / "ours.ckpt", "timm", tmp_path / "absent" / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot read"):
        return_weights(tmp_path / "absent.ckpt", "timm", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.ckpt"]


@pytest.mark.real_data
def test_published_weights_come_back_as_they_were(shared_data: Path, timm: Path, tmp_path: Path) -> None:
    return_weights(timm, "timm", tmp_path / "back.safetensors")
    published, back = (
        load_file(shared_data / "mobilenetv2_100_tf.safetensors"),
        load_file(tmp_path / "back.safetensors"),
    )
    assert set(published) == set(back)
    assert all(np.array_equal(published[name], back[name]) for name in published)
