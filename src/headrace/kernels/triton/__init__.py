"""Ops in Triton, for GPUs; Triton's interpreter runs the same code on a CPU, for tests.

Importing this package imports Triton; where that fails, `kernels.dispatch` says so.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from headrace.kernels.dataflow import Dataflow
from headrace.kernels.triton.activation import activation, gated_activation
from headrace.kernels.triton.attention import Attention
from headrace.kernels.triton.attention_library import prefill_library_obstacle
from headrace.kernels.triton.context_share import weigh_share
from headrace.kernels.triton.dataflow import TritonMachine, tuning_key
from headrace.kernels.triton.gather import embedding
from headrace.kernels.triton.graphs import GraphRecorder
from headrace.kernels.triton.kv_cache import kv_cache_num_bytes, make_kv_cache, read_kv
from headrace.kernels.triton.launch import check_device
from headrace.kernels.triton.linear import Linear
from headrace.kernels.triton.machine_ops import MachineOps
from headrace.kernels.triton.mixture import Mixture
from headrace.kernels.triton.norm import add_, layer_norm, rms_norm
from headrace.kernels.triton.rotary import rotary_table
from headrace.kernels.triton.rotary_store import rotary_store_kv_
from headrace.kernels.triton.sampling import argmax, log_sum_exp, top_k
from headrace.kernels.triton.weights import make_weight_builder, weight_num_bytes, weight_rows

__all__ = ["MachineOps", "TritonMachine", "check_device", "make_ops", "prefill_library_obstacle", "tuning_key"]


def make_ops(device: torch.device, dataflow: Dataflow | None = None) -> dict[str, Callable[..., Any]]:
    """The ops that are written in Triton, by name, for tensors on a device.

    dataflow: asked by the linear op for an implementation and its tiles, by mixtures for theirs, and by attention for
        its number of programs.
    """
    attention = Attention(device, dataflow)
    dataflow = dataflow or Dataflow(TritonMachine(device))
    ops: dict[str, Callable[..., Any]] = {
        "activation": activation,
        "add_": add_,
        "argmax": argmax,
        "gated_activation": gated_activation,
        "layer_norm": layer_norm,
        "log_sum_exp": log_sum_exp,
        "mixture": Mixture(dataflow),
        "rms_norm": rms_norm,
        "top_k": top_k,
        "weigh_share": weigh_share,
        "attention": attention,
        "attention_share": attention.share,
        "kv_cache_num_bytes": kv_cache_num_bytes,
        "make_kv_cache": partial(make_kv_cache, device=device),
        "read_kv": read_kv,
        "rotary_store_kv_": rotary_store_kv_,
        "rotary_table": rotary_table,
        "embedding": embedding,
        "linear": Linear(device, dataflow),
        "make_weight_builder": partial(make_weight_builder, device=device),
        "weight_num_bytes": weight_num_bytes,
        "weight_rows": weight_rows,
    }
    if device.type == "cuda":
        ops["record"] = GraphRecorder(device).record
    return ops
