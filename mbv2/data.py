"""What a run trains on: batches of a records folder, by epoch and from any step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import RecordsError, TrainError
from imnet_prep.loader.bad_rows import SkippedRow
from imnet_prep.loader.batches import Batches, open_batches
from imnet_prep.loader.options import EvalOptions, Options, TrainOptions
from imnet_prep.records.elsewhere import open_records
from imnet_prep.records.manifest import Manifest
from imnet_prep.remote import is_url, shown
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
FAIL, SKIP = "fail", "skip"  # at a bad record
PLAIN, BLOCKS = "plain", "blocks"  # values of a recipe's ``sampling``


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
        class_counts: The same by label.
        train_view: Gives every training image once, in stored order: view 0 as evaluation sees it, others augmented.
        val: Batches for scoring, or None where the records have no ``val`` split.
        val_images: Images of the ``val`` split.
        loaders: What reads the splits, by name; none where batches do not come from records.
        small: The images are stored at a short side.
    """

    classes: tuple[str, ...]
    digest: str
    train: BatchSource
    train_images: int
    class_counts: tuple[int, ...]
    train_view: Callable[[int], Iterator[AnyBatch]]
    val: BatchSource | None
    val_images: int
    loaders: Mapping[str, Batches] = field(default_factory=dict)
    small: bool = False

    @property
    def skipped(self) -> tuple[SkippedRow, ...]:
        """The bad records that were skipped so far."""
        return tuple(row for loader in self.loaders.values() for row in loader.skipped)

    def skipped_state(self) -> dict[str, list[tuple[int, str]]]:
        """Return the same as what ``last.ckpt`` keeps: position and reason, by split."""
        return {
            split: sorted((row.position, row.reason) for row in loader.skipped)  # ranks may meet them in another order
            for split, loader in self.loaders.items()
        }

    def restore_skipped(self, state: Mapping[str, Any]) -> None:
        """Count what an interrupted run had skipped.

        Raises:
            PipelineError: There are more than may be skipped now.
        """
        for split, rows in state.items():
            if split in self.loaders:
                self.loaders[split].add_skipped({int(position): str(reason) for position, reason in rows})

    def share_skipped(self, add_up: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        """Count what other ranks have skipped; every rank must call it.

        Args:
            add_up: Adds an array up over all ranks.

        Raises:
            PipelineError: All ranks together have more than may be skipped; every rank raises it.
        """
        for loader in self.loaders.values():
            if loader.loading.ranks == 1 or loader.loading.on_error == "raise":
                continue
            bad = np.zeros(loader.images, np.float32)
            bad[[row.position for row in loader.skipped]] = 1
            loader.add_skipped({row: loader.why_bad(row) for row in np.flatnonzero(add_up(bad) - bad).tolist()})

    def left_out(self, add_up: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> int:
        """Return how many bad images of the validation split are left out, over all ranks; every rank must call it."""
        self.share_skipped(add_up)
        return len(self.loaders["val"].skipped) if "val" in self.loaders else 0


def sampling_of(recipe: Recipe, records: Path | str) -> str:
    """Return how a new run samples if it is not told: shard by shard from a URL, else as its recipe says."""
    return BLOCKS if recipe.sampling == PLAIN and is_url(records) else recipe.sampling


def open_run_data(
    records: Path | str,
    recipe: Recipe,
    seed: int,
    stack: ExitStack,
    runtime: Runtime,
    *,
    workers: int | None = None,
    on_bad_record: str = SKIP,
    cache: Path | None = None,
    cache_bytes: int | None = None,
) -> RunData:
    """Open the splits of a records folder as a recipe asks; with several ranks, this rank's part of them.

    Args:
        records: The records folder, or its URL.
        recipe: What is computed.
        seed: Of the run.
        stack: Closes the splits.
        runtime: This rank's.
        workers: Decode threads of this rank, see :func:`rank_share`.
        on_bad_record: See :func:`bad_record_options`.
        cache: For a URL: where shards are kept. cache_bytes: Most bytes to keep there.

    Raises:
        RecordsError: No manifest, no cache for a URL, an empty split, or fewer training images than one batch.
        TrainError: Unknown ``on_bad_record``.
        PipelineError: ``workers`` is out of range.
    """
    manifest, ranks = open_records(records).manifest, runtime.ranks
    reading = {**bad_record_options(on_bad_record), "cache": cache, "cache_bytes": cache_bytes}
    loading = {**rank_share(runtime, workers), **reading}
    images = split_images(manifest, records, "train")
    if images < recipe.batch_size * ranks:
        expected, got = f"at least one batch of {recipe.batch_size * ranks} images", f"{images}"
        raise RecordsError(
            f"{shown(str(records))}: split 'train'", expected=expected, got=got, remedy="lower --batch-size"
        )
    val_images = split_images(manifest, records, "val") if "val" in manifest.splits else 0
    order = "global" if recipe.sampling == PLAIN else recipe.sampling
    train = stack.enter_context(open_batches(records, "train", train_options(recipe), seed, order=order, **loading))
    loaders, val = {"train": train}, None
    if val_images:
        val = loaders["val"] = stack.enter_context(
            open_batches(records, "val", scoring_options(recipe), seed, **loading)
        )

    def train_view(view: int) -> Iterator[Batch]:
        how = {"order": "sequential", "workers": workers, **reading}
        with open_batches(records, "train", view_options(recipe, view), seed, **how) as batches:
            yield from batches.epoch(view)
            train.add_skipped({row.position: row.reason for row in batches.skipped})

    counts = manifest.splits["train"].class_counts
    small = manifest.options.get("short_side") is not None
    return RunData(
        manifest.classes, manifest.digest, train, images, counts, train_view, val, val_images, loaders, small
    )


def rank_share(runtime: Runtime, workers: int | None = None) -> dict[str, int]:
    """Return the options with which this rank's loader takes its part of the records, the cores and the memory.

    Args:
        runtime: This rank's.
        workers: Decode threads; as many as the operators use if not given.
    """
    threads = runtime.threads if workers is None else workers
    return {"rank": runtime.rank, "ranks": runtime.ranks, "local_ranks": runtime.local_ranks, "workers": threads}


def bad_record_options(on_bad_record: str) -> dict[str, Any]:
    """Translate what is done at a bad record into the loader's terms.

    Args:
        on_bad_record: ``fail``, ``skip`` (the loader's default number of them) or how many to skip at most in a split.

    Raises:
        TrainError: Another text.
    """
    if on_bad_record in (FAIL, SKIP):
        return {"on_error": "raise" if on_bad_record == FAIL else "skip"}
    if not (on_bad_record.isascii() and on_bad_record.isdigit() and len(on_bad_record) < 10):
        expected = f"{FAIL}, {SKIP}, or the number of records to skip at most"
        raise TrainError("--on-bad-record", expected=expected, got=repr(on_bad_record))
    return {"on_error": "skip", "max_skipped": int(on_bad_record)}


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
        trivialaugment=recipe.trivialaugment,
        erasing_prob=recipe.erasing_prob,
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
        mixup_prob=recipe.mixup_prob,
        mixup_last_epoch=recipe.mixup_last_epoch,
    )


def view_options(recipe: Recipe, view: int) -> Options:
    """Return how a view of the training images is made: view 0 as for evaluation, others augmented, none mixed."""
    if not view:
        return scoring_options(recipe)
    unmixed = replace(recipe, mixup_alpha=0.0, cutmix_alpha=0.0, mixup_prob=1.0, mixup_last_epoch=0)
    return replace(train_options(unmixed), drop_last=False)


def scoring_options(recipe: Recipe) -> EvalOptions:
    """Return how the images of a run's evaluations are made."""
    return eval_options(recipe.batch_size, recipe.eval_size or recipe.image_size, recipe.eval_crop)


def eval_options(batch_size: int, image_size: int, eval_crop: float) -> EvalOptions:
    """Translate a checkpoint's preprocessing into the pipeline's terms."""
    return EvalOptions(batch_size=batch_size, image_size=image_size, resize=round(image_size / eval_crop))


def split_images(manifest: Manifest, records: Path | str, split: str) -> int:
    """Return the number of images of a split.

    Raises:
        RecordsError: There is no such split, or it is empty.
    """
    where = shown(str(records))
    if split not in manifest.splits:
        raise RecordsError(f"{where} has no split {split!r}", expected=f"one of {', '.join(sorted(manifest.splits))}")
    images = manifest.splits[split].images
    if not images:
        raise RecordsError(f"{where}: split {split!r} is empty", expected="at least one image")
    return images
