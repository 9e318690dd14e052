"""Ops over the native module: weights packed once, then read at the speed of memory.

Importing this package imports the native module; where that fails, `kernels.dispatch` says so and goes without.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from headrace.kernels.cpu.activation import Activate
from headrace.kernels.cpu.attention import Attention
from headrace.kernels.cpu.context_share import ContextShare
from headrace.kernels.cpu.kv_cache import kv_cache_num_bytes, make_kv_cache, read_kv
from headrace.kernels.cpu.linear import Embedding, Linear
from headrace.kernels.cpu.machine_ops import MachineOps
from headrace.kernels.cpu.mixture import Mixture
from headrace.kernels.cpu.norm import Norm
from headrace.kernels.cpu.packing import make_weight_builder, quantize_rows, weight_num_bytes, weight_rows
from headrace.kernels.cpu.rotary import RotaryStoreKv, RotaryTable
from headrace.kernels.cpu.sampling import Sampling
from headrace.kernels.cpu.stream import Stream, join_replays
from headrace.kernels.cpu.targets import (
    best_target,
    has_float16_tiles,
    kernels_digest,
    set_num_threads,
    supported_targets,
)
from headrace.kernels.dataflow import Dataflow

__all__ = [
    "Activate",
    "Attention",
    "ContextShare",
    "Embedding",
    "Linear",
    "MachineOps",
    "Mixture",
    "Norm",
    "RotaryStoreKv",
    "RotaryTable",
    "Sampling",
    "Stream",
    "best_target",
    "has_float16_tiles",
    "join_replays",
    "kernels_digest",
    "kv_cache_num_bytes",
    "make_kv_cache",
    "make_ops",
    "make_weight_builder",
    "quantize_rows",
    "read_kv",
    "set_num_threads",
    "supported_targets",
    "weight_num_bytes",
    "weight_rows",
]


def make_ops(
    target: str, stream: Stream, dataflow: Dataflow, *, batch_invariant: bool = True
) -> dict[str, Callable[..., Any]]:
    """The ops that are native, by name, on one instruction set and launched on one stream.

    dataflow: asked by the linear op for an arm, and by attention for the number of pieces.
    batch_invariant: see `Linear`.

    Raises:
        BackendUnavailable: an instruction set this build or this machine does not have.
    """
    attention, context_share = Attention(target, stream, dataflow), ContextShare(target, stream)
    norm, activate, sampling = Norm(target, stream), Activate(target, stream), Sampling(target, stream)
    return {
        "linear": Linear(target, stream, dataflow, batch_invariant=batch_invariant),
        "embedding": Embedding(stream),
        "rms_norm": norm.rms_norm,
        "layer_norm": norm.layer_norm,
        "add_": norm.add_,
        "rotary_table": RotaryTable(stream),
        "rotary_store_kv_": RotaryStoreKv(target, stream),
        "attention": attention,
        "attention_share": attention.share,
        "join_heads": context_share.join_heads,
        "weigh_share": context_share.weigh_share,
        "mixture": Mixture(target, stream, dataflow, batch_invariant=batch_invariant),
        "make_kv_cache": make_kv_cache,
        "kv_cache_num_bytes": kv_cache_num_bytes,
        "read_kv": read_kv,
        "activation": activate.activation,
        "gated_activation": activate.gated_activation,
        "argmax": sampling.argmax,
        "log_sum_exp": sampling.log_sum_exp,
        "top_k": sampling.top_k,
        "make_weight_builder": partial(make_weight_builder, target=target),
        "quantize_rows": partial(quantize_rows, target=target),
        "weight_num_bytes": weight_num_bytes,
        "weight_rows": weight_rows,
        "record": stream.record,
    }
