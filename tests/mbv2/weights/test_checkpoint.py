"""Checkpoints: whole or refused, every tensor accounted for, readable by MindSpore itself."""

from __future__ import annotations

import stat
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from imnet_prep.errors import CheckpointError
from mbv2.weights.checkpoint import (
    Checkpoint,
    Meta,
    Tensors,
    check_complete,
    load_parameters,
    read_checkpoint,
    save_checkpoint,
)

META = Meta(
    model={"classes": 2, "width": 0.5, "mean": [0.1, 0.2, 0.3]},
    class_names=("chat", "Vögel"),
    image_size=96,
    eval_crop=0.875,
    step=7,
    metrics={"top1": 0.1 + 0.2},
    training={"loss_sum": 1 / 3},
)


def tensors() -> Tensors:
    rng = np.random.default_rng(0)
    return {"a.weight": rng.normal(size=(3, 4)).astype(np.float32), "a.bias": rng.normal(size=3).astype(np.float32)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "x.ckpt"
    save_checkpoint(path, tensors(), META)
    return path


def test_what_is_saved_comes_back_bit_for_bit(saved: Path) -> None:
    loaded = read_checkpoint(saved)
    assert loaded.meta == META
    assert {name: value.tobytes() for name, value in loaded.tensors.items()} == {
        name: value.tobytes() for name, value in tensors().items()
    }
    assert [path.name for path in saved.parent.iterdir()] == ["x.ckpt"]
    assert stat.S_IMODE(saved.stat().st_mode) == 0o644


def test_mindspore_reads_it(saved: Path) -> None:
    loaded = ms.load_checkpoint(str(saved))
    assert np.array_equal(loaded["a.weight"].asnumpy(), tensors()["a.weight"])


def test_saving_again_replaces(saved: Path) -> None:
    save_checkpoint(saved, {"b": np.zeros(2, np.float32)}, META)
    assert list(read_checkpoint(saved).tensors) == ["b"]


@pytest.mark.parametrize("keep", [0, 1, 20, 60, 100, 400, -1])
def test_a_truncated_file_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.ckpt") as caught:
        read_checkpoint(saved)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_any_tensor_is_found(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    at = data.find(tensors()["a.weight"].tobytes())
    data[at + 5] ^= 16
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(saved)


@pytest.mark.parametrize("content", [b"hello, this is text", b"PK\x03\x04" + bytes(40), bytes(1000)])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        read_checkpoint(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.ckpt.*No such file"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_plain_mindspore_checkpoints_are_sent_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    ms.save_checkpoint([{"name": "a", "data": ms.Tensor(np.ones(2, np.float32))}], str(path))
    with pytest.raises(CheckpointError, match="mbv2 convert"):
        read_checkpoint(path)


def test_averaged_weights_stand_for_the_network() -> None:
    one, two = np.ones(1, np.float32), np.full(1, 2, np.float32)
    loaded = Checkpoint(Path("x"), META, {"w": one, "ema.w": two, "momentum.w": one, "square.w": one})
    assert loaded.weights() == {"w": two}


def test_every_tensor_is_accounted_for() -> None:
    want = {"a": (2,), "b": (3,)}
    check_complete(want, want, "x")
    with pytest.raises(CheckpointError, match="missing b"):
        check_complete({"a": (2,)}, want, "x")
    with pytest.raises(CheckpointError, match="left over c"):
        check_complete({**want, "c": (1,)}, want, "x")
    with pytest.raises(CheckpointError, match="tensor b"):
        check_complete({"a": (2,), "b": (4,)}, want, "x")


def test_loading_sets_the_parameters() -> None:
    parameter = ms.Parameter(ms.Tensor(np.zeros(3, np.float32)), name="a")
    load_parameters([parameter], {"a": np.arange(3, dtype=np.float32)}, "x")
    assert parameter.asnumpy().tolist() == [0, 1, 2]
