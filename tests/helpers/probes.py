"""Random signs by an implementation of its own: Philox4x32-10 in NumPy, from the paper.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: (counter, key, output) of the authors' library Random123, words in order.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

#: Of either sign, in both halves of the key.
SEEDS = (0, 1, -1, 2**31 + 7, 2**63 + 5, -(2**62) - 3)


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """[N, 4] words of 32 bits (in uint64) -> as many random ones."""
    left, right = counters[:, [0, 2]], counters[:, [1, 3]]
    keys = np.array(key, dtype=np.uint64)
    multipliers = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
    increments = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
    word = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        products = left * multipliers
        high, low = products >> np.uint64(32), products & word
        left, right = high[:, ::-1] ^ right ^ keys, low[:, ::-1]
        keys = (keys + increments) & word
    return np.stack((left[:, 0], right[:, 0], left[:, 1], right[:, 1]), 1)


def bits(seed: int, stream: int, begin: int, end: int) -> np.ndarray:
    """1 for the elements [begin, end) that are negative, else 0."""
    blocks = range(begin // 128, -(-end // 128))
    counters = np.array([(b % 2**32, b // 2**32, stream, 0) for b in blocks], dtype=np.uint64)
    words = philox(counters.reshape(-1, 4), (seed % 2**32, seed // 2**32 % 2**32))
    spread = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
    first = begin // 128 * 128
    return spread[begin - first : end - first]


def signs(like: Tensor, seed: int, stream: int = 0) -> Tensor:
    """float64 signs in the shape of a tensor, numbered as it lies in memory if that is dense."""
    flat = torch.from_numpy(1.0 - 2.0 * bits(seed, stream, 0, like.numel()))
    if not like.is_contiguous() and like.dim() > 1 and like.movedim(1, -1).is_contiguous():
        return flat.view(like.movedim(1, -1).shape).movedim(-1, 1)
    return flat.view(like.shape)
