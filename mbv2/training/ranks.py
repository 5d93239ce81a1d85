"""What several processes under ``msrun`` do together besides a training step."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import ImnetError, TrainError
from mbv2.runtime import runtime

Result = TypeVar("Result")
SAME = "start every rank with the same options and the same records"
_HALF = 1 << 12
_PART = 1 << 20  # numbers that are sent at a time: one shape, one compiled graph


@cache
def _sum_cell() -> Any:
    from mindspore import nn, ops

    class Sum(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = ops.AllReduce()

        def construct(self, x: Any) -> Any:
            return self.reduce(x)

    return Sum()


def sum_floats(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Add a float32 array up over all ranks; every rank must call it, and gets the sum."""
    if runtime().ranks == 1:
        return values
    import mindspore as ms

    total: NDArray[np.float32] = _sum_cell()(ms.Tensor(values)).asnumpy()
    return total


def sum_counts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Add counts up to 2**35 over all ranks, exactly: MindSpore adds up only float32 on a CPU, so in two halves."""
    high, low = values // _HALF, values % _HALF
    halves = sum_floats(np.stack([high, low]).astype(np.float32)).astype(np.int64)
    total: NDArray[np.int64] = halves[0] * _HALF + halves[1]
    return total


def wait_for_all() -> None:
    """Wait until every rank has called it."""
    sum_floats(np.zeros(1, np.float32))


def from_first(what: str, make: Callable[[], Result]) -> Result:
    """Return on every rank what the first one makes, or raise its error; every rank must call it.

    Only the first rank's machine needs to hold what ``make`` reads. No rank goes on before all have called it.

    Args:
        what: A name for it, the same on every rank.
        make: Called on the first rank alone. What it returns must be picklable.

    Raises:
        ImnetError: ``make`` did, on the first rank.
        TrainError: The first rank is about to do something else: its options are others.
    """
    here = runtime()
    if here.ranks == 1:
        return make()
    data = b""
    if here.rank == 0:
        outcome: object
        try:
            outcome = make()
        except ImnetError as error:
            outcome = error
        data = pickle.dumps((what, outcome))
    first, outcome = pickle.loads(_bytes_from_first(data))
    if first != what:
        raise TrainError(
            f"rank {here.rank} was started with other options than the first", expected=first, got=what, remedy=SAME
        )
    if isinstance(outcome, ImnetError):
        raise outcome
    return outcome  # type: ignore[return-value]


def refuse_others(first: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse to train where a rank would compute something else than the first; every rank must call it.

    Args:
        first: The identity of the run, on the first rank.
        mine: The same on this rank.

    Raises:
        TrainError: They differ, on this rank or on another one.
    """
    here, differing = runtime(), [name for name in first if mine.get(name) != first[name]]
    others = int(sum_floats(np.array([len(differing) > 0], np.float32))[0])
    if differing:
        name = differing[0]
        raise TrainError(
            f"rank {here.rank} was started for another run than the first: {', '.join(differing)} differ",
            expected=f"{name} {first[name]!r}",
            got=f"{mine.get(name)!r}",
            remedy=SAME,
        )
    if others:
        raise TrainError(f"{others} of the other ranks would train another run", remedy=f"see their logs; {SAME}")


def _bytes_from_first(data: bytes) -> bytes:
    """Return the bytes that the first rank has; the others give none."""
    size = int(sum_counts(np.array([len(data)]))[0])
    parts = []
    for start in range(0, size, 2 * _PART):
        numbers = np.frombuffer(data[start : start + 2 * _PART].ljust(2 * _PART, b"\0"), "<u2")
        parts.append(sum_floats(numbers.astype(np.float32)).astype("<u2").tobytes())
    return b"".join(parts)[:size]
