"""The softmax of a tile of logits, with the reference that each scheme chooses (`SoftmaxScheme`).

In base 2: t = log2(e) logits, p = 2^(t - m) for the reference m of a row. Of a tile, m is

    synchronized    the largest t so far; every tile waits for its maximum (FlashDecoding++, arXiv:2311.01282, Eq. 2)
    asynchronized   a constant; what it gave is tested after the sums (Eq. 3 and 4), see `is_sound`
    lazy            an earlier maximum, until a tile's is more than 8 above it (FlashAttention-4)
"""

import triton
import triton.language as tl

from headrace.config import SoftmaxScheme

SYNCHRONIZED: tl.constexpr = tl.constexpr(0)
ASYNCHRONIZED: tl.constexpr = tl.constexpr(1)
LAZY: tl.constexpr = tl.constexpr(2)

SCHEMES = {
    SoftmaxScheme.SYNCHRONIZED: SYNCHRONIZED.value,
    SoftmaxScheme.ASYNCHRONIZED: ASYNCHRONIZED.value,
    SoftmaxScheme.LAZY: LAZY.value,
}

_LAZY_THRESHOLD: tl.constexpr = tl.constexpr(8.0)
_LARGEST_SUM: tl.constexpr = tl.constexpr(2.0**126)
_LEAST_MEAN: tl.constexpr = tl.constexpr(2.0**-102)
_LEAST_MEAN_INT8: tl.constexpr = tl.constexpr(2.0**-64)


@triton.jit
def soft_cap(t, cap2):
    """cap2 * tanh(t / cap2), to a few units of float32's last place of cap2, and relatively so near 0."""
    x = t / cap2
    # 1 - 2 / (e^2x + 1) loses digits near 0; there, the series up to x^9.
    tanh = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return cap2 * tl.where(tl.abs(x) < 0.25, series, tanh)


@triton.jit
def reference_of(m):
    """2^-infinity is 0 whatever m is, but infinity - infinity is not a number: a row without any weight refers to 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def raised(m, sums, acc, t, SCHEME: tl.constexpr):
    """After a tile t: the references m [rows], and sums [rows] or [rows, BLOCK_N] and acc [rows, BLOCK_D] so far,
    referred to them.

    The lazy scheme multiplies only where a row of the tile outgrew its reference: one branch that all threads of a
    program take, as FlashAttention-4's warps do. Rows beside such a row are multiplied by 1, and keep their bits.
    """
    largest = tl.max(t, axis=1)
    if SCHEME == LAZY:
        grew = largest > m + _LAZY_THRESHOLD
        if tl.max(grew.to(tl.int32), axis=0) > 0:
            m, sums, acc = _referred(m, tl.where(grew, largest, m), sums, acc)
    else:
        m, sums, acc = _referred(m, tl.maximum(m, largest), sums, acc)
    return m, sums, acc


@triton.jit
def _referred(m, new, sums, acc):
    factor = tl.exp2(m - reference_of(new))
    sums *= factor if len(sums.shape) == 1 else factor[:, None]
    acc *= factor[:, None]
    return new, sums, acc


@triton.jit
def is_outside(t, unified_max, least, largest):
    """The published test of each logit: t - unified_max strictly between two bounds. What is not seen, -infinity, is
    exempt from the lower one."""
    x = t - unified_max
    return ((x <= least) & (t != float("-inf"))) | (x >= largest)


@triton.jit
def is_sound(numerators, denominator, num_keys, IS_INT8: tl.constexpr):
    """Whether the sums of asynchronized rows are as good as those of synchronized ones, 1 or 0 for each row.

    With n keys: numerators finite and n 2^-102 <= denominator <= 2^126. Each term that float32 lost is below 2^-126,
    all of them below 2^-24 of the sum. For int8, whose values are scaled before they meet p, n 2^-64. NaN is not sound.
    """
    least = num_keys * (_LEAST_MEAN_INT8 if IS_INT8 else _LEAST_MEAN)
    are_finite = tl.min((tl.abs(numerators) < float("inf")).to(tl.int32), axis=-1)
    return are_finite & ((denominator >= least) & (denominator <= _LARGEST_SUM)).to(tl.int32)
