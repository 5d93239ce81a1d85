"""C++ operators for MobileNetV2 on a CPU: whether they are here, and a direct way to call them.

The library is plain C, built by the package's own build; `docs/kernels.md` lists its operators. This module loads it
with ctypes and imports no MindSpore; `mbv2.kernels.operators` makes MindSpore operators of it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imnet_prep.errors import TrainError

ENVIRONMENT = "MBV2_KERNELS"
"""Set to "standard" to hide the operators: everything then runs on MindSpore's own."""

INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avx2", "neon", "baseline")
ISA_ENVIRONMENT = "MBV2_ISA"
"""Names the instruction set to use in place of the best that this processor has, for tests."""

_REMEDY = "install a C++17 compiler such as g++, then `pip install` this package again"

_TYPE_NAMES = {"uint16": "bfloat16"}

LIBRARY = Path(__file__).parent / "mbv2_kernels.so"


def available() -> bool:
    """Whether the C++ operators are built, loadable and not hidden."""
    return _problem() is None


def describe() -> str:
    """One line that names the operators in use, or says why they are not and what to do."""
    problem = _problem()
    if problem is not None:
        return f"standard operators ({problem})"
    library = _library()
    return f"C++ operators ({library.mbv2_instruction_set().decode()}, {library.mbv2_threads()} threads)"


def threads() -> int:
    """How many threads the operators use."""
    return int(_library().mbv2_threads())


def instruction_set() -> str:
    """Return the instruction set that the operators use, or an empty text where they are not available."""
    return _library().mbv2_instruction_set().decode() if available() else ""


def set_threads(count: int) -> None:
    """Use `count` threads, or, with 0, as many as this process may use. Results keep their bits at the same count.

    Raises:
        TrainError: The system starts fewer threads.
    """
    started = _library().mbv2_set_threads(count)
    if started < count:
        raise TrainError(
            "the system starts no more threads",
            expected=f"{count}",
            got=f"{started}",
            remedy="raise the limit (ulimit -u)",
        )


def call(name: str, inputs: Sequence[NDArray[np.generic]], outputs: Sequence[NDArray[np.generic]]) -> None:
    """Run an operator on NumPy arrays.

    Args:
        name: Without the prefix, as in `docs/kernels.md`.
        inputs: C-contiguous arrays in the operator's order; NumPy has no bfloat16, so its bits come as uint16.
        outputs: C-contiguous arrays that it fills.

    Raises:
        TrainError: There is no such operator, or it refuses a shape or type; the message is the operator's own.
    """
    arrays = [*inputs, *outputs]
    for array in arrays:
        if not array.flags.c_contiguous:
            raise TrainError(f"operator {name}", expected="C-contiguous arrays", got=f"strides {array.strides}")
    function = getattr(_library(), f"mbv2_{name}", None)
    if function is None:
        raise TrainError(f"no operator called {name}", remedy="see docs/kernels.md for their names")
    count = len(arrays)
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    code = function(
        count,
        (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
        (ctypes.c_int * count)(*(array.ndim for array in arrays)),
        (ctypes.POINTER(ctypes.c_int64) * count)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes)),
        (ctypes.c_char_p * count)(*(_TYPE_NAMES.get(array.dtype.name, array.dtype.name).encode() for array in arrays)),
        None,
        None,
    )
    if code != 0:
        raise TrainError(_library().mbv2_last_error().decode())


@contextmanager
def explained() -> Iterator[None]:
    """Raise an operator's own message where MindSpore, which ran it, says only that it failed.

    Raises:
        TrainError: An operator refused its inputs or ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        why = _library().mbv2_take_error().decode() if available() else ""
        if not why:
            raise
        raise TrainError(f"operator {why}", remedy=f"{ENVIRONMENT}=standard does without these operators") from error


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.mbv2_last_error.restype = ctypes.c_char_p
    library.mbv2_take_error.restype = ctypes.c_char_p
    library.mbv2_instruction_set.restype = ctypes.c_char_p
    wanted, chosen = os.environ.get(ISA_ENVIRONMENT), library.mbv2_instruction_set().decode()
    if wanted and wanted != chosen:
        known = wanted in INSTRUCTION_SETS
        raise TrainError(
            f"{ISA_ENVIRONMENT}={wanted} cannot be used",
            expected=f"one of {', '.join(INSTRUCTION_SETS)}",
            got="an instruction set that this processor has not" if known else "an unknown one",
        )
    return library


def _problem() -> str | None:
    """Why the operators cannot be used, or None."""
    if os.environ.get(ENVIRONMENT) == "standard":
        return f"the C++ operators are switched off by {ENVIRONMENT}=standard"
    if not LIBRARY.exists():
        return f"the C++ operators are not built: {_REMEDY}"
    try:
        _library()
    except OSError as error:
        return f"the C++ operators do not load here, {error}: {_REMEDY}"
    return None
