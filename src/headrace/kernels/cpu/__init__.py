"""Ops over the native module: weights packed once, then read at the speed of memory.

Importing this package imports the native module; where that fails, `kernels.dispatch` says so and goes without.
"""

from headrace.kernels.cpu.attention import Attention
from headrace.kernels.cpu.kv_cache import kv_cache_num_bytes, make_kv_cache, read_kv
from headrace.kernels.cpu.linear import Linear, embedding
from headrace.kernels.cpu.packing import make_weight_builder, weight_num_bytes
from headrace.kernels.cpu.rotary import RotaryStoreKv, rotary_table
from headrace.kernels.cpu.targets import best_target, set_num_threads, supported_targets

__all__ = [
    "Attention",
    "Linear",
    "RotaryStoreKv",
    "best_target",
    "embedding",
    "kv_cache_num_bytes",
    "make_kv_cache",
    "make_weight_builder",
    "read_kv",
    "rotary_table",
    "set_num_threads",
    "supported_targets",
    "weight_num_bytes",
]
