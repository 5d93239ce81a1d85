"""Run the loader over the records of these tests, and compare what it made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from imnet_prep.images.native import decoder_status
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import EvalOptions, TrainOptions
from imnet_prep.types import Batch

TRAIN, VAL = 150, 37
OPTIONS = TrainOptions(8, image_size=32)
EVERYTHING = TrainOptions(
    8, image_size=32, color_jitter=(0.4, 0.4, 0.4, 0.1), randaugment_ops=2, erasing_prob=0.5, mixup_alpha=0.2,
    cutmix_alpha=1.0,
)  # fmt: skip
NATIVES = ["off", pytest.param("on", marks=pytest.mark.skipif(not decoder_status()[0], reason=decoder_status()[1]))]


def run_epoch(
    records: Path | str, options: TrainOptions | EvalOptions = OPTIONS, epoch: int = 0, **how: Any
) -> list[Batch]:
    """Return the batches of an epoch of the training split, or as ``how`` says."""
    start = how.pop("start_step", 0)
    split = how.pop("split", "train")
    with open_batches(records, split, options, how.pop("seed", 5), **how) as batches:
        return list(batches.epoch(epoch, start))


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Compare two runs byte for byte."""

    def flat(batch: Batch) -> list[bytes]:
        parts = (batch.image, batch.label, batch.record_id, batch.mix_label, batch.mix_weight)
        return [b"" if part is None else part.tobytes() for part in parts]

    return [flat(batch) for batch in one] == [flat(batch) for batch in other]
