"""The configuration files of MindSpore's official MobileNetV2 trainer, read in its own words.

Source: github.com/mindspore-ai/models, official/cv/MobileNet/mobilenetv2, ``default_config.yaml`` and ``train.py``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from imnet_prep.errors import RecipeError

BASE_RECIPE = "official"
_RENAMED = {
    "batch_size": "batch_size",
    "epoch_size": "epochs",
    "lr_max": "lr",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "label_smooth": "label_smoothing",
}
# Keys that mean nothing here, and why.
_NOT_NEEDED = {
    "num_classes": "the records say how many classes there are",
    "num_workers": "the loader uses the cores that this process may use",
    "loss_scale": "training is in float32",
    "boost_mode": "not used",
    "save_checkpoint": "last.ckpt and best.ckpt are always kept",
    "save_checkpoint_epochs": "last.ckpt is written after every epoch; see --save-every",
    "save_checkpoint_path": "see --out",
    "keep_checkpoint_max": "two are kept: the last and the best",
    "checkpoint_path": "see --out",
    "run_eval": "every epoch is scored where the records have a val split",
    "run_distribute": "started under msrun, a run is distributed",
    "device_id": "msrun gives each process its device",
    "rank_id": "msrun gives each process its rank",
    "rank_size": "msrun gives the number of processes",
    "activation": "logits are exported, never softmax",
    "filter_head": "the head is replaced where the classes differ",
    "enable_cache": "records are read at the disk's speed",
    "cache_session_id": "records are read at the disk's speed",
    "lr_init": "the warm-up starts at zero",
    "is_training": "the command says what is done",
    "enable_profiling": "not used",
}
_IGNORED_PREFIXES = ("modelarts", "enable_modelarts", "need_modelarts")
_IGNORED_SUFFIXES = ("_url", "_export", "_postprocess", "_eval", "_path_export")
_IGNORED = (
    "data_path",
    "output_path",
    "load_path",
    "ckpt_file",
    "file_name",
    "file_format",
    "result_path",
    "label_path",
)
_OURS = ("config_path", "platform", "device_target", "dataset_path", "records", "pretrain_ckpt", "freeze_layer")
_SHAPED = ("image_height", "image_width", "warmup_epochs", "lr_end")
_PLACEHOLDERS = ("", "/cache/data")  # what the official files hold before a user fills them in


@dataclass(frozen=True, slots=True)
class OfficialConfig:
    """An official configuration in our terms.

    Attributes:
        fields: Of the recipe.
        records: The records folder, or None where the file names none.
        pretrained: The checkpoint to start from, or None.
        device_target: The device, or None.
        shown: For each key, what became of it.
    """

    fields: dict[str, Any]
    records: Path | None = None
    pretrained: Path | None = None
    device_target: str | None = None
    shown: list[tuple[str, str]] = field(default_factory=list)


def read_official(path: Path) -> OfficialConfig:
    """Read and translate a configuration file.

    Only the first YAML document counts; the official files describe their options in two more. ``config_path`` names a
    file that is read first.

    Raises:
        RecipeError: Unreadable, an unknown key (the known ones are listed), or a value that makes no sense.
    """
    keys = _read(path)
    if keys.get("config_path"):
        keys = {**_read(path.parent / str(keys["config_path"])), **keys}
    unknown = sorted(key for key in keys if not _known(key))
    if unknown:
        choices = ", ".join(sorted([*_RENAMED, *_OURS, *_SHAPED]))
        raise RecipeError(f"{path}: unknown key {unknown[0]!r}", expected=f"one of {choices}")
    fields, shown = _fields(keys, path)
    shown += [(key, f"not needed: {_NOT_NEEDED[key]}") for key in keys if key in _NOT_NEEDED]
    found: dict[str, Any] = {}
    for key, target in (("dataset_path", "records"), ("records", "records"), ("pretrain_ckpt", "pretrained")):
        text = str(keys.get(key) or "")
        if text not in _PLACEHOLDERS:
            found[target] = Path(text)
            shown.append((key, f"--{target} {text}"))
    for key in ("device_target", "platform"):
        if keys.get(key):
            found["device_target"] = str(keys[key])
            shown.append((key, f"--device-target {keys[key]}"))
    return OfficialConfig(fields, shown=shown, **found)


def _read(path: Path) -> dict[str, Any]:
    try:
        first = next(iter(yaml.safe_load_all(path.read_text(encoding="utf-8"))), None)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}", got=str(error)) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML", got=str(error)) from error
    if not isinstance(first, dict):
        raise RecipeError(f"{path} is no configuration", expected="a mapping of keys", got=type(first).__name__)
    return {str(key): value for key, value in first.items()}


def _known(key: str) -> bool:
    return (
        key in (*_RENAMED, *_OURS, *_SHAPED, *_NOT_NEEDED, *_IGNORED)
        or key.startswith(_IGNORED_PREFIXES)
        or key.endswith(_IGNORED_SUFFIXES)
    )


def _fields(keys: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    fields: dict[str, Any] = {}
    shown: list[tuple[str, str]] = []

    def put(key: str, name: str, value: Any) -> None:
        fields[name] = value
        shown.append((key, f"{name} {value}"))

    for key, name in _RENAMED.items():
        if key in keys:
            put(key, name, keys[key])
    if "lr_max" in keys:
        put("lr_max", "lr_batch_size", 0)  # the official trainer does not scale it
    if "warmup_epochs" in keys:
        put("warmup_epochs", "warmup_frac", _number(keys, "warmup_epochs", path) / _number(keys, "epoch_size", path))
    if "lr_end" in keys:
        put("lr_end", "final_lr_frac", _number(keys, "lr_end", path) / _number(keys, "lr_max", path))
    sides = [keys[key] for key in ("image_height", "image_width") if key in keys]
    if sides:
        if len(set(map(str, sides))) > 1:
            raise RecipeError(f"{path}: image_height and image_width", expected="the same", got=f"{sides}")
        put("image_height", "image_size", sides[0])
    if "freeze_layer" in keys:
        layer = str(keys["freeze_layer"] or "none")
        put("freeze_layer", "freeze", layer)
    return fields, shown


def _number(keys: dict[str, Any], key: str, path: Path) -> float:
    try:
        value = float(keys[key])
    except (KeyError, TypeError, ValueError):
        raise RecipeError(f"{path}: {key}", expected="a number", got=repr(keys.get(key))) from None
    if key in ("epoch_size", "lr_max") and value <= 0:
        raise RecipeError(f"{path}: {key}", expected="more than 0", got=repr(keys[key]))
    return value
