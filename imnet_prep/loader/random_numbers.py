"""Random numbers keyed by (seed, epoch, record id): the same draws at any worker count, order or restart.

A counter-based generator has no state to share or to save: the key is the seed, the counter says what the draw is for.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10), checked in the tests
against the authors' known-answer vectors.
"""

import enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = np.arange(10, dtype=np.uint64)[:, None]
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
MAX_SEED = (1 << 64) - 1
MAX_EPOCH = (1 << 32) - 1


class Stream(enum.IntEnum):
    """The purpose of a draw. It is the last word of the counter, so that no two purposes share numbers."""

    ORDER = 0
    FLIP = 1
    COLOUR = 2  # brightness, contrast, saturation, hue factors
    COLOUR_ORDER = 3
    ERASE = 4
    MIX = 5
    WINDOW = 6  # places of rows among those of the shards beside theirs
    CLASS_ORDER = 7  # the order of a class's records in balanced sampling
    CLASS = 8  # which classes get one record more than others
    TRIVIALAUGMENT = 9
    MIX_CHANCE = 10  # whether a batch is mixed at all
    CROP = 16  # one per attempt
    ERASE_BOX = 32  # one per attempt
    RANDAUGMENT = 64  # one per operation


def philox(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Encrypt counters under a key: Philox4x32 with 10 rounds.

    Args:
        counter: uint32 (..., 4).
        key: uint32 (2,).

    Returns:
        uint32 (..., 4), uniform bits.
    """
    words = counter.reshape(-1, 4).T
    even, odd = words[::2], words[1::2]
    for round_key in (key + _ROUNDS * _WEYL).astype(np.uint32)[..., None]:
        products = np.multiply(even, _MULTIPLIERS, order="C").view("<u4").reshape(2, -1, 2)[::-1]  # low and high words
        even, odd = products[..., 1] ^ odd ^ round_key, products[..., 0]
    return np.asarray(np.stack([even, odd], axis=1).reshape(4, -1).T.reshape(counter.shape), dtype=np.uint32)


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
    counter[..., 0] = (ids & np.uint64(0xFFFFFFFF))[:, None]
    counter[..., 1] = (ids >> np.uint64(32))[:, None]
    counter[..., 2] = epoch
    counter[..., 3] = stream
    found = philox(counter, np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
    return found if stream.ndim else found[:, 0]


def uniforms(seed: int, epoch: int, ids: NDArray[np.uint64], streams: ArrayLike) -> NDArray[np.float64]:
    """Draw four numbers in the open interval (0, 1) for each id and stream: float64, shaped as :func:`bits`."""
    return (bits(seed, epoch, ids, streams) + 0.5) * 2.0**-32


def order_keys(seed: int, epoch: int, ids: NDArray[np.uint64], stream: Stream = Stream.ORDER) -> NDArray[np.uint64]:
    """Return the uint64 (N,) keys whose ascending order is the epoch's permutation of ``ids``."""
    keys = np.empty(len(ids), dtype=np.uint64)
    for start in range(0, len(ids), 1 << 16):  # in pieces that stay in cache
        words = bits(seed, epoch, ids[start : start + (1 << 16)], stream).astype(np.uint64)
        keys[start : start + (1 << 16)] = words[:, 0] | (words[:, 1] << np.uint64(32))
    return keys
