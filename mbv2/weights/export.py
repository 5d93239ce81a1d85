"""A checkpoint to a file that other runtimes run: MindIR, ONNX, and ONNX in 8-bit integers.

All take uint8 images (N, H, W, 3) in RGB, any N, and give logits: normalisation is inside, softmax is not. MindIR holds
MindSpore's standard operators. The ONNX graph is written here, operator by operator, with BatchNorm folded into the
convolutions: MindSpore 2.10's own ONNX export does not take this network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import TrainError
from imnet_prep.loader.batches import open_batches
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.types import ProgressCallback
from mbv2.data import eval_options, split_images
from mbv2.outputs import check_outputs
from mbv2.runtime import start_mindspore
from mbv2.scoring.score import check_classes, network_predict, score_batches
from mbv2.weights.checkpoint import Checkpoint, build_network, read_checkpoint

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

    from mbv2.network.model import ModelConfig

FORMATS = ("mindir", "onnx", "onnx-int8")
OPSET = 13  # the oldest with per-channel QuantizeLinear: runtimes of 2021 and later read it
IR_VERSION = 8
CALIBRATION_IMAGES = 128
CHECK_IMAGES, CHECK_BATCHES = 50, (1, 7)  # images, and batch sizes, on which the file is compared with the checkpoint
Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was exported, and how it compares.

    Attributes:
        file: The file written.
        format: One of :data:`FORMATS`.
        size_bytes: Its size.
        max_difference: Largest difference of a logit from the checkpoint's, at batch sizes 1 and 7.
        images: Images scored with both, 0 without ``calibrate``.
        correct1_before: Of the checkpoint.
        correct1_after: Of the exported file.
    """

    file: Path
    format: str
    size_bytes: int
    max_difference: float
    images: int = 0
    correct1_before: int = 0
    correct1_after: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 export --json`` prints."""
        return {**asdict(self), "file": str(self.file)}

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        rows = [
            ("file", f"{self.file} ({self.size_bytes / 1e6:.1f} MB)"),
            ("largest difference", f"{self.max_difference:.3g} in a logit, at batch sizes 1 and 7"),
        ]
        if self.images:
            before, after = self.correct1_before / self.images, self.correct1_after / self.images
            rows.append(("top-1", f"{before:.4f} before, {after:.4f} after, on {self.images} images"))
        return rows


def export_checkpoint(
    checkpoint: Path,
    kind: str,
    out: Path,
    *,
    calibrate: Path | None = None,
    split: str = "val",
    stop: Callable[[], bool] = lambda: False,
    progress: ProgressCallback | None = None,
) -> ExportResult:
    """Write a checkpoint in another format, run both, and compare: on images of ``calibrate``, else on random ones.

    Args:
        checkpoint: One of ours.
        kind: One of :data:`FORMATS`.
        out: The file to write.
        calibrate: A records folder: needed by ``onnx-int8`` to choose ranges; where given, both are scored on it.
        split: The split of ``calibrate``.
        stop: Says whether to leave.
        progress: Called after each scored batch.

    Raises:
        TrainError: Unknown format, missing library or missing ``calibrate``, or the file cannot be written.
        CheckpointError: The checkpoint is not usable.
        RecordsError: ``calibrate`` is not usable, or ``out`` lies in a records folder.
        Interrupted: ``stop`` said so.
    """
    check_outputs(out)
    if kind not in FORMATS:
        raise TrainError("unknown --format", expected=f"one of {', '.join(FORMATS)}", got=repr(kind))
    if kind == "onnx-int8" and calibrate is None:
        raise TrainError(
            "onnx-int8 needs images to choose its ranges by", remedy="give a records folder with --calibrate"
        )
    if kind == "mindir" and out.suffix != ".mindir":
        raise TrainError(f"MindSpore reads back only files named .mindir, not {out.name}", remedy="name it so")
    if calibrate is not None:
        RecordsFolder.open(calibrate)  # a folder that is none is said before anything is written
    start_mindspore()
    loaded = read_checkpoint(checkpoint)
    if kind == "mindir":
        _write_mindir(loaded, out)
        run = _run_mindir(out)
    else:
        run = _write_onnx(loaded, kind, out, calibrate, split)
    plain = network_predict(build_network(loaded))
    difference = _compare(plain, run, _check_images(loaded, calibrate, split))
    if calibrate is None:
        return ExportResult(out, kind, out.stat().st_size, difference)
    counts = [_score(calibrate, split, loaded, predict, stop, progress) for predict in (plain, run)]
    return ExportResult(out, kind, out.stat().st_size, difference, counts[0][0], counts[0][1], counts[1][1])


def _check_images(loaded: Checkpoint, records: Path | None, split: str) -> NDArray[np.uint8]:
    size = loaded.meta.image_size
    if records is None:
        return np.random.default_rng(0).integers(0, 256, (max(CHECK_BATCHES), size, size, 3), dtype=np.uint8)
    return np.concatenate(list(_spread_images(records, split, loaded, CHECK_IMAGES)))


def _compare(one: Run, two: Run, images: NDArray[np.uint8]) -> float:
    batches = [images[at : at + count] for count in CHECK_BATCHES for at in range(0, len(images), count)]
    return max(float(np.abs(one(batch) - two(batch)).max()) for batch in batches)


def _score(
    records: Path,
    split: str,
    loaded: Checkpoint,
    predict: Run,
    stop: Callable[[], bool],
    progress: ProgressCallback | None,
) -> tuple[int, int]:
    """Return the numbers of images and of correct guesses."""
    manifest, meta = RecordsFolder.open(records).manifest, loaded.meta
    total = split_images(manifest, records, split)
    check_classes(meta, manifest, loaded.path)
    options = eval_options(meta.batch_size, meta.image_size, meta.eval_crop)
    with open_batches(records, split, options, 0) as batches:
        scores = score_batches(
            predict,
            batches.epoch(0),
            classes=len(manifest.classes),
            batch_size=meta.batch_size,
            total=total,
            stop=stop,
            progress=progress,
        )
    return scores.images, scores.correct1


# --- MindIR ----------------------------------------------------------------------------------------------------------


def _write_mindir(loaded: Checkpoint, out: Path) -> None:
    import mindspore as ms

    net = build_network(loaded, kernels="standard")
    size = loaded.meta.image_size
    partial = out.with_name(f"{out.stem}.partial.mindir")
    try:
        partial.unlink(missing_ok=True)
        any_batch = ms.Tensor(shape=[None, size, size, 3], dtype=ms.uint8)
        ms.export(net, any_batch, file_name=str(partial), file_format="MINDIR")
        partial.chmod(0o644)
        partial.replace(out)
    except OSError as error:
        raise TrainError(f"cannot write {out}", got=error.strerror or str(error)) from error


def _run_mindir(path: Path) -> Run:
    import mindspore as ms

    return network_predict(ms.nn.GraphCell(ms.load(str(path))))


# --- ONNX ------------------------------------------------------------------------------------------------------------


def _write_onnx(loaded: Checkpoint, kind: str, out: Path, calibrate: Path | None, split: str) -> Run:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        remedy = "pip install 'imnet-prep[export]'"
        raise TrainError("ONNX export needs onnx and onnxruntime", got=str(error), remedy=remedy) from error
    model = onnx_model(loaded)
    partial = out.with_name(f"{out.stem}.partial.onnx")
    try:
        onnx.save(model, str(partial))
        if kind == "onnx-int8":
            assert calibrate is not None
            _quantise(partial, loaded, calibrate, split)
        partial.replace(out)
    except OSError as error:
        raise TrainError(f"cannot write {out}", got=error.strerror or str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])

    def run(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {"image": image})[0]
        return logits

    return run


class _Graph:
    """Collects the nodes and weights of an ONNX graph; each call adds a node and gives its output's name."""

    def __init__(self, tensors: dict[str, NDArray[Any]], eps: float, same: bool) -> None:
        self.tensors, self.eps, self.same = tensors, eps, same
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def unit(self, x: str, name: str, stride: int = 1, *, relu: bool = True) -> str:
        """Convolution with BatchNorm folded in, and ReLU6."""
        weight = self.tensors[f"{name}.conv.weight"].astype(np.float64)
        gamma, beta, mean, variance = (
            self.tensors[f"{name}.bn.{entry}"].astype(np.float64)
            for entry in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + self.eps)
        folded = (weight * scale[:, None, None, None]).astype(np.float32)
        inputs = [
            x,
            self.weight(f"{name}.weight", folded),
            self.weight(f"{name}.bias", (beta - mean * scale).astype(np.float32)),
        ]
        kernel = weight.shape[2]
        group = weight.shape[0] if weight.shape[1] == 1 else 1
        where: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if self.same else {"pads": [kernel // 2] * 4}
        conv = self.add(
            "Conv", inputs, f"{name}.conv", kernel_shape=[kernel] * 2, strides=[stride] * 2, group=group, **where
        )
        return self.add("Clip", [conv, "zero", "six"], f"{name}.relu6") if relu else conv


def onnx_model(loaded: Checkpoint) -> ModelProto:
    """Write the network as an ONNX model: uint8 (N, H, W, 3) to logits (N, classes)."""
    from onnx import TensorProto, checker, helper

    meta, config = loaded.meta, loaded.meta.model_config()
    graph = _Graph(loaded.weights(), config.bn_eps, config.padding == "same")
    size = meta.image_size
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", size, size, 3])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", config.classes])]
    _add_layers(graph, config)
    made: GraphProto = helper.make_graph(graph.nodes, "mobilenetv2", inputs, outputs, graph.weights)
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="imnet-prep",
    )
    helper.set_model_props(model, {"classes": "\n".join(meta.class_names), "origin": meta.origin})
    checker.check_model(model)
    return model


def _add_layers(graph: _Graph, config: ModelConfig) -> None:
    from onnx import TensorProto

    from mbv2.network.model import block_shapes

    graph.weight("zero", np.array(0, np.float32))
    graph.weight("six", np.array(6, np.float32))
    mean = graph.weight("mean", 255 * np.array(config.mean, np.float32))
    scale = graph.weight("scale", 1 / (255 * np.array(config.std, np.float32)))
    x = graph.add("Cast", ["image"], "pixels", to=TensorProto.FLOAT)
    x = graph.add("Mul", [graph.add("Sub", [x, mean], "centred"), scale], "normalised")
    x = graph.add("Transpose", [x], "planes", perm=[0, 3, 1, 2])
    x = graph.unit(x, "stem", 2)
    for index, shape in enumerate(block_shapes(config.width)):
        y = graph.unit(x, f"blocks.{index}.expand") if shape.hidden != shape.inputs else x
        y = graph.unit(y, f"blocks.{index}.depthwise", shape.stride)
        y = graph.unit(y, f"blocks.{index}.project", relu=False)
        x = graph.add("Add", [x, y], f"blocks.{index}.sum") if shape.residual else y
    x = graph.add("GlobalAveragePool", [graph.unit(x, "head")], "pool")
    x = graph.add("Flatten", [x], "pooled", axis=1)
    dense = [graph.weight(f"classifier.{entry}", graph.tensors[f"classifier.{entry}"]) for entry in ("weight", "bias")]
    graph.add("Gemm", [x, *dense], "logits", transB=1)


def _quantise(path: Path, loaded: Checkpoint, records: Path, split: str) -> None:
    """Replace a float model by its 8-bit twin: weights per channel, ranges of activations from images.

    Depthwise channels differ in range by orders of magnitude, so one scale for a whole tensor would lose them. The stem
    and the first block stay in float: their few channels carry the whole image. Weights are unsigned: on x86 without
    VNNI, signed ones saturate where products are added up.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(path),
        str(path),
        _Calibration(_spread_images(records, split, loaded, CALIBRATION_IMAGES)),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Add", "Gemm", "GlobalAveragePool", "Clip"],
        nodes_to_exclude=["stem.conv", "blocks.0.depthwise.conv", "blocks.0.project.conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "CalibMovingAverage": True,  # one odd image must not stretch a range
            # Logits in 256 steps would tie: 12 of 250 best guesses did.
            "OpTypesToExcludeOutputQuantization": ["Gemm"],
        },
    )


def _spread_images(records: Path, split: str, loaded: Checkpoint, most: int) -> Iterator[NDArray[np.uint8]]:
    """Yield up to ``most`` images, one a batch, spread over the split."""
    meta = loaded.meta
    manifest = RecordsFolder.open(records).manifest
    total = split_images(manifest, records, split)
    every = max(1, total // most)
    given = 0
    with open_batches(records, split, eval_options(1, meta.image_size, meta.eval_crop), 0) as batches:
        for number, batch in enumerate(batches.epoch(0)):
            if number % every == 0 and given < most:
                given += 1
                yield batch.image


class _Calibration:
    """What onnxruntime asks for images; the name of the method is its own."""

    def __init__(self, images: Iterator[NDArray[np.uint8]]) -> None:
        self.images = images

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Return the next image by input name, or None at the end."""
        image = next(self.images, None)
        return None if image is None else {"image": image}
