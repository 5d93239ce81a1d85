"""What other projects call our parameters, by rule: ours -> theirs.

BatchNorm's entries are called ``weight, bias, running_mean, running_var`` in PyTorch and ``gamma, beta, moving_mean,
moving_variance`` in MindSpore; convolutions are OIHW in both.
"""

from collections.abc import Callable

from imnet_prep.errors import CheckpointError

SOURCES = ("timm", "torchvision", "mindcv", "mindspore-models")
_TORCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_REPEATS = (1, 2, 3, 4, 3, 3, 1)  # blocks a stage, for timm's stage.block names


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
