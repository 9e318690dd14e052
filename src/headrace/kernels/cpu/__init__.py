"""Ops over the native module: weights packed once, then read at the speed of memory.

Importing this package imports the native module; where that fails, `kernels.dispatch` says so and goes without.
"""

from headrace.kernels.cpu.linear import Linear, embedding
from headrace.kernels.cpu.packing import make_weight_builder, weight_num_bytes
from headrace.kernels.cpu.targets import best_target, set_num_threads, supported_targets

__all__ = [
    "Linear",
    "best_target",
    "embedding",
    "make_weight_builder",
    "set_num_threads",
    "supported_targets",
    "weight_num_bytes",
]
