"""Attention over Llama-2-7B's heads, Llama-3-8B's grouped heads, and head sizes that are no powers of two."""

import inspect
from typing import Any

import torch

from headrace.config import KvCacheFormat
from headrace.kernels.triton.attention_arguments import Heads, SoftmaxKind
from headrace.kernels.triton.attention_decode import split_kernel
from headrace.kernels.triton.attention_library import MAX_SEQS, gather_kernel
from headrace.kernels.triton.attention_merge import merge_kernel, repair_kernel
from headrace.kernels.triton.attention_prefill import prefill_kernel
from headrace.kernels.triton.attention_rows import UNALIGNED
from headrace.kernels.triton.attention_tiles import DecodeShape, decode_tiles, prefill_tiles
from headrace.kernels.triton.context_share import weigh_share_kernel
from headrace.kernels.triton.rotary import rotary_table_kernel
from headrace.kernels.triton.rotary_store import StoredHeads, rotary_store_kernel
from headrace.kernels.triton.softmax import ASYNCHRONIZED, LAZY, SYNCHRONIZED
from triton_variants import Variant

_DIVISIBLE = ("query_stride", "query_token_stride", "key_token_stride", "value_token_stride")
_UNALIGNED = (*UNALIGNED, "slots_ptr", "positions_ptr")
_FLOATS = ("scale2", "cap2", "unified_max2", "least2", "largest2", "amplitude")


def _signature(kernel: Any, cache: str, query: str = "bf16") -> dict[str, str]:
    types = {"query_ptr": query, "key_ptr": query, "value_ptr": query, "out_ptr": query}
    types |= dict.fromkeys(("gathered_keys_ptr", "gathered_values_ptr"), query)
    types |= dict.fromkeys(("keys_ptr", "values_ptr", "key_cache_ptr", "value_cache_ptr"), cache)
    types |= dict.fromkeys(
        ("tables_ptr", "context_lens_ptr", "bounds_ptr", "owned_ptr", "unsound_ptr", "gathered_bounds_ptr"), "i32"
    )
    types |= dict.fromkeys(("counts_ptr", "positions_ptr", "slots_ptr"), "i64")
    names = [name for name in inspect.signature(kernel.fn).parameters if not name.isupper()]
    return {
        name: f"*{types.get(name, 'fp32')}" if name.endswith("_ptr") else "fp32" if name in _FLOATS else "i32"
        for name in names
    }


_HOPPER, _AMPERE, _AMD = ("sm_90",), ("sm_80",), ("gfx942",)

_INSTRUCTIONS = {
    split_kernel: ("cp.async.cg.shared.global", "mma.sync.aligned.m16n8k16"),
    prefill_kernel: ("cp.async.cg.shared.global", "wgmma.mma_async"),
    merge_kernel: ("cp.async.cg.shared.global",),
    repair_kernel: ("mma.sync.aligned.m16n8k16",),
}
"""Copies of 16 bytes past the registers, and tensor cores, for all but float32."""


def _heads(
    kernel: Any,
    name: str,
    cache: str,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    *,
    query: torch.dtype = torch.bfloat16,
    scheme: int = SYNCHRONIZED.value,
    has_cap: bool = False,
    is_strict: bool = False,
    is_share: bool = False,
    targets: tuple[str, ...] = ("sm_90", "sm_80", "gfx942"),
    is_rare: bool = False,
    **constants: Any,
) -> Variant:
    shape = DecodeShape.of(group)
    cache_format = KvCacheFormat.INT8 if cache == "i8" else KvCacheFormat.BFLOAT16
    tiles = decode_tiles(query, head_dim, cache_format)
    if kernel is prefill_kernel:
        tiles = prefill_tiles(query, head_dim, cache_format, has_warpgroups=targets == _HOPPER)
    known = {
        "SEQS": 64,
        "HEADS": Heads(
            num_kv_heads=num_kv_heads,
            group=group,
            head_dim=head_dim,
            block_d=128 if head_dim in (80, 96) else head_dim,
            block_size=16,
            is_int8=cache == "i8",
            is_share=is_share,
        ),
        "SOFTMAX": SoftmaxKind(scheme=scheme, has_cap=has_cap, is_strict=is_strict),
        "SCHEME": scheme,
        "SHAPE": shape,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "MAX_TOKENS": shape.max_tokens,
        "TOKEN_SLOTS": 1,
        "UNIT": 128 if cache != "fp32" and head_dim <= 128 else 64,
        "HAS_WINDOW": False,
        "REPAIRS": False,
        "STAGES": tiles.stages,
    } | constants
    return Variant(
        name=f"{name}-{cache}-{num_kv_heads}x{group}x{head_dim}",
        kernel=kernel,
        signature=_signature(kernel, cache, "fp32" if query is torch.float32 else "bf16"),
        constexprs={key: value for key, value in known.items() if key in kernel.arg_names},
        num_warps=tiles.num_warps,
        divisible=_DIVISIBLE,
        indivisible=_UNALIGNED,
        targets=targets,
        instructions=() if query is torch.float32 else _INSTRUCTIONS[kernel],
        is_rare=is_rare,
    )


def _store(cache: str, half: int, head_dim: int, *, interleaved: bool = False) -> Variant:
    return Variant(
        name=f"rotary-store-{cache}-{half}-of-{head_dim}",
        kernel=rotary_store_kernel,
        signature=_signature(rotary_store_kernel, cache),
        constexprs={
            "HEADS": StoredHeads(
                num_heads=32,
                num_kv_heads=8,
                head_dim=head_dim,
                half=half,
                block_size=16,
                interleaved=interleaved,
                is_int8=cache == "i8",
            ),
            "QUERY_PROGRAMS": 4 if half else 0,
            "PROGRAM_HEADS": 8,
        },
        divisible=_DIVISIBLE,
        indivisible=_UNALIGNED,
    )


def _gather(cache: str) -> Variant:
    return Variant(
        name=f"gather-{cache}-8x4x128",
        kernel=gather_kernel,
        signature=_signature(gather_kernel, cache),
        constexprs={
            "SEQS": MAX_SEQS,
            "NUM_KV_HEADS": 8,
            "HEAD_DIM": 128,
            "BLOCK_D": 128,
            "BLOCK_SIZE": 16,
            "BLOCK_N": 32,
            "MAX_TOKENS": 2,
            "IS_INT8": cache == "i8",
        },
        indivisible=_UNALIGNED,
        targets=_HOPPER,
        instructions=("ld.global.v4", "st.global.v4"),
    )


_ASYNCHRONIZED, _LAZY = ASYNCHRONIZED.value, LAZY.value


def _prefill(name: str, *heads: Any, targets: tuple[str, ...] = _HOPPER, **how: Any) -> Variant:
    """For one kind of GPU: tiles differ."""
    return _heads(prefill_kernel, f"prefill{name}", *heads, targets=targets, **how)


VARIANTS = [
    _heads(split_kernel, "split", "bf16", 32, 1, 128),
    _heads(split_kernel, "split-lazy", "bf16", 8, 4, 128, scheme=_LAZY, targets=_HOPPER),
    _heads(split_kernel, "split", "i8", 8, 4, 128, targets=_HOPPER),
    _heads(split_kernel, "split-by-one-stage", "i8", 8, 4, 128, STAGES=1, targets=_AMD),
    _heads(split_kernel, "split", "fp32", 8, 4, 128, query=torch.float32, targets=_HOPPER),
    _heads(split_kernel, "split-capped", "bf16", 8, 2, 256, has_cap=True, targets=_HOPPER),
    _heads(split_kernel, "split-strict", "bf16", 32, 1, 80, scheme=_ASYNCHRONIZED, is_strict=True, targets=_HOPPER),
    _heads(merge_kernel, "merge", "bf16", 8, 4, 128, targets=_HOPPER),
    _heads(merge_kernel, "merge-asynchronized", "bf16", 8, 4, 128, scheme=_ASYNCHRONIZED),
    _heads(repair_kernel, "repair", "bf16", 8, 4, 128),
    _prefill("", "bf16", 32, 1, 128),
    _prefill("", "i8", 8, 4, 128),
    _prefill("-ampere", "bf16", 32, 1, 128, targets=_AMPERE),
    _prefill("-ampere", "i8", 8, 4, 128, targets=_AMPERE),
    _prefill("-amd", "bf16", 32, 1, 128, STAGES=2, targets=_AMD),
    _prefill("-amd", "i8", 8, 4, 128, STAGES=1, targets=_AMD, is_rare=True),
    _prefill("", "fp32", 8, 4, 128, query=torch.float32),
    _prefill("-asynchronized", "bf16", 8, 4, 128, scheme=_ASYNCHRONIZED),
    _prefill("-asynchronized", "i8", 8, 4, 128, scheme=_ASYNCHRONIZED, is_rare=True),
    _prefill("-asynchronized-ampere", "i8", 8, 4, 128, scheme=_ASYNCHRONIZED, targets=_AMPERE, is_rare=True),
    _prefill("-repair", "bf16", 8, 4, 128, REPAIRS=True, is_rare=True),
    _prefill("-repair", "i8", 8, 4, 128, REPAIRS=True, is_rare=True),
    _prefill("-lazy", "bf16", 8, 4, 128, scheme=_LAZY, is_rare=True),
    _prefill("-capped", "bf16", 8, 2, 256, has_cap=True, HAS_WINDOW=True),
    _prefill("-capped", "i8", 8, 2, 256, has_cap=True, HAS_WINDOW=True, is_rare=True),
    _prefill("-capped-ampere", "i8", 8, 2, 256, has_cap=True, HAS_WINDOW=True, targets=_AMPERE, is_rare=True),
    _prefill("-share", "bf16", 1, 8, 128, is_share=True),
    _gather("bf16"),
    _gather("i8"),
    _store("bf16", 64, 128),
    _store("i8", 40, 80, interleaved=True),
    Variant(
        name="weigh-share",
        kernel=weigh_share_kernel,
        signature={"numerators_ptr": "*fp32", "normalizers_ptr": "*fp32", "out_ptr": "*bf16"}
        | dict.fromkeys(("rank", "num_tokens"), "i32"),
        constexprs={
            "NUM_RANKS": 3,
            "RANKS": 4,
            "NUM_HEADS": 12,
            "PART_HEADS": 4,
            "HEADS": 8,
            "HEAD_DIM": 128,
            "BLOCK_D": 128,
        },
        targets=_HOPPER,
    ),
    Variant(
        name="rotary-table",
        kernel=rotary_table_kernel,
        signature=_signature(rotary_table_kernel, "bf16"),
        constexprs={"HALF": 64, "BLOCK_HALF": 64},
        num_warps=1,
        targets=_HOPPER,
    ),
]
