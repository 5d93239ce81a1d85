"""ImageNet as people have it, to verified MindRecord shards, to batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imnet_prep.loader.batches import EvalOptions, TrainOptions, open_batches, to_dataset

__all__ = ["EvalOptions", "TrainOptions", "open_batches", "to_dataset"]


def __getattr__(name: str) -> Any:
    """Load the pipeline when it is asked for: commands that need no batch do not pay for it."""
    if name in __all__:
        from imnet_prep.loader import batches as pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
