"""Checkpoints: MindSpore ``.ckpt`` files that say what they are.

The file is what ``mindspore.save_checkpoint`` writes, so ``mindspore.load_checkpoint`` reads it; beside the tensors
it holds one text entry, :data:`META_TAG`, with the model's shape, class names, preprocessing, position, scores and a
SHA-256 over every tensor. Tensors are the network's parameters under their own names; ``last.ckpt`` adds the
optimiser's state (``momentum.<weight>``, ``square.<weight>``), gradients added up for the next update
(``accumulated.<weight>``) and the averaged weights (``ema.<weight>``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import CheckpointError
from imnet_prep.files import rename, sync
from mbv2.runtime import import_mindspore

if TYPE_CHECKING:
    from mbv2.network.model import MobileNetV2, ModelConfig

META_TAG = "imnet_prep"
FORMAT = "imnet-prep/checkpoint"
FORMAT_VERSION = 1
AVERAGE_PREFIX = "ema."
STATE_PREFIXES = ("momentum.", "square.", "accumulated.", AVERAGE_PREFIX)
_DTYPES = {"Float32": np.float32, "Float16": np.float16, "Float64": np.float64, "Int32": np.int32, "Int64": np.int64}

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Meta:
    """What a checkpoint says about itself.

    Attributes:
        model: The fields of :class:`mbv2.network.model.ModelConfig`.
        class_names: In label order; empty where the source of converted weights names none.
        image_size: Side of the input that it was trained for, in pixels.
        eval_crop: Side of the evaluation's centre crop as a share of the resized short side.
        batch_size: Images in an evaluation batch.
        epoch: Finished epochs.
        step: Finished steps of the whole run.
        metrics: Scores on the validation split (``top1``, ``top5``), fractions 0-1.
        training: What exact resume needs besides tensors; empty but in ``last.ckpt``.
        origin: Where the weights came from.
    """

    model: dict[str, Any]
    class_names: tuple[str, ...]
    image_size: int
    eval_crop: float
    batch_size: int = 64
    epoch: int = 0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    origin: str = ""

    def model_config(self) -> ModelConfig:
        """Build the model's configuration."""
        from mbv2.network.model import ModelConfig

        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in self.model.items()
        }
        try:
            return ModelConfig(**fields)
        except TypeError as error:
            raise CheckpointError("the checkpoint's model is described in other terms", got=str(error)) from error


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory: where it lies, what it says, and its tensors by name."""

    path: Path
    meta: Meta
    tensors: Tensors

    def weights(self) -> Tensors:
        """Return the network's parameters to evaluate or start from: the averaged ones where there are any."""
        plain = {name: value for name, value in self.tensors.items() if not name.startswith(STATE_PREFIXES)}
        averaged = {n.removeprefix(AVERAGE_PREFIX): v for n, v in self.tensors.items() if n.startswith(AVERAGE_PREFIX)}
        return {**plain, **averaged}

    def without_state(self) -> Checkpoint:
        """Return the network's live parameters alone."""
        plain = {name: value for name, value in self.tensors.items() if not name.startswith(STATE_PREFIXES)}
        return Checkpoint(self.path, self.meta, plain)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the weights: the key of what is computed from them."""
        return tensor_digest(self.weights())


def tensor_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 (hex) over names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()


def save_checkpoint(path: Path, tensors: Tensors, meta: Meta) -> None:
    """Write a checkpoint so that ``path`` is the old file or the new one, never a part.

    Raises:
        CheckpointError: The disk does not take it.
    """
    ms = import_mindspore()
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sha256": tensor_digest(tensors),
        **dataclasses.asdict(meta),
    }
    partial = path.with_name(f"{path.stem}.partial.ckpt")
    entries = [{"name": name, "data": ms.Tensor(value)} for name, value in tensors.items()]
    try:
        partial.unlink(missing_ok=True)
        ms.save_checkpoint(entries, str(partial), append_dict={META_TAG: json.dumps(document, sort_keys=True)})
        partial.chmod(0o644)  # MindSpore leaves it read-only for its owner alone
        sync(partial)
        rename(partial, path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:  # MindSpore turns some of the first into the second
        raise CheckpointError(f"cannot write {path}", got=" ".join(str(error).split())[:200]) from error
    finally:
        for left in (partial, partial.with_suffix(".tmp")):  # MindSpore writes the second and renames it
            with suppress(OSError):
                left.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Read any MindSpore ``.ckpt``, ours or not.

    Returns:
        The tensors by name, and the text entries by name.

    Raises:
        CheckpointError: The file is missing, is not a MindSpore checkpoint, or is damaged.
    """
    import_mindspore()
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from mindspore.train.checkpoint_pb2 import Checkpoint as Message

    message = Message()
    try:
        message.ParseFromString(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}", got=error.strerror or str(error)) from error
    except DecodeError as error:
        remedy = "the file is of another kind, truncated or damaged"
        raise CheckpointError(f"{path} is not a MindSpore checkpoint", got=str(error), remedy=remedy) from error
    chunks: dict[str, list[bytes]] = {}
    heads: dict[str, Any] = {}
    for entry in message.value:  # a tensor over 512 MB comes in several entries of one name
        chunks.setdefault(entry.tag, []).append(entry.tensor.tensor_content)
        heads[entry.tag] = entry.tensor
    if not heads:
        raise CheckpointError(f"{path} holds no tensors", expected="a MindSpore checkpoint")
    tensors: Tensors = {}
    texts: dict[str, str] = {}
    for name, head in heads.items():
        content = b"".join(chunks[name])
        if head.tensor_type == "str":
            texts[name] = content.decode("utf-32-le", errors="replace")
        else:
            tensors[name] = _array(path, name, head.tensor_type, tuple(head.dims), content)
    return tensors, texts


def _array(path: Path, name: str, kind: str, shape: tuple[int, ...], content: bytes) -> NDArray[Any]:
    if kind not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name}", expected=f"one of {', '.join(_DTYPES)}", got=kind)
    array = np.frombuffer(content, _DTYPES[kind]) if len(content) % np.dtype(_DTYPES[kind]).itemsize == 0 else None
    if array is None or array.size != int(np.prod(shape, dtype=np.int64)):
        raise CheckpointError(
            f"{path}: tensor {name} is damaged", expected=f"shape {shape}", got=f"{len(content)} bytes"
        )
    return array.reshape(shape).copy()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one of our own checkpoints and check every tensor against its digest.

    Raises:
        CheckpointError: Missing, foreign, damaged, or of another format version.
    """
    tensors, texts = read_tensors(path)
    if META_TAG not in texts:
        remedy = "bring foreign weights in with `mbv2 convert`"
        raise CheckpointError(f"{path} was not written by mbv2, or is cut short", remedy=remedy)
    try:
        document = json.loads(texts[META_TAG])
        version, sha256 = document.pop("format_version"), document.pop("sha256")
        kind = document.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: its description is damaged", got=repr(error)) from error
    if kind != FORMAT or version != FORMAT_VERSION:
        expected = f"{FORMAT} version {FORMAT_VERSION}"
        raise CheckpointError(f"{path} is of another format", expected=expected, got=f"{kind} version {version}")
    if tensor_digest(tensors) != sha256:
        raise CheckpointError(f"{path} is damaged", expected=f"SHA-256 {sha256}", got=tensor_digest(tensors))
    try:
        meta = Meta(**{**document, "class_names": tuple(document["class_names"])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its description is damaged", got=str(error)) from error
    return Checkpoint(path, meta, tensors)


def check_complete(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Account for every tensor: the same names, the same shapes.

    Raises:
        CheckpointError: A tensor is missing, left over or of another shape.
    """
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    if missing or extra:
        got = "; ".join(text for text in (_names("missing", missing), _names("left over", extra)) if text)
        raise CheckpointError(f"{where} does not fit the network", expected=f"{len(want)} tensors", got=got)
    for name, shape in want.items():
        if tuple(have[name]) != tuple(shape):
            raise CheckpointError(f"{where}: tensor {name}", expected=f"shape {shape}", got=f"{tuple(have[name])}")


def _names(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}" if names else ""


def load_parameters(parameters: Iterable[Any], tensors: Mapping[str, NDArray[Any]], where: str) -> None:
    """Set parameters from tensors of the same names; every one on both sides must match.

    Raises:
        CheckpointError: A tensor is missing, left over or of another shape.
    """
    import mindspore as ms

    by_name = {parameter.name: parameter for parameter in parameters}
    shapes = {name: value.shape for name, value in tensors.items()}
    check_complete(shapes, {name: tuple(p.shape) for name, p in by_name.items()}, where)
    for name, parameter in by_name.items():
        parameter.set_data(ms.Tensor(np.ascontiguousarray(tensors[name], dtype=np.float32)))


def parameter_tensors(parameters: Iterable[Any]) -> Tensors:
    """Copy parameters to the host, by name."""
    return {parameter.name: parameter.asnumpy().copy() for parameter in parameters}


def build_network(checkpoint: Checkpoint, *, kernels: str = "auto", precision: str = "float32") -> MobileNetV2:
    """Make the network that a checkpoint describes, with its weights, in evaluation mode; `precision` is of inference.

    Raises:
        CheckpointError: The tensors are not that network's.
    """
    from mbv2.network.model import MobileNetV2

    net = MobileNetV2(checkpoint.meta.model_config(), kernels=kernels, inference=precision)
    load_parameters(net.get_parameters(), checkpoint.weights(), str(checkpoint.path))
    net.set_train(False)
    return net
