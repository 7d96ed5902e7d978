"""Random signs in Triton: csrc/common/philox.h says which, and they are the same."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sign_bits(seed, stream, element):
    """In the lowest bit 1 for a minus; above it, the bits of what follows in its 32 elements."""
    block = element >> 7
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero)
    lower = tl.where((element & 32) != 0, w1, w0)
    upper = tl.where((element & 32) != 0, w3, w2)
    return tl.where((element & 64) != 0, upper, lower) >> (element & 31).to(tl.uint32)


@triton.jit
def to_signs(bits):
    """1.0, or -1.0 where the lowest bit is set."""
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)
