"""A checkpoint to a file that other runtimes run: MindIR, ONNX, and ONNX in 8-bit integers.

All take uint8 images (N, H, W, 3) in RGB, any N, and give logits: normalisation is inside, softmax is not. MindIR holds
MindSpore's standard operators; the ONNX graph is the one of :mod:`mbv2.weights.onnx_graph`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import TrainError
from imnet_prep.files import rename
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.types import ProgressCallback
from mbv2.outputs import check_outputs
from mbv2.runtime import start_mindspore
from mbv2.scoring.evaluate import Evaluation, open_evaluation
from mbv2.scoring.score import network_predict
from mbv2.weights.checkpoint import Checkpoint, build_network, read_checkpoint
from mbv2.weights.onnx_graph import onnx_model

FORMATS = ("mindir", "onnx", "onnx-int8")
CALIBRATION_IMAGES = 128
CHECK_IMAGES = 256  # that are scored with both
COMPARED_IMAGES, COMPARED_BATCHES = 50, (1, 7)  # images and batch sizes at which logits are compared
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
    check_images: int = CHECK_IMAGES,
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
        check_images: Most images of it that both are scored on, spread over the split.
        stop: Says whether to leave.
        progress: Called after each scored batch.

    Raises:
        TrainError: Unknown format, missing library or missing ``calibrate``, or the file cannot be written.
        CheckpointError: The checkpoint is not usable.
        RecordsError: ``calibrate`` is not usable, or ``out`` lies in a records folder.
        Interrupted: ``stop`` said so.
    """
    _check_request(kind, out, calibrate, check_images)
    start_mindspore()
    loaded = read_checkpoint(checkpoint)
    records = None if calibrate is None else open_evaluation(loaded, calibrate, split)
    if kind == "mindir":
        _write_mindir(loaded, out)
        run = _run_mindir(out)
    else:
        run = _write_onnx(loaded, kind, out, records)
    plain = network_predict(build_network(loaded))
    if records is None:
        size = loaded.meta.image_size
        noise = np.random.default_rng(0).integers(0, 256, (max(COMPARED_BATCHES), size, size, 3), dtype=np.uint8)
        return ExportResult(out, kind, out.stat().st_size, _compare(plain, run, noise))
    images = np.concatenate([batch.image for batch in records.spread(COMPARED_IMAGES)[0]])
    difference = _compare(plain, run, images)
    before, after = (
        records.score(predict, most=check_images, stop=stop, progress=progress) for predict in (plain, run)
    )
    return ExportResult(out, kind, out.stat().st_size, difference, before.images, before.correct1, after.correct1)


def _check_request(kind: str, out: Path, calibrate: Path | None, check_images: int) -> None:
    check_outputs(out)
    if kind not in FORMATS:
        raise TrainError("unknown --format", expected=f"one of {', '.join(FORMATS)}", got=repr(kind))
    if kind == "onnx-int8" and calibrate is None:
        raise TrainError(
            "onnx-int8 needs images to choose its ranges by", remedy="give a records folder with --calibrate"
        )
    if kind == "mindir" and out.suffix != ".mindir":
        raise TrainError(f"MindSpore reads back only files named .mindir, not {out.name}", remedy="name it so")
    if check_images < 1:
        raise TrainError("--check-images", expected="1 or more", got=f"{check_images}")
    if calibrate is not None:
        RecordsFolder.open(calibrate)  # a folder that is none is said before MindSpore is started


def _compare(one: Run, two: Run, images: NDArray[np.uint8]) -> float:
    batches = [images[at : at + count] for count in COMPARED_BATCHES for at in range(0, len(images), count)]
    return max(float(np.abs(one(batch) - two(batch)).max()) for batch in batches)


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
        rename(partial, out)
    except OSError as error:
        raise TrainError(f"cannot write {out}", got=error.strerror or str(error)) from error


def _run_mindir(path: Path) -> Run:
    import mindspore as ms

    return network_predict(ms.nn.GraphCell(ms.load(str(path))))


# --- ONNX ------------------------------------------------------------------------------------------------------------


def _write_onnx(loaded: Checkpoint, kind: str, out: Path, records: Evaluation | None) -> Run:
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
        if records is not None and kind == "onnx-int8":
            _quantise(partial, records)
        rename(partial, out)
    except OSError as error:
        raise TrainError(f"cannot write {out}", got=error.strerror or str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])

    def run(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {"image": image})[0]
        return logits

    return run


def _quantise(path: Path, records: Evaluation) -> None:
    """Replace a float model by its 8-bit twin: weights per channel, ranges of activations from images.

    Depthwise channels differ in range by orders of magnitude, so one scale for a whole tensor would lose them. The stem
    and the first block stay in float: their few channels carry the whole image. Weights are unsigned: on x86 without
    VNNI, signed ones saturate where products are added up.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(path),
        str(path),
        _Calibration(batch.image for batch in records.spread(CALIBRATION_IMAGES)[0]),
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


class _Calibration:
    """What onnxruntime asks for images; the name of the method is its own."""

    def __init__(self, images: Iterator[NDArray[np.uint8]]) -> None:
        self.images = images

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """Return the next image by input name, or None at the end."""
        image = next(self.images, None)
        return None if image is None else {"image": image}
