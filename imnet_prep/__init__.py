"""Turn any copy of ImageNet into verified MindRecord shards, and read them as batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imnet_prep.loader.adapters import to_dataset
    from imnet_prep.loader.batches import open_batches
    from imnet_prep.loader.options import EvalOptions, TrainOptions

__all__ = ["EvalOptions", "TrainOptions", "open_batches", "to_dataset"]


def __getattr__(name: str) -> Any:
    """Import the loader when one of its names is first used: most commands do not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"open_batches": "batches", "to_dataset": "adapters"}.get(name, "options")
    return getattr(import_module(f"imnet_prep.loader.{module}"), name)
