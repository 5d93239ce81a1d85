"""Every graph that a GPU or Ascend would run compiles and trains on a CPU's standard operators.

There is no such device here: these are the same cells on the same operators.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from imnet_prep.types import Batch
from mbv2.data import FeatureBatch
from mbv2.network.model import MobileNetV2, ModelConfig
from mbv2.recipe import Recipe
from mbv2.scoring.score import network_predict
from mbv2.training.learner import Learner
from mbv2.training.options import RunOptions
from mbv2.training.step import PooledFeatures
from mbv2.weights.checkpoint import Checkpoint, Meta, parameter_tensors, save_checkpoint

CLASSES, ROWS, SIZE = ("a", "b", "c"), 4, 32
PLAIN = Recipe(
    batch_size=ROWS, image_size=SIZE, width=0.35, epochs=1, optimizer="sgd", lr=0.05, lr_batch_size=0, warmup_frac=0.0
)
LONG = pytest.mark.long


def pretrained(folder: Path) -> Checkpoint:
    config = ModelConfig(len(CLASSES), 0.35)
    tensors = parameter_tensors(MobileNetV2(config, kernels="standard").get_parameters())
    meta = Meta(asdict(config), CLASSES, SIZE, 0.875, ROWS)
    save_checkpoint(folder / "teacher.ckpt", tensors, meta)
    return Checkpoint(folder / "teacher.ckpt", meta, tensors)


def image_batch(seed: int, *, mixed: bool) -> Batch:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, ROWS).astype(np.int32)
    image = rng.integers(0, 256, (ROWS, SIZE, SIZE, 3), dtype=np.uint8)
    mix = (label[::-1].copy(), np.full(ROWS, 0.7, np.float32)) if mixed else (None, None)
    return Batch(image, label, np.arange(ROWS, dtype=np.uint64), *mix)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            {"optimizer": "adamw", "distill_from": "teacher.ckpt", "freeze": "bn", "class_weights": "balanced"},
            marks=LONG,
        ),
        pytest.param({"optimizer": "sgd", "clip_norm": 1.0, "accumulate_steps": 2, "ema_decay": 0.9}, marks=LONG),
        pytest.param(
            {"optimizer": "nesterov", "backbone_lr_factor": 0.1, "label_smoothing_over": "others"}, marks=LONG
        ),
        pytest.param({"optimizer": "rmsprop", "padding": "same", "ema_decay": 0.9, "clip_norm": 1.0}, marks=LONG),
        pytest.param(
            {"optimizer": "adamw", "accumulate_steps": 2, "class_weights": "balanced", "mixup_alpha": 0.2}, marks=LONG
        ),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_a_step_and_evaluation_run_on_standard_operators(fields: dict[str, object], tmp_path: Path) -> None:
    teacher = pretrained(tmp_path)
    if "distill_from" in fields:
        fields = {**fields, "distill_from": str(teacher.path)}
    recipe = replace(PLAIN, **fields)  # type: ignore[arg-type]
    options = RunOptions(tmp_path, tmp_path, recipe, kernels="standard")
    learner = Learner(options, CLASSES, (5, 3, 1), None)
    assert learner.net.kernels == "standard"
    before = parameter_tensors(learner.net.trainable_params())
    batches = [image_batch(seed, mixed=bool(recipe.mixup_alpha)) for seed in range(2)]
    losses = [learner.train(batch, step, 0.05, stop=False)[0].asnumpy()[0] for step, batch in enumerate(batches)]
    assert np.isfinite(losses).all()
    after = parameter_tensors(learner.net.trainable_params())
    assert any((after[name] != before[name]).any() for name in before)
    assert np.isfinite(learner.predict()(batches[0].image)).all()


@pytest.mark.slow
@LONG
def test_the_head_and_the_features_of_a_frozen_backbone_run_on_standard_operators(tmp_path: Path) -> None:
    start = pretrained(tmp_path)
    recipe = replace(PLAIN, freeze="backbone", ema_decay=0.9)
    options = RunOptions(tmp_path, tmp_path, recipe, kernels="standard", pretrained=start.path)
    learner = Learner(options, CLASSES, (5, 3, 1), start)
    learner.net.set_train(False)
    batch = image_batch(0, mixed=False)
    pooled = network_predict(PooledFeatures(learner.net))(batch.image)
    assert pooled.shape == (ROWS, 1280)
    features = FeatureBatch(pooled, batch.label, batch.record_id)
    learner.net.set_train(True)
    assert np.isfinite(learner.train(features, 0, 0.05, stop=False)[0].asnumpy()).all()
    assert np.allclose(learner.predict(live=True)(pooled), learner.net(ms.Tensor(batch.image)).asnumpy(), atol=1e-4)
