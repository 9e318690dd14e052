"""Floats as integers of the same order."""

import triton
import triton.language as tl


@triton.jit
def order_key(x):
    """float32 to an int32 of the same order: zeros of both signs are equal, every NaN is the largest.

    The bits of floats that are not negative order as integers; those of negative ones the other way round.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def order_keys(x, ids):
    """int64 keys, no two alike: by `order_key`, and of equals the smaller id is larger.

    id = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    """
    return (order_key(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
