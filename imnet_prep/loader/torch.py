"""Batches as tensors of PyTorch. The only module that imports torch, which is not a dependency of this package."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from imnet_prep.errors import PipelineError
from imnet_prep.loader.batches import open_batches
from imnet_prep.loader.options import Options, check_range
from imnet_prep.loader.random_numbers import MAX_EPOCH
from imnet_prep.types import Batch


class TorchLoader(IterableDataset):  # type: ignore[misc]  # torch is Any where types are checked
    """Iterate over a split as tensors; itself the loader, or the dataset of a ``DataLoader(..., batch_size=None)``.

    Each batch is ``(images, labels)``, or ``(images, labels, mix_labels, shares)`` with MixUp or CutMix:

    - images: uint8 (N, 3, H, W), RGB, ``channels_last``: the memory that was decoded into, not a copy. It is used again
      once no tensor shares it. Where CUDA is available, it is pinned.
    - labels, mix_labels: int64 (N,).
    - shares: float32 (N,), of ``labels``; 1 - share is that of ``mix_labels``.

    Each iteration is one epoch: the first is epoch 0, or begins where :meth:`load_state_dict` says; then comes the next
    epoch, also after one that was left early.

    Args:
        records: As for :func:`~imnet_prep.loader.batches.open_batches`.
        split: Likewise.
        options: Likewise; ``batch_size`` is that of one rank.
        seed: Likewise.
        loading: Likewise. ``rank`` and ``ranks`` are those of ``torch.distributed`` where it is initialised, and
            ``local_ranks`` is torchrun's, unless given.

    Attributes:
        batches: The opened split: its class names, its decoder, what was skipped.
        epoch: Of the next batch, from 0.
        step: Batches of that epoch that were handed out.

    Raises:
        RecordsError: As :func:`~imnet_prep.loader.batches.open_batches`.
        PipelineError: Likewise; or a launcher started several ranks, and ``torch.distributed`` is not initialised.
    """

    def __init__(self, records: str | Path, split: str, options: Options, seed: int = 0, **loading: Any) -> None:
        self._pin = torch.cuda.is_available()
        allocate = _pinned_array if self._pin else None
        rank = {} if "ranks" in loading else _rank()
        self.batches = open_batches(records, split, options, seed, **{"allocate": allocate, **rank, **loading})
        self.epoch = self.step = 0
        self._left = False  # whether a further iteration leaves the epoch that is under way
        self._run = {
            "records": self.batches.records_digest,
            "split": split,
            "seed": seed,
            "order": self.batches.order_kind,
            "batch": options.batch_size * self.batches.loading.ranks,
        }

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the batches of an epoch.

        Raises:
            PipelineError: A record is bad.
            RuntimeError: This is a worker process of a ``DataLoader``.
        """
        if worker := get_worker_info():  # torch raises the error again by its class and traceback: ours takes one line
            raise RuntimeError(_another_process(f"num_workers={worker.num_workers}"))
        if self._left:
            self.epoch, self.step = self.epoch + 1, 0
        epoch, start = self.epoch, self.step
        for step, batch in enumerate(self.batches.epoch(epoch, start, empty=True), start + 1):
            self.epoch, self.step, self._left = epoch, step, True
            if len(batch):
                yield self._tensors(batch)
        self.epoch, self.step, self._left = epoch + 1, 0, False

    def __getstate__(self) -> NoReturn:
        raise _another_process("a loader to pickle")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and close the files; closing twice is allowed."""
        self.batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was handed out, in numbers and strings, for a checkpoint."""
        skipped = {row.position: row.reason for row in self.batches.skipped}
        return {"epoch": self.epoch, "step": self.step, "skipped": skipped, **self._run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin at a position; nothing before it is read or decoded.

        The number of ranks may be another if ``ranks * batch_size`` is the same.

        Raises:
            PipelineError: The state is no such position, or one of other records, seed, order or batches.
        """
        for name, here in self._run.items():
            if state.get(name) != here:
                raise PipelineError(
                    f"the state is of another run: {name!r} differs",
                    expected=repr(here),
                    got=repr(state.get(name)),
                    remedy="open the loader as the run did that saved the state, or start over without it",
                )
        check_range("epoch", state["epoch"], 0, MAX_EPOCH)
        check_range("step", state["step"], 0, len(self))
        self.batches.add_skipped({int(position): why for position, why in state["skipped"].items()})
        self.epoch, self.step, self._left = state["epoch"], state["step"], False

    def _tensors(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        images = self._image_tensor(batch.image).permute(0, 3, 1, 2)
        labels = torch.from_numpy(batch.label.astype(np.int64))
        if batch.mix_label is None:
            return images, labels
        return images, labels, torch.from_numpy(batch.mix_label.astype(np.int64)), torch.from_numpy(batch.mix_weight)

    def _image_tensor(self, image: NDArray[np.uint8]) -> torch.Tensor:
        """Return a tensor that shares the memory of an array, or a pinned copy if the memory is not and should be."""
        if isinstance(image.base, torch.Tensor):
            return image.base  # of _pinned_array: torch must see its own tensor to know of copies from it
        tensor = torch.from_numpy(image)
        return tensor.pin_memory() if self._pin else tensor


def _another_process(got: str) -> PipelineError:
    return PipelineError(
        "a TorchLoader decodes in threads and cannot go to another process",
        expected="num_workers=0",
        got=got,
        remedy="iterate over the loader itself, or over DataLoader(loader, batch_size=None); to set the number of "
        "threads, open the loader with workers=",
    )


def _pinned_array(*shape: int) -> NDArray[np.uint8]:
    """Allocate pinned memory. Torch uses it again once it is free and no copy from it to a device is under way."""
    array: NDArray[np.uint8] = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
    return array


def _rank() -> dict[str, int]:
    """Return the rank and the number of ranks by ``torch.distributed``, and those of this machine by torchrun.

    Raises:
        PipelineError: A launcher started several ranks, and ``torch.distributed`` is not initialised.
    """
    if distributed.is_available() and distributed.is_initialized():
        return {
            "rank": distributed.get_rank(),
            "ranks": distributed.get_world_size(),
            "local_ranks": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        }
    if (started := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise PipelineError(
            "every rank would read all records: torch.distributed is not initialised",
            expected=f"the {started} ranks that WORLD_SIZE names",
            got="1 rank",
            remedy="call torch.distributed.init_process_group() first, or give rank= and ranks=",
        )
    return {}
