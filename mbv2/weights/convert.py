"""Weights of other projects, brought in, and ours brought to timm: every tensor accounted for."""

import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imnet_prep import catalog
from imnet_prep.errors import CheckpointError, TrainError
from imnet_prep.files import write_atomically
from mbv2.outputs import check_outputs
from mbv2.recipe import IMAGE_SIZES
from mbv2.weights.checkpoint import (
    Meta,
    Tensors,
    check_complete,
    load_parameters,
    read_checkpoint,
    read_tensors,
    save_checkpoint,
)
from mbv2.weights.names import source_name

if TYPE_CHECKING:
    from mbv2.network.model import ModelConfig  # it imports MindSpore

TARGETS = ("timm",)
# Entries that are no weights: PyTorch's BatchNorm counter, MindSpore's optimiser state and counters.
_NO_WEIGHTS = re.compile(r".*\.num_batches_tracked|moments\..*|accum\..*|(learning_rate|momentum|global_step|.*_num)")
_TIMM_WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.4)
_logger = logging.getLogger(__name__)
WIDTHS = tuple(round(0.35 + 0.05 * step, 2) for step in range(22))  # 0.35 to 1.40


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How foreign weights are to be read. Where padding or normalisation is None, :mod:`mbv2.weights.origin` tells it.

    Attributes:
        padding: ``symmetric`` (PyTorch, MindSpore) or ``same`` (weights that come from TensorFlow), or None.
        mean: Subtracted from RGB in 0..1, or None.
        std: Divides RGB after that, or None.
        bn_eps: BatchNorm's epsilon, or None for 1e-3 with ``same`` padding (TensorFlow's) and 1e-5 otherwise.
        image_size: Side of the input, in pixels.
        eval_crop: Side of the centre crop as a share of the resized short side.
    """

    padding: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    bn_eps: float | None = None
    image_size: int = 224
    eval_crop: float = 0.875

    def __post_init__(self) -> None:
        low, high = IMAGE_SIZES
        if not low <= self.image_size <= high:
            raise TrainError("--image-size is out of range", expected=f"{low} to {high}", got=f"{self.image_size}")


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What was brought in.

    Attributes:
        checkpoint: The file written.
        tensors: Tensors of the network, all found.
        dropped: Entries of the source that are no weights (counters, optimiser state).
        model: Width and class count, found from the shapes; padding and normalisation.
        assumed: What of ``padding``, ``mean`` and ``std`` was not given.
        why: What it was told from.
    """

    checkpoint: Path
    tensors: int
    dropped: tuple[str, ...]
    model: "ModelConfig"
    assumed: tuple[str, ...]
    why: str

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 convert --json`` prints."""
        model = {name: getattr(self.model, name) for name in ("width", "classes", "padding", "mean", "std", "bn_eps")}
        counts = {"tensors": self.tensors, "dropped": len(self.dropped)}
        return {"checkpoint": str(self.checkpoint), **counts, **model, "assumed": list(self.assumed)}

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        model = self.model
        return [
            ("checkpoint", str(self.checkpoint)),
            ("tensors", f"{self.tensors}, every one found"),
            *([("dropped", f"{len(self.dropped)} that are no weights")] if self.dropped else []),
            ("width", f"{model.width:g}"),
            ("classes", str(model.classes)),
            ("padding", model.padding),
            ("mean, std", f"{model.mean}, {model.std} of RGB in 0..1"),
            ("BatchNorm eps", f"{model.bn_eps:g}"),
            *([("assumed", f"{', '.join(self.assumed)}: {self.why}")] if self.assumed else []),
        ]


@dataclass(frozen=True, slots=True)
class ReturnResult:
    """What was written for another project.

    Attributes:
        file: The file written.
        tensors: Tensors in it.
        model: Python that makes the model which they fit.
        mean: Subtracted from RGB in 0..1 before it. std: Divides RGB after that.
        image_size: Side of the input, in pixels.
    """

    file: Path
    tensors: int
    model: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 convert --to --json`` prints."""
        return {**asdict(self), "file": str(self.file)}

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        return [
            ("file", f"{self.file} ({self.tensors} tensors)"),
            ("model", self.model),
            ("mean, std", f"{self.mean}, {self.std} of RGB in 0..1"),
            ("image size", str(self.image_size)),
        ]


def convert_weights(weights: Path, source: str, out: Path, options: ConvertOptions) -> ConvertResult:
    """Bring foreign weights into a checkpoint of ours.

    Args:
        weights: ``.safetensors``, ``.pth`` (needs PyTorch) or ``.ckpt``.
        source: One of :data:`mbv2.weights.names.SOURCES`.
        out: The checkpoint to write.
        options: Padding and preprocessing.

    Raises:
        CheckpointError: Unknown source, unreadable file, or tensors that are not MobileNetV2's, each accounted for.
        RecordsError: ``out`` lies in a records folder.
    """
    from mbv2.runtime import start_mindspore

    check_outputs(out)
    source_name(source, "classifier.weight")  # an unknown source is refused before anything is read
    start_mindspore()
    from mbv2.network.model import MobileNetV2, ModelConfig
    from mbv2.weights.origin import assume

    found = {_plain(name): value for name, value in _read(weights).items()}
    dropped = tuple(sorted(name for name in found if _NO_WEIGHTS.fullmatch(name)))
    found = {name: value for name, value in found.items() if name not in dropped}
    width, classes = _shape(found, source, weights)
    shape = ModelConfig(classes=classes, width=width)
    net = MobileNetV2(shape, kernels="standard")
    want = {source_name(source, p.name): tuple(p.shape) for p in net.get_parameters()}
    check_complete({name: value.shape for name, value in found.items()}, want, str(weights))
    tensors = {p.name: found[source_name(source, p.name)].astype(np.float32) for p in net.get_parameters()}
    load_parameters(net.get_parameters(), tensors, str(weights))
    stem = (tensors[f"stem.{name}"] for name in ("conv.weight", "bn.moving_mean", "bn.moving_variance"))
    told = assume(weights.name, *stem)
    given: dict[str, Any] = {"padding": options.padding, "mean": options.mean, "std": options.std}
    assumed = tuple(name for name, value in given.items() if value is None)
    if assumed and told.doubt:
        _logger.warning("%s: %s assumed: %s; %s", weights, ", ".join(assumed), told.why, told.doubt)
    fields = {name: getattr(told, name) if value is None else value for name, value in given.items()}
    config = replace(shape, **fields, bn_eps=options.bn_eps or (1e-3 if fields["padding"] == "same" else 1e-5))
    meta = Meta(
        model=asdict(config),
        class_names=tuple(synset.wnid for synset in catalog.synsets()) if classes == 1000 else (),
        image_size=options.image_size,
        eval_crop=options.eval_crop,
        origin=f"{source}: {weights.name}",
    )
    save_checkpoint(out, tensors, meta)
    return ConvertResult(out, len(tensors), dropped, config, assumed, told.why)


def return_weights(checkpoint: Path, target: str, out: Path) -> ReturnResult:
    """Write a checkpoint's weights (the averaged ones where there are any) as another project's ``.safetensors``.

    Args:
        checkpoint: One of ours.
        target: One of :data:`TARGETS`.
        out: The file to write.

    Raises:
        CheckpointError: Unknown target, unusable checkpoint, or the disk does not take the file.
        RecordsError: ``out`` lies in a records folder.
    """
    from safetensors.numpy import save

    check_outputs(out)
    if target not in TARGETS:
        raise CheckpointError("unknown --to", expected=f"one of {', '.join(TARGETS)}", got=repr(target))
    if out.suffix != ".safetensors":
        raise CheckpointError(f"cannot write {out}", expected="a name ending in .safetensors", got=out.suffix or "none")
    loaded = read_checkpoint(checkpoint)
    config = loaded.meta.model_config()
    tensors = {source_name(target, name): value for name, value in loaded.weights().items()}
    about = {"padding": config.padding, "bn_eps": f"{config.bn_eps:g}", "classes": "\n".join(loaded.meta.class_names)}
    try:
        write_atomically(out, save(tensors, {"format": "pt", **about}))
    except OSError as error:
        raise CheckpointError(f"cannot write {out}", got=error.strerror or str(error)) from error
    model = _timm_model(config.width, config.classes, config.padding, config.bn_eps)
    return ReturnResult(out, len(tensors), model, config.mean, config.std, loaded.meta.image_size)


def _timm_model(width: float, classes: int, padding: str, bn_eps: float) -> str:
    """Return the call that makes timm's model: of five widths by name, of others by what makes those."""
    padded = ", pad_type='same'" if padding == "same" else ""
    rest = f"num_classes={classes}{padded}, bn_eps={bn_eps:g}"
    if width in _TIMM_WIDTHS:
        return f"timm.create_model('mobilenetv2_{round(100 * width):03d}', {rest})"
    return f"timm.models.efficientnet._gen_mobilenet_v2('mobilenetv2_100', channel_multiplier={width:g}, {rest})"


def _plain(name: str) -> str:
    """Take off what wrappers put before a name."""
    return re.sub(r"^(module|network|backbone|head(?=\.dense))\.", "", name)


def _read(path: Path) -> Tensors:
    if path.suffix == ".ckpt":
        return read_tensors(path)[0]
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_torch(path)
    raise CheckpointError(f"unknown kind of weights: {path}", expected="a name ending in .safetensors, .pth or .ckpt")


def _read_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(path.read_bytes()))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", got=error.strerror or str(error)) from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file", got=str(error)) from error


def _read_torch(path: Path) -> Tensors:
    import pickle

    try:
        import torch
    except ImportError as error:
        remedy = "pip install torch, or save the weights as .safetensors"
        raise CheckpointError(f"reading {path} needs PyTorch, which is not installed", remedy=remedy) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name: value.float().numpy() for name, value in state.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", got=error.strerror or str(error)) from error
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not a PyTorch state dict", got=str(error)) from error


def _shape(found: Tensors, source: str, path: Path) -> tuple[float, int]:
    """Find width and class count from the shapes."""
    from mbv2.network.model import block_shapes, feature_count

    stem, last, dense = (
        found.get(source_name(source, name))
        for name in ("stem.conv.weight", "blocks.16.project.conv.weight", "classifier.weight")
    )
    if stem is None or last is None or dense is None or dense.ndim != 2:
        expected = ", ".join(source_name(source, name) for name in ("stem.conv.weight", "classifier.weight"))
        got = ", ".join(sorted(found)[:3]) or "no tensors"
        raise CheckpointError(f"{path} holds no MobileNetV2 of {source}", expected=expected, got=got)
    for width in sorted(WIDTHS, key=lambda value: abs(value - 1)):
        shapes = block_shapes(width)
        ends = (shapes[0].inputs, shapes[-1].outputs, feature_count(width))
        if ends == (stem.shape[0], last.shape[0], dense.shape[1]) and _fits(found, source, width):
            return width, int(dense.shape[0])
    got = f"stem {stem.shape[0]}, last block {last.shape[0]}, features {dense.shape[1]}"
    raise CheckpointError(f"{path}: channels of no known width", expected="width 0.35 to 1.4", got=got)


def _fits(found: Tensors, source: str, width: float) -> bool:
    from mbv2.network.model import block_shapes

    names = (source_name(source, f"blocks.{index}.project.conv.weight") for index in range(17))
    pairs = zip(names, block_shapes(width), strict=True)
    return all(name not in found or found[name].shape[0] == shape.outputs for name, shape in pairs)
