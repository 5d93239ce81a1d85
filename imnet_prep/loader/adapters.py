"""Wrap batches as the datasets of training frameworks."""

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from imnet_prep.loader.batches import Batches
from imnet_prep.loader.options import TrainOptions

if TYPE_CHECKING:
    from mindspore.dataset import Dataset


def to_dataset(batches: Batches, *, first_epoch: int = 0) -> "Dataset":
    """Wrap an opened split as a MindSpore dataset of batches, for MindSpore's own ``Model.train``.

    Columns: ``image`` uint8 (N, H, W, 3), ``label`` int32 (N,), and with MixUp or CutMix ``mix_label`` int32 (N,) and
    ``mix_weight`` float32 (N,). Each iteration over the dataset is the next epoch.
    """
    import mindspore.dataset as ds

    source = _Source(batches, first_epoch)
    return ds.GeneratorDataset(
        source, column_names=source.columns, shuffle=False, num_parallel_workers=1, python_multiprocessing=False
    )


class _Source:
    """What MindSpore iterates: each ``iter`` is the next epoch."""

    def __init__(self, batches: Batches, first_epoch: int) -> None:
        self._batches, self._epochs = batches, count(first_epoch)
        mixed = isinstance(batches.options, TrainOptions) and batches.options.mixes
        self.columns = ["image", "label", *(["mix_label", "mix_weight"] if mixed else [])]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[NDArray[Any], ...]]:
        for batch in self._batches.epoch(next(self._epochs)):
            yield tuple(getattr(batch, name) for name in self.columns)
