"""The same attention by others: torch's SDPA and FlexAttention, and FlashInfer where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from scripts.gpu_check.attention_cases import BLOCK_SIZE, Case, Paged
from scripts.gpu_check.context import Context

SDPA, FLEX, FLASHINFER = "torch SDPA", "FlexAttention", "FlashInfer"


def peers(context: Context, case: Case, paged: Paged, flex: CompiledFlex) -> dict[str, list[Callable[[], Tensor]]]:
    """The same work by others: torch's on keys and values that lie in order, FlashInfer's on pages."""
    group = case.shape.num_heads // case.shape.num_kv_heads
    size = (case.batch, case.shape.num_kv_heads, case.context_len, case.shape.head_dim)
    query = context.randn(case.batch, case.shape.num_heads, case.num_new, case.shape.head_dim)
    pairs = [(context.randn(*size), context.randn(*size)) for _ in paged.caches]
    runs: dict[str, list[Callable[[], Tensor]]] = {
        SDPA: [
            partial(F.scaled_dot_product_attention, query, k, v, enable_gqa=group > 1, **_causal(case))
            for k, v in pairs
        ]
    }
    if (case.batch, case.context_len) in context.scale.flex:
        try:
            call = flex.for_case(case)
            call(query, *pairs[0])
            runs[FLEX] = [partial(call, query, k, v) for k, v in pairs]
        except Exception as error:
            context.part_failed(FLEX, error)
    if context.device.type == "cuda" and importlib.util.find_spec("flashinfer") is not None:
        try:
            runs[FLASHINFER] = _flashinfer(context, case, paged.query)
        except Exception as error:
            context.part_failed(FLASHINFER, error)
    return runs


def _causal(case: Case) -> dict[str, Any]:
    """torch's own mask lies in the upper left corner, which is another one where a prompt goes on."""
    if case.phase == "chunk":
        return {"attn_mask": causal_lower_right(case.num_new, case.context_len)}
    return {"is_causal": case.phase == "prefill"}


class CompiledFlex:
    """torch's FlexAttention, which is made for a mask by a compiler; uncompiled it is no peer."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._compiled: Callable[..., Tensor] | None = None

    def for_case(self, case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # Each shape is compiled anew; beyond the usual 8 torch would run the rest uncompiled.
        torch._dynamo.config.recompile_limit = 64
        if self._compiled is None:
            backend = self._context.scale.compile_backend
            self._compiled = torch.compile(flex_attention, backend=backend, dynamic=False)
        mask = None
        if case.num_new > 1:
            first = case.context_len - case.num_new
            mask = create_block_mask(
                lambda _b, _h, q, k: k <= q + first, None, None, case.num_new, case.context_len, self._context.device
            )
        is_grouped = case.shape.num_heads > case.shape.num_kv_heads
        return partial(_flex, self._compiled, mask, is_grouped)


def _flex(
    compiled: Callable[..., Tensor], mask: object, is_grouped: bool, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return compiled(query, key, value, block_mask=mask, enable_gqa=is_grouped)


def _flashinfer(context: Context, case: Case, query: Tensor) -> list[Callable[[], Tensor]]:
    """FlashInfer's paged kernels; copies of the cache in its own layout."""
    flashinfer = importlib.import_module("flashinfer")
    shape, device = case.shape, context.device
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    indptr = case.num_blocks * torch.arange(case.batch + 1, dtype=torch.int32, device=device)
    indices = torch.randperm(case.batch * case.num_blocks, dtype=torch.int32, device=device)
    last = torch.full((case.batch,), (case.context_len - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device=device)
    if case.num_new == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            *(indptr, indices, last, shape.num_heads, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE),
            q_data_type=context.dtype,
            kv_data_type=context.dtype,
        )
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        new = case.num_new * torch.arange(case.batch + 1, dtype=torch.int32, device=device)
        wrapper.plan(
            *(new, indptr, indices, last, shape.num_heads, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE),
            causal=True,
            q_data_type=context.dtype,
            kv_data_type=context.dtype,
        )
    size = (case.batch * case.num_blocks, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    caches = [context.randn(*size) for _ in range(context.num_copies(case.num_bytes))]
    return [partial(wrapper.run, query, cache) for cache in caches]
