"""Score a checkpoint on a split of a records folder: load, check, open and score, for every command that does so."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep.loader.batches import open_batches
from imnet_prep.records.elsewhere import open_records
from imnet_prep.records.manifest import Manifest
from imnet_prep.types import Batch, ProgressCallback
from mbv2.data import eval_options, rank_share, split_images
from mbv2.runtime import runtime, start_mindspore
from mbv2.scoring.classes import SubsetTally, checkpoint_labels
from mbv2.scoring.score import Observer, Predict, Scores, Tally, network_predict, score_batches, sum_over_ranks
from mbv2.scoring.several_labels import RealTally, read_real_labels
from mbv2.training.ranks import sum_counts
from mbv2.weights.checkpoint import Checkpoint, build_network, read_checkpoint


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A checkpoint and the split that it is scored on, checked to fit each other.

    Attributes:
        loaded: The checkpoint.
        records: The records folder, or its URL.
        manifest: Its manifest.
        split: The split.
        images: Images of the split.
        labels: int32 (classes of the records,), the checkpoint's label of each class.
        class_names: Of the checkpoint, in its label order.
        workers: Decode threads; as many as the operators use if not given.
        cache: For a URL: where shards are kept. cache_bytes: Most bytes to keep there.
    """

    loaded: Checkpoint
    records: Path | str
    manifest: Manifest
    split: str
    images: int
    labels: NDArray[np.int32]
    class_names: tuple[str, ...]
    workers: int | None = None
    cache: Path | None = None
    cache_bytes: int | None = None

    def spread(self, most: int) -> tuple[Iterator[Batch], int]:
        """Yield up to ``most`` images, one a batch, spread evenly over the split; no other image is decoded.

        Returns:
            The batches, with the checkpoint's labels, and their number.
        """
        every = -(-self.images // most)
        return self._batches(1, 0, every), -(-self.images // every)

    def score(
        self,
        predict: Predict,
        *,
        observers: Sequence[Observer] = (),
        tallies: Sequence[Tally] = (),
        most: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        progress: ProgressCallback | None = None,
    ) -> Scores:
        """Score a network or an exported file; labels are the checkpoint's.

        Args:
            predict: Images (batch size of the checkpoint, H, W, 3) to logits.
            observers: Called with each batch and its logits.
            tallies: Observers whose counts are added up over ranks and kept with the scores.
            most: Score only about so many images, spread over the split.
            stop: Says whether to leave.
            progress: Called after each batch.

        Raises:
            Interrupted: ``stop`` said so.
        """
        meta, here = self.loaded.meta, runtime()
        if len(self.labels) < len(self.class_names):
            tallies = [SubsetTally(self.labels, len(self.class_names)), *tallies]
        if most is None or most >= self.images:
            batches, total = self._batches(meta.batch_size, here.rank, here.ranks), self.images
        else:
            one_by_one, total = self.spread(most)
            batches = _joined(one_by_one, meta.batch_size)
        scores = score_batches(
            predict,
            batches,
            classes=len(self.class_names),
            batch_size=meta.batch_size,
            total=total,
            observers=[*observers, *tallies],
            reduce=sum_over_ranks,
            stop=stop,
            progress=progress,
        )
        for tally in tallies:
            tally.counts = sum_counts(tally.counts)
        return replace(scores, tallies=tuple(tallies))

    def _batches(self, size: int, rank: int, ranks: int) -> Iterator[Batch]:
        meta, share = self.loaded.meta, rank_share(runtime(), self.workers)
        options = eval_options(size, meta.image_size, meta.eval_crop)
        how = {**share, "rank": rank, "ranks": ranks, "cache": self.cache, "cache_bytes": self.cache_bytes}
        with open_batches(self.records, self.split, options, 0, **how) as batches:
            for batch in batches.epoch(0):
                yield replace(batch, label=self.labels[batch.label])


def _joined(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    while some := [batch for _, batch in zip(range(size), batches, strict=False)]:
        parts = ((batch.image, batch.label, batch.record_id) for batch in some)
        yield Batch(*map(np.concatenate, zip(*parts, strict=True)))


def open_evaluation(loaded: Checkpoint, records: Path | str, split: str) -> Evaluation:
    """Check that a checkpoint can be scored on a split.

    Raises:
        RecordsError: No manifest, no such split, or an empty one.
        CheckpointError: The checkpoint does not know the records' classes.
    """
    manifest = open_records(records).manifest
    images = split_images(manifest, records, split)
    labels, names = checkpoint_labels(loaded.meta, manifest.classes, loaded.path)
    return Evaluation(loaded, records, manifest, split, images, labels, names)


def read_evaluation(checkpoint: Path, records: Path | str, split: str, device_target: str = "CPU") -> Evaluation:
    """Do the same with a checkpoint's file, and start MindSpore; the records are looked at first.

    Raises:
        RecordsError: As above.
        CheckpointError: As above, or the file is unreadable, foreign or damaged.
        TrainError: There is no such device.
    """
    split_images(open_records(records).manifest, records, split)
    start_mindspore(device_target)
    return open_evaluation(read_checkpoint(checkpoint), records, split)


def evaluate_checkpoint(
    records: Path | str,
    checkpoint: Path,
    *,
    split: str = "val",
    real_labels: Path | None = None,
    kernels: str = "auto",
    precision: str = "float32",
    device_target: str = "CPU",
    workers: int | None = None,
    cache: Path | None = None,
    cache_bytes: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: ProgressCallback | None = None,
) -> tuple[Scores, tuple[str, ...]]:
    """Score a checkpoint on a split of a records folder, with the preprocessing that the checkpoint names.

    Args:
        records: The records folder, or its URL.
        checkpoint: One of ours, which knows the records' classes.
        split: Which split.
        real_labels: A file of several right labels an image, see :func:`mbv2.scoring.several_labels.read_real_labels`.
        kernels: ``auto``, ``native`` or ``standard``, see :mod:`mbv2.network.model`.
        precision: ``float32`` or ``bfloat16``: what 1x1 convolutions multiply.
        device_target: ``CPU``, ``GPU`` or ``Ascend``.
        workers: Decode threads of this process; as many as the operators use if not given.
        cache: For a URL: where shards are kept. cache_bytes: Most bytes to keep there.
        stop: Says whether to leave.
        progress: Called after each batch.

    Returns:
        The scores, and the checkpoint's class names in label order.

    Raises:
        RecordsError: No manifest, no such split, or an empty one.
        CheckpointError: Unreadable, foreign, damaged, or for other classes.
        TrainError: The file of several labels is not usable, or bfloat16 without the C++ operators.
    """
    found = read_evaluation(checkpoint, records, split, device_target)
    found = replace(found, workers=workers, cache=cache, cache_bytes=cache_bytes)
    tallies: list[Tally] = []
    if real_labels is not None:
        files = (line.file_name for line in open_records(records, cache, cache_bytes).lines(split))
        tallies.append(RealTally(read_real_labels(real_labels, split, files, found.class_names)))
    predict = network_predict(build_network(found.loaded, kernels=kernels, precision=precision))
    return found.score(predict, tallies=tallies, stop=stop, progress=progress), found.class_names
