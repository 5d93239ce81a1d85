"""What a run trains on: batches of a records folder, by epoch and from any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import EvalOptions, Options, TrainOptions
from imnet_prep.records.folder import RecordsFolder
from imnet_prep.records.manifest import Manifest
from imnet_prep.types import Batch
from mbv2.recipe import Recipe
from mbv2.runtime import Runtime


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """What a step of head training takes.

    Attributes:
        features: float32 (N, C), pooled.
        label: int32 (N,).
        record_id: uint64 (N,).
    """

    features: NDArray[np.float32]
    label: NDArray[np.int32]
    record_id: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.label)


AnyBatch = Batch | FeatureBatch


def batch_inputs(batch: AnyBatch) -> NDArray[Any]:
    """Return what the network is fed: uint8 images, or float32 pooled features."""
    return batch.features if isinstance(batch, FeatureBatch) else batch.image


def fill_rows(rows: NDArray[Any], size: int) -> NDArray[Any]:
    """Append rows of zeros up to the batch size that a graph was compiled for."""
    missing = size - len(rows)
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows


class BatchSource(Protocol):
    """Batches of one split."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""

    def epoch(self, number: int, start_step: int = 0) -> Iterator[AnyBatch]:
        """Iterate an epoch's batches from a step on."""


@dataclass(frozen=True, slots=True)
class RunData:
    """The data of a run.

    Attributes:
        classes: Names in label order.
        digest: SHA-256 (hex) of ``manifest.json``.
        train: Batches of exactly the recipe's size.
        train_images: Images of the ``train`` split.
        train_view: Gives every training image once, in stored order: view 0 as evaluation sees it, others augmented.
        val: Batches for scoring, or None where the records have no ``val`` split.
        val_images: Images of the ``val`` split.
    """

    classes: tuple[str, ...]
    digest: str
    train: BatchSource
    train_images: int
    train_view: Callable[[int], Iterator[AnyBatch]]
    val: BatchSource | None
    val_images: int


def open_run_data(records: Path, recipe: Recipe, seed: int, stack: ExitStack, runtime: Runtime) -> RunData:
    """Open the splits of a records folder as a recipe asks; with several ranks, this rank's part of them.

    Each split is decoded by as many threads as the operators use, so that ranks on one machine share its cores.

    Raises:
        RecordsError: No manifest, an empty split, or fewer training images than one batch.
    """
    manifest = RecordsFolder.open(records).manifest
    ranks, loading = runtime.ranks, {"rank": runtime.rank, "ranks": runtime.ranks, "workers": runtime.threads}
    images = split_images(manifest, records, "train")
    if images < recipe.batch_size * ranks:
        expected, got = f"at least one batch of {recipe.batch_size * ranks} images", f"{images}"
        raise RecordsError(f"{records}: split 'train'", expected=expected, got=got, remedy="lower --batch-size")
    val_images = split_images(manifest, records, "val") if "val" in manifest.splits else 0
    train = stack.enter_context(open_batches(records, "train", train_options(recipe), seed, **loading))
    val = None
    if val_images:
        options = eval_options(recipe.batch_size, recipe.image_size, recipe.eval_crop)
        val = stack.enter_context(open_batches(records, "val", options, seed, **loading))

    def train_view(view: int) -> Iterator[Batch]:
        with open_batches(records, "train", view_options(recipe, view), seed, order="sequential") as batches:
            yield from batches.epoch(view)

    return RunData(manifest.classes, manifest.digest, train, images, train_view, val, val_images)


def train_options(recipe: Recipe) -> TrainOptions:
    """Translate a recipe's augmentation into the pipeline's terms."""
    strength = recipe.color_jitter
    return TrainOptions(
        batch_size=recipe.batch_size,
        image_size=recipe.image_size,
        scale=(recipe.crop_min, recipe.crop_max),
        flip_prob=recipe.flip,
        color_jitter=(strength, strength, strength, 0.0),
        randaugment_ops=recipe.randaugment_ops,
        randaugment_magnitude=recipe.randaugment_magnitude,
        erasing_prob=recipe.erasing_prob,
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
    )


def view_options(recipe: Recipe, view: int) -> Options:
    """Return how a view of the training images is made: view 0 as for evaluation, others augmented, none mixed."""
    if not view:
        return eval_options(recipe.batch_size, recipe.image_size, recipe.eval_crop)
    return replace(train_options(recipe), mixup_alpha=0.0, cutmix_alpha=0.0, drop_last=False)


def eval_options(batch_size: int, image_size: int, eval_crop: float) -> EvalOptions:
    """Translate a checkpoint's preprocessing into the pipeline's terms."""
    return EvalOptions(batch_size=batch_size, image_size=image_size, resize=round(image_size / eval_crop))


def split_images(manifest: Manifest, records: Path, split: str) -> int:
    """Return the number of images of a split.

    Raises:
        RecordsError: There is no such split, or it is empty.
    """
    if split not in manifest.splits:
        raise RecordsError(f"{records} has no split {split!r}", expected=f"one of {', '.join(sorted(manifest.splits))}")
    images = manifest.splits[split].images
    if not images:
        raise RecordsError(f"{records}: split {split!r} is empty", expected="at least one image")
    return images
