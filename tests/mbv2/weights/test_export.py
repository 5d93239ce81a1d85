"""Exported files give what the checkpoint gives."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from imnet_prep.errors import CheckpointError, RecordsError, TrainError
from mbv2.network.model import MobileNetV2, ModelConfig
from mbv2.weights.checkpoint import Meta, parameter_tensors, save_checkpoint
from mbv2.weights.export import export_checkpoint
from tests.mbv2.conftest import few_photographs
from tests.mbv2.small_network import STAGES
from tests.records import make_records
from tests.synthetic import WNIDS

SIZE = 32


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build few layers in a test; the published weights need them all."""
    monkeypatch.setattr("mbv2.network.model._STAGES", STAGES)


@pytest.fixture(scope="module", params=["symmetric", "same"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with statistics and scales that folding must not get wrong."""
    padding = str(request.param)
    config = ModelConfig(classes=3, width=0.35, padding=padding, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7), bn_eps=1e-3)
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbv2.network.model._STAGES", STAGES)
        tensors = parameter_tensors(MobileNetV2(config, kernels="standard").get_parameters())
    for name, value in tensors.items():
        if name.endswith(("gamma", "moving_variance")):
            tensors[name] = (value * rng.uniform(0.5, 1.5, value.shape)).astype(np.float32)
        elif name.endswith(("beta", "moving_mean")):
            tensors[name] = rng.normal(0, 0.2, value.shape).astype(np.float32)
        elif name.startswith("classifier."):
            tensors[name] = rng.normal(0, 1, value.shape).astype(np.float32)
    path = tmp_path_factory.mktemp("export") / "small.ckpt"
    meta = Meta(asdict(config), WNIDS[:3], image_size=SIZE, eval_crop=0.875, batch_size=8)
    save_checkpoint(path, tensors, meta)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("checkpoint", "kind"),
    [
        ("symmetric", "mindir"),
        ("symmetric", "onnx"),
        ("same", "onnx"),
        pytest.param("same", "mindir", marks=pytest.mark.long),
    ],
    indirect=["checkpoint"],
)
def test_the_file_gives_the_checkpoint_s_logits_at_batch_1_and_7(checkpoint: Path, kind: str, tmp_path: Path) -> None:
    result = export_checkpoint(checkpoint, kind, tmp_path / f"net.{kind}")
    assert result.max_difference < 1e-4
    assert result.size_bytes == (tmp_path / f"net.{kind}").stat().st_size > 600_000
    assert [path.name for path in tmp_path.iterdir()] == [f"net.{kind}"]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_onnx_carries_class_names_any_batch_and_no_softmax(checkpoint: Path, tmp_path: Path) -> None:
    import onnx

    export_checkpoint(checkpoint, "onnx", tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Softmax", "LogSoftmax", "BatchNormalization"})
    assert {entry.key: entry.value for entry in model.metadata_props}["classes"] == "\n".join(WNIDS[:3])
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["N", SIZE, SIZE, 3]


@pytest.mark.usefixtures("small")
def test_what_cannot_be_exported_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="mindir, onnx, onnx-int8"):
        export_checkpoint(checkpoint, "tflite", tmp_path / "net")
    with pytest.raises(TrainError, match="--calibrate"):
        export_checkpoint(checkpoint, "onnx-int8", tmp_path / "net.onnx")
    with pytest.raises(RecordsError, match="absent"):
        export_checkpoint(checkpoint, "onnx-int8", tmp_path / "net.onnx", calibrate=tmp_path / "absent")
    with pytest.raises(TrainError, match="existing folder"):
        export_checkpoint(checkpoint, "onnx", tmp_path / "absent" / "net.onnx")
    with pytest.raises(TrainError, match=r"named \.mindir"):
        export_checkpoint(checkpoint, "mindir", tmp_path / "net.bin")
    with pytest.raises(TrainError, match="--check-images; expected 1 or more; got 0"):
        export_checkpoint(checkpoint, "onnx", tmp_path / "net.onnx", check_images=0)
    other = make_records(tmp_path / "made", classes=4, per_class=2)
    with pytest.raises(CheckpointError, match=r"other classes.*which has 3"):
        export_checkpoint(checkpoint, "onnx-int8", tmp_path / "net.onnx", calibrate=other)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("kind", "count"),
    [("onnx", 5), *(pytest.param(kind, 50, marks=pytest.mark.long) for kind in ("mindir", "onnx"))],
)
def test_exported_published_weights_agree_on_photographs(
    kind: str, count: int, shared_data: Path, timm: Path, tmp_path: Path
) -> None:
    photographs = few_photographs(shared_data, tmp_path, count)
    result = export_checkpoint(timm, kind, tmp_path / f"net.{kind}", calibrate=photographs, check_images=count - 1)
    assert result.max_difference < 1e-4  # at batch sizes 1 and 7
    assert (result.images, result.correct1_after) == (-(-count // 2), result.correct1_before)  # every second image


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("checkpoint", ["symmetric"], indirect=True)
def test_eight_bits_leave_first_block_and_logits_and_scale_each_channel(checkpoint: Path, tmp_path: Path) -> None:
    import onnx

    records = make_records(tmp_path / "made", classes=3, per_class=4)
    result = export_checkpoint(checkpoint, "onnx-int8", tmp_path / "net.onnx", calibrate=records)
    graph = onnx.load(tmp_path / "net.onnx").graph
    made_by = {node.output[0]: node for node in graph.node}
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    weights = {node.name: node.input[1] for node in graph.node if node.op_type == "Conv"}
    plain = {name for name, weight in weights.items() if weight not in made_by}
    assert plain == {"stem.conv", "blocks.0.depthwise.conv", "blocks.0.project.conv"}
    scales = [sizes[made_by[weight].input[1]] for name, weight in weights.items() if name not in plain]
    assert len(scales) == 7
    assert all(scale and scale[0] > 1 for scale in scales)  # one for each channel
    assert made_by[graph.output[0].name].op_type == "Gemm"  # logits in 256 steps would tie
    assert 1e-3 < result.max_difference < 0.2  # measured: 0.1
    assert result.images == 12  # whose classes an untrained network guesses, so that scores say nothing


@pytest.mark.long
@pytest.mark.real_data
@pytest.mark.parametrize(("count", "lost"), [(25, 1), (250, 3)])
def test_eight_bits_lose_few_photographs(count: int, lost: int, shared_data: Path, timm: Path, tmp_path: Path) -> None:
    photographs = few_photographs(shared_data, tmp_path, count)
    result = export_checkpoint(timm, "onnx-int8", tmp_path / "net.onnx", calibrate=photographs)
    assert result.correct1_after >= result.correct1_before - lost
