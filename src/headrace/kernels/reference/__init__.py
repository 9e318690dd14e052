"""Every op in plain torch, accumulated in float32: the definition that other implementations are tested against."""

from headrace.kernels.reference.activation import activation, gated_activation
from headrace.kernels.reference.attention import attention, attention_share
from headrace.kernels.reference.context_share import join_heads, weigh_share
from headrace.kernels.reference.kv_cache import kv_cache_num_bytes, make_kv_cache, read_kv, rotary_store_kv_
from headrace.kernels.reference.linear import (
    embedding,
    linear,
    linear_float16_activations,
    linear_int8_activations,
    weight_rows,
)
from headrace.kernels.reference.machine_ops import MachineOps
from headrace.kernels.reference.moe import mixture, route_experts
from headrace.kernels.reference.norm import add_, layer_norm, rms_norm
from headrace.kernels.reference.quantize import dequantize, quantize_activations, quantize_rows
from headrace.kernels.reference.record import record
from headrace.kernels.reference.rotary import rotary_, rotary_table
from headrace.kernels.reference.sampling import argmax, log_sum_exp, top_k
from headrace.kernels.reference.weight_builder import make_weight_builder, weight_num_bytes

__all__ = [
    "MachineOps",
    "activation",
    "add_",
    "argmax",
    "attention",
    "attention_share",
    "dequantize",
    "embedding",
    "gated_activation",
    "join_heads",
    "kv_cache_num_bytes",
    "layer_norm",
    "linear",
    "linear_float16_activations",
    "linear_int8_activations",
    "log_sum_exp",
    "make_kv_cache",
    "make_weight_builder",
    "mixture",
    "quantize_activations",
    "quantize_rows",
    "read_kv",
    "record",
    "rms_norm",
    "rotary_",
    "rotary_store_kv_",
    "rotary_table",
    "route_experts",
    "top_k",
    "weigh_share",
    "weight_num_bytes",
    "weight_rows",
]
