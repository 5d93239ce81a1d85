"""The averaged weights, BatchNorm's moving statistics among them, in numbers against NumPy."""

from pathlib import Path

import numpy as np
import pytest

from mbv2.recipe import Recipe
from mbv2.training.learner import Learner
from mbv2.training.options import RunOptions
from mbv2.weights.checkpoint import AVERAGE_PREFIX, Tensors, parameter_tensors
from tests.mbv2.standin import memory_data

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_statistics_and_weights_are_averaged_at_each_update(tmp_path: Path) -> None:
    """Two steps an update: between them the live statistics move, and the averages do not."""
    recipe = Recipe(
        batch_size=8, image_size=32, width=0.35, ema_decay=0.22, accumulate_steps=2, warmup_frac=0, bn_momentum=0.7
    )
    data = memory_data(images=48, batch=8)
    learner = Learner(RunOptions(tmp_path, tmp_path, recipe), data.classes, data.class_counts, None)

    def live() -> Tensors:
        return parameter_tensors(learner.net.get_parameters())

    def averages() -> Tensors:
        assert learner.average is not None
        tensors = parameter_tensors(learner.average.get_parameters())
        return {name.removeprefix(AVERAGE_PREFIX): value for name, value in tensors.items()}

    start = live()
    wanted = {name: value.astype(np.float64) for name, value in start.items()}
    for step, batch in enumerate(data.train.epoch(0)):
        before = averages()
        learner.train(batch, step, 0.05, stop=False)
        if step % 2 == 0:
            assert all(np.array_equal(value, before[name]) for name, value in averages().items())
            continue
        update = step // 2 + 1
        decay = min(0.22, (1 + update) / (10 + update))  # 2 / 11, 0.22 and 0.22
        wanted = {name: value * decay + live()[name] * (1 - decay) for name, value in wanted.items()}
    found = averages()
    assert found.keys() == wanted.keys()
    moved = [name for name in wanted if "moving_" in name and np.abs(found[name] - start[name]).max() > 1e-3]
    assert len(moved) > 0.75 * sum("moving_" in name for name in wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
