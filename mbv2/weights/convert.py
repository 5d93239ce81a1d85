"""Weights of other projects, brought in: names mapped by table, every tensor accounted for.

BatchNorm's entries are called ``weight, bias, running_mean, running_var`` in PyTorch and ``gamma, beta, moving_mean,
moving_variance`` in MindSpore; convolutions are OIHW in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imnet_prep import catalog
from imnet_prep.errors import CheckpointError, TrainError
from mbv2.outputs import check_outputs
from mbv2.recipe import IMAGE_SIZES
from mbv2.weights.checkpoint import Meta, Tensors, check_complete, load_parameters, read_tensors, save_checkpoint

SOURCES = ("timm", "torchvision", "mindcv", "mindspore-models")
_TORCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_REPEATS = (1, 2, 3, 4, 3, 3, 1)  # blocks a stage, for timm's stage.block names
# Entries that are no weights: PyTorch's BatchNorm counter, MindSpore's optimiser state and counters.
_NO_WEIGHTS = re.compile(r".*\.num_batches_tracked|moments\..*|accum\..*|(learning_rate|momentum|global_step|.*_num)")
WIDTHS = tuple(round(0.35 + 0.05 * step, 2) for step in range(22))  # 0.35 to 1.40


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How foreign weights are to be read; nothing in most files says it.

    Attributes:
        padding: ``symmetric`` (PyTorch, MindSpore) or ``same`` (weights that come from TensorFlow).
        mean: Subtracted from RGB in 0..1, or None for ImageNet's.
        std: Divides RGB after that, or None for ImageNet's.
        bn_eps: BatchNorm's epsilon, or None for 1e-3 with ``same`` padding (TensorFlow's) and 1e-5 otherwise.
        image_size: Side of the input, in pixels.
        eval_crop: Side of the centre crop as a share of the resized short side.
    """

    padding: str = "symmetric"
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
        width: Found from the shapes.
        classes: Rows of the classifier.
    """

    checkpoint: Path
    tensors: int
    dropped: tuple[str, ...]
    width: float
    classes: int

    def to_json(self) -> dict[str, Any]:
        """Return what ``mbv2 convert --json`` prints."""
        return {**asdict(self), "checkpoint": str(self.checkpoint), "dropped": len(self.dropped)}

    def rows(self) -> list[tuple[str, str]]:
        """Return the same as lines for a person."""
        return [
            ("checkpoint", str(self.checkpoint)),
            ("tensors", f"{self.tensors}, every one found"),
            ("dropped", f"{len(self.dropped)} that are no weights"),
            ("width", f"{self.width:g}"),
            ("classes", str(self.classes)),
        ]


# --- names: ours -> theirs -----------------------------------------------------------------------------------------


def _timm(name: str) -> str:
    unit, kind, entry = _parts(name)
    if unit == "classifier":
        return name
    tail = "weight" if kind == "conv" else _TORCH_NORM[entry]
    if unit in ("stem", "head"):
        conv, norm = ("conv_stem", "bn1") if unit == "stem" else ("conv_head", "bn2")
        return f"{conv if kind == 'conv' else norm}.{tail}"
    index, part = unit.split(".")[1:]
    stage, block = _stage(int(index))
    names = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
    if index == "0":
        names = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
    return f"blocks.{stage}.{block}.{names[part][kind != 'conv']}.{tail}"


def _torchvision(name: str) -> str:
    unit, kind, entry = _parts(name)
    if unit == "classifier":
        return f"classifier.1.{entry}"
    tail = "weight" if kind == "conv" else _TORCH_NORM[entry]
    step = int(kind != "conv")
    if unit in ("stem", "head"):
        return f"features.{0 if unit == 'stem' else 18}.{step}.{tail}"
    index, part = unit.split(".")[1:]
    place = _place(index, part)
    inner = f"{place + step}" if part == "project" else f"{place}.{step}"
    return f"features.{int(index) + 1}.conv.{inner}.{tail}"


def _mindcv(name: str) -> str:
    unit, kind, entry = _parts(name)
    if unit == "classifier":
        return f"classifier.1.{entry}"
    step = int(kind != "conv")
    if unit in ("stem", "head"):
        return f"features.{(0 if unit == 'stem' else 20) + step}.{entry}"
    index, part = unit.split(".")[1:]
    return f"features.{int(index) + 3}.layers.{3 * _place(index, part) + step}.{entry}"


def _mindspore_models(name: str) -> str:
    unit, kind, entry = _parts(name)
    if unit == "classifier":
        return f"dense.{entry}"
    step = int(kind != "conv")
    if unit in ("stem", "head"):
        return f"features.{0 if unit == 'stem' else 18}.features.{step}.{entry}"
    index, part = unit.split(".")[1:]
    place = _place(index, part)
    inner = f"{place + step}" if part == "project" else f"{place}.features.{step}"
    return f"features.{int(index) + 1}.conv.{inner}.{entry}"


def _parts(name: str) -> tuple[str, str, str]:
    """Split ``blocks.3.expand.bn.gamma`` into unit, kind and entry."""
    unit, _, rest = name.rpartition(".conv.") if ".conv." in name else name.rpartition(".bn.")
    if unit:
        return unit, "conv" if ".conv." in name else "bn", rest
    unit, _, entry = name.rpartition(".")
    return unit, "dense", entry


def _stage(index: int) -> tuple[int, int]:
    for stage, repeats in enumerate(_REPEATS):
        if index < repeats:
            return stage, index
        index -= repeats
    raise AssertionError(index)


def _place(index: str, part: str) -> int:
    """Return a unit's place in its block; block 0 has no expansion."""
    return ("expand", "depthwise", "project").index(part) - (index == "0")


_TABLES: dict[str, Callable[[str], str]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "mindcv": _mindcv,
    "mindspore-models": _mindspore_models,
}


def source_name(source: str, name: str) -> str:
    """Return the name that one of our parameters has in another project.

    Raises:
        CheckpointError: Unknown source.
    """
    if source not in _TABLES:
        raise CheckpointError("unknown --from", expected=f"one of {', '.join(SOURCES)}", got=repr(source))
    return _TABLES[source](name)


# --- the work ------------------------------------------------------------------------------------------------------


def convert_weights(weights: Path, source: str, out: Path, options: ConvertOptions) -> ConvertResult:
    """Bring foreign weights into a checkpoint of ours.

    Args:
        weights: ``.safetensors``, ``.pth`` (needs PyTorch) or ``.ckpt``.
        source: One of :data:`SOURCES`.
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
    from mbv2.network.model import IMAGENET_MEAN, IMAGENET_STD, MobileNetV2, ModelConfig

    found = {_plain(name): value for name, value in _read(weights).items()}
    dropped = tuple(sorted(name for name in found if _NO_WEIGHTS.fullmatch(name)))
    found = {name: value for name, value in found.items() if name not in dropped}
    width, classes = _shape(found, source, weights)
    config = ModelConfig(
        classes=classes,
        width=width,
        padding=options.padding,
        mean=options.mean or IMAGENET_MEAN,
        std=options.std or IMAGENET_STD,
        bn_eps=options.bn_eps or (1e-3 if options.padding == "same" else 1e-5),
    )
    net = MobileNetV2(config, kernels="standard")
    want = {source_name(source, p.name): tuple(p.shape) for p in net.get_parameters()}
    check_complete({name: value.shape for name, value in found.items()}, want, str(weights))
    tensors = {p.name: found[source_name(source, p.name)].astype(np.float32) for p in net.get_parameters()}
    load_parameters(net.get_parameters(), tensors, str(weights))
    meta = Meta(
        model=asdict(config),
        class_names=tuple(synset.wnid for synset in catalog.synsets()) if classes == 1000 else (),
        image_size=options.image_size,
        eval_crop=options.eval_crop,
        origin=f"{source}: {weights.name}",
    )
    save_checkpoint(out, tensors, meta)
    return ConvertResult(out, len(tensors), dropped, width, classes)


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
