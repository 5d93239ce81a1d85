"""Pooled features of a frozen backbone, computed once and kept on disk (5 kB an image at width 1).

A cache is named by a digest over everything that its numbers follow from: the backbone's weights, the preprocessing,
the records' manifest, the split, the view and the operators. Other weights, other records or another crop are another
name, so a cache is never stale.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import Interrupted, TrainError
from imnet_prep.files import exclusive_lock, rename
from imnet_prep.loader.order import balanced_order
from imnet_prep.types import Batch, Progress, ProgressCallback
from mbv2.data import AnyBatch, FeatureBatch, RunData, fill_rows, view_options
from mbv2.scoring.score import network_predict
from mbv2.training.options import RunOptions
from mbv2.weights.checkpoint import parameter_tensors, tensor_digest

if TYPE_CHECKING:
    from mbv2.training.learner import Learner  # it imports MindSpore

_ORDER_STREAM, _VIEW_STREAM = 0xF0, 0xF1  # keep these draws apart from every other use of the seed
_logger = logging.getLogger(__name__)

Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The features of one view of a split, in record order: memory-mapped, so that size does not matter."""

    features: NDArray[np.float32]
    label: NDArray[np.int32]
    record_id: NDArray[np.uint64]


def feature_data(
    options: RunOptions, data: RunData, learner: "Learner", *, stop: Stop, progress: ProgressCallback | None
) -> RunData:
    """Replace a run's images by their pooled features, from the cache or computed now.

    Raises:
        TrainError: A cache is damaged, or the disk does not take it.
        Interrupted: ``stop`` said so.
    """
    from mbv2.training.step import PooledFeatures

    recipe, net = options.recipe, learner.net
    weights = parameter_tensors(net.get_parameters())
    common = {
        "weights": tensor_digest({n: v for n, v in weights.items() if not n.startswith("classifier.")}),
        "model": {k: v for k, v in asdict(learner.config).items() if k not in ("classes", "dropout")},
        "kernels": net.kernels,
        "records": data.digest,
    }
    folder = options.features or options.out / "features"
    net.set_train(False)
    predict = network_predict(PooledFeatures(net))

    def open_set(split: str, view: int, batches: Callable[[], Iterator[AnyBatch]], images: int) -> FeatureSet:
        # Every option of the loader but the batch size: pixels follow from all others.
        pixels = {"seed": options.seed if view else 0, **asdict(replace(view_options(recipe, view), batch_size=1))}
        name = f"{split}-{view}-{cache_key({**common, 'split': split, 'view': view, **pixels})}"
        loader = data.loaders.get(split)
        if (found := load_features(folder, name, images)) is not None:
            return found
        _logger.info("computing the features of %d %s images, once; they are kept in %s", images, split, folder)
        return compute_features(
            folder,
            name,
            lambda image: predict(fill_rows(image, recipe.batch_size))[: len(image)],
            batches(),
            images=images,
            left_out=lambda: len(loader.skipped) if loader else 0,
            length=net.feature_count,
            stop=stop,
            progress=progress,
        )

    def train_view(view: int) -> FeatureSet:
        return open_set("train", view, lambda: data.train_view(view), data.train_images)

    views = tuple(train_view(view) for view in range(1 + recipe.feature_views))
    _check_views(views, recipe.batch_size)
    balanced = recipe.sampling == "balanced"
    train = FeatureSource(views, recipe.batch_size, training=True, seed=options.seed, balanced=balanced)
    val = None
    if (images := data.val) is not None:
        val_set = open_set("val", 0, lambda: images.epoch(0), data.val_images)
        val = FeatureSource((val_set,), recipe.batch_size, training=False)
    net.set_train(True)
    return replace(data, train=train, val=val)


def _check_views(views: Sequence[FeatureSet], batch_size: int) -> None:
    """Refuse views of different images, or of too few: bad ones were left out, and not each crop shows the damage."""
    first, remedy = views[0].record_id, "restore the records; `imnet-prep verify --level decode` lists what is damaged"
    if len(first) < batch_size:
        raise TrainError("the good images do not fill one batch", got=f"{len(first)} of {batch_size}", remedy=remedy)
    if not all(np.array_equal(first, view.record_id) for view in views):
        raise TrainError("some images are bad in one augmented view and good in another", remedy=remedy)


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return the name of a cache: 20 hex digits over everything its numbers follow from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def load_features(folder: Path, name: str, images: int) -> FeatureSet | None:
    """Open a cache; return None if it is missing, or has fewer images, as bad ones may be mended now."""
    paths = _paths(folder, name)
    if not all(path.exists() for path in paths):
        return None
    try:
        features, label, ids = (np.load(path, mmap_mode="r") for path in paths)
    except (OSError, ValueError) as error:
        remedy = f"delete {folder}"
        raise TrainError(f"the feature cache {paths[0]} is damaged", got=str(error), remedy=remedy) from error
    return FeatureSet(features[: len(label)], label, ids) if len(label) == images else None


def compute_features(
    folder: Path,
    name: str,
    pooled: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    batches: Iterator[AnyBatch],
    *,
    images: int,
    left_out: Callable[[], int],
    length: int,
    stop: Stop,
    progress: ProgressCallback | None,
) -> FeatureSet:
    """Compute the features of a view and keep them.

    Args:
        folder: Where caches lie.
        name: From :func:`cache_key`, with the split before it.
        pooled: uint8 (N, H, W, 3) to float32 (N, C).
        batches: Every record of the split once.
        images: How many records there are.
        left_out: Says how many bad ones were left out; asked after the last batch.
        length: C.
        stop: Says whether to leave; what was computed of this view is dropped then.
        progress: Called after each batch.

    Raises:
        TrainError: The disk does not take it, another run is computing it, or another number of images came.
        Interrupted: ``stop`` said so.
    """
    paths = _paths(folder, name)
    partial = [path.with_name(f"partial-{path.name}") for path in paths]
    label, ids = np.empty(images, np.int32), np.empty(images, np.uint64)
    done = 0
    with _alone(folder, name):
        try:
            features = _open_array(partial[0], (images, length))
            for batch in batches:
                assert isinstance(batch, Batch)
                end = done + len(batch)
                if end > images:
                    break
                features[done:end] = pooled(batch.image)
                label[done:end], ids[done:end] = batch.label, batch.record_id
                done = end
                if stop():
                    raise Interrupted("stopped while computing features", got=f"{done} of {images} images")
                if progress:
                    progress(Progress(done, images, note=f"features of the {name.partition('-')[0]} split"))
            if not images - left_out() <= done <= images:
                raise TrainError("the loader gave another number of images", expected=f"{images}", got=f"{done}")
            features.flush()
            _finish(partial, paths, label[:done], ids[:done])
        finally:
            for path in partial:
                path.unlink(missing_ok=True)
    loaded = load_features(folder, name, done)
    assert loaded is not None
    return loaded


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Make the folder, and keep other runs that share it from computing the same features at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / f".{name}.lock"):
            yield
    except BlockingIOError as error:
        what = f"another run is computing the same features in {folder}"
        raise TrainError(what, remedy="wait until it has, or choose another --features") from error
    except OSError as error:
        raise TrainError(f"cannot keep features in {folder}", got=error.strerror or str(error)) from error


def _finish(partial: list[Path], paths: tuple[Path, ...], label: NDArray[np.int32], ids: NDArray[np.uint64]) -> None:
    np.save(partial[1], label)
    np.save(partial[2], ids)
    for source, target in zip(reversed(partial), reversed(paths), strict=True):
        rename(source, target)  # the features last: their presence says that the cache is whole


def _open_array(path: Path, shape: tuple[int, int]) -> Any:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)  # type: ignore[no-untyped-call]


def _paths(folder: Path, name: str) -> tuple[Path, Path, Path]:
    return folder / f"{name}.npy", folder / f"{name}.label.npy", folder / f"{name}.id.npy"


@dataclass(frozen=True, slots=True)
class FeatureSource:
    """Batches of cached features, shuffled by sample, for training or (``training`` false) in order for scoring.

    An epoch visits each image once; with several views, which one is drawn by (seed, epoch).

    Attributes:
        views: The caches, all of the same records in the same order.
        batch_size: Rows of a batch.
        training: Shuffle, and drop what does not fill a batch.
        seed: Of order and views.
        balanced: Draw as many images an epoch, each class equally often.
    """

    views: tuple[FeatureSet, ...]
    batch_size: int
    training: bool
    seed: int = 0
    balanced: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        whole, rest = divmod(len(self.views[0].label), self.batch_size)
        return whole + (rest > 0 and not self.training)

    def epoch(self, number: int, start_step: int = 0) -> Iterator[FeatureBatch]:
        """Iterate an epoch's batches from a step on."""
        first, rows = self.views[0], len(self.views[0].label)
        order, view = np.arange(rows), np.zeros(rows, np.int64)
        if self.training:
            order = np.random.default_rng([self.seed, _ORDER_STREAM, number]).permutation(rows)
            if self.balanced:
                order = balanced_order(self.seed, number, first.record_id, first.label).positions
            view = np.random.default_rng([self.seed, _VIEW_STREAM, number]).integers(0, len(self.views), rows)
        for step in range(start_step, self.steps_per_epoch):
            taken = order[step * self.batch_size : (step + 1) * self.batch_size]
            features = np.stack([self.views[view[row]].features[row] for row in taken])
            yield FeatureBatch(features, first.label[taken], first.record_id[taken])
