"""Where chance comes from."""

import numpy as np


def draws(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Draws of their own for each purpose and each load: no load repeats another's prompts, and more of one thing
    changes no other."""
    return np.random.default_rng([seed, index, *purpose.encode()])
