"""One stream of random numbers per sequence, addressed by position instead of consumed in order."""

import numpy as np

_SEED_MASK = 2**64 - 1


def uniform_at(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to output position `position` of the stream `seed`.

    uniform = (w >> 11) / 2**53, where w is the first 64-bit word of `numpy.random.Philox(key=seed mod 2**64,
    counter=position)`. A pure function: the batch, a preemption or the rank that asks cannot change it.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); numpy keeps its bit streams stable.
    """
    word = np.random.Philox(key=seed & _SEED_MASK, counter=position).random_raw()
    return float(word >> 11) * 2.0**-53
