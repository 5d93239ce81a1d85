"""Random numbers keyed by (seed, epoch, record id): the same draws at any worker count, order or restart.

A counter-based generator has no state to share or to save: the key is the seed, the counter is what the draw is for.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10), checked in the tests
against the authors' known-answer vectors.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 10
_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
MAX_SEED = (1 << 64) - 1
MAX_EPOCH = (1 << 32) - 1


class Stream(enum.IntEnum):
    """What a draw is for; the last word of the counter, so that no two purposes share numbers."""

    ORDER = 0
    FLIP = 1
    COLOUR = 2  # brightness, contrast, saturation, hue factors
    COLOUR_ORDER = 3
    ERASE = 4
    MIX = 5
    WINDOW = 6  # places inside a window of blocks
    CROP = 16  # one per attempt
    ERASE_BOX = 32  # one per attempt
    RANDAUGMENT = 64  # one per operation


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Encrypt counters under a key: Philox4x32 with 10 rounds.

    Args:
        counter: uint32 (..., 4).
        key: uint32 (..., 2), broadcast against the counters.

    Returns:
        uint32 (..., 4), uniform bits.
    """
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = (key[..., word].astype(np.uint64) for word in range(2))
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def bits(seed: int, epoch: int, ids: NDArray[np.uint64], streams: ArrayLike) -> NDArray[np.uint32]:
    """Draw 4 x 32 bits for each id and stream.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        ids: uint64 (N,), record ids.
        streams: int (S,) or a scalar, see :class:`Stream`.

    Returns:
        uint32 (N, S, 4), or (N, 4) for a scalar stream.
    """
    stream = np.asarray(streams, dtype=np.uint32)
    counter = np.empty((len(ids), stream.size, 4), dtype=np.uint32)
    counter[..., 0] = (ids & _MASK)[:, None]
    counter[..., 1] = (ids >> _SHIFT)[:, None]
    counter[..., 2] = np.uint32(epoch)
    counter[..., 3] = stream
    found = philox(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
    return found if stream.ndim else found[:, 0]


def uniforms(seed: int, epoch: int, ids: NDArray[np.uint64], streams: ArrayLike) -> NDArray[np.float64]:
    """Draw four numbers in the open interval (0, 1) for each id and stream; see :func:`bits` for the shapes."""
    return (bits(seed, epoch, ids, streams) + 0.5) * 2.0**-32


def order_keys(seed: int, epoch: int, ids: NDArray[np.uint64], stream: Stream = Stream.ORDER) -> NDArray[np.uint64]:
    """Return the uint64 (N,) keys whose ascending order is the epoch's permutation of ``ids``."""
    keys = np.empty(len(ids), dtype=np.uint64)
    for start in range(0, len(ids), 1 << 16):  # in pieces: the working set of a million records stays in cache
        words = bits(seed, epoch, ids[start : start + (1 << 16)], stream).astype(np.uint64)
        keys[start : start + (1 << 16)] = words[:, 0] | (words[:, 1] << _SHIFT)
    return keys
