"""The same attention by others: torch's SDPA and FlexAttention, and FlashInfer where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from scripts.gpu_check import attention_flashinfer
from scripts.gpu_check.attention_cases import Case, Paged
from scripts.gpu_check.context import Context

SDPA, FLEX, FLASHINFER = "torch SDPA", "FlexAttention", "FlashInfer"

Call = Callable[[], Tensor]


def peers(context: Context, case: Case, paged: Paged, flex: CompiledFlex) -> dict[str, list[Call]]:
    """The same attention over the same keys and values by others, a call for each cache; one that cannot be had is
    reported. torch's take them in the order of positions, FlashInfer on pages."""
    in_order = cache(partial(_in_order, context, case, paged))
    makers: dict[str, Callable[[], list[Call]]] = {SDPA: lambda: _sdpa(case, *in_order())}
    if (case.batch, case.context_len) in context.scale.flex:
        makers[FLEX] = lambda: flex.calls(case, *in_order())
    if attention_flashinfer.is_installed(context.scale):
        makers[FLASHINFER] = lambda: attention_flashinfer.calls(context, case, paged)
    runs = {}
    for name, make in makers.items():
        try:
            runs[name] = make()
        except Exception as error:
            context.part_failed(name, error)
    return runs


def _in_order(context: Context, case: Case, paged: Paged) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Queries [batch, num_heads, num_new, head_dim], and keys and values of each cache [batch, num_kv_heads,
    context_len, head_dim]."""
    query = paged.query.view(case.batch, case.num_new, case.shape.num_heads, case.shape.head_dim)
    size = (case.batch, case.shape.num_kv_heads, case.context_len, case.shape.head_dim)
    pairs = []
    for kv_cache in paged.caches:
        pair = tuple(torch.empty(size, dtype=context.dtype, device=context.device) for _ in range(2))
        for sequence in range(case.batch):
            for target, found in zip(pair, paged.keys_and_values(context.kernels, kv_cache, sequence), strict=True):
                target[sequence] = found.transpose(0, 1)
        pairs.append(pair)
    return query.transpose(1, 2).contiguous(), pairs


def _sdpa(case: Case, query: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Call]:
    is_grouped = case.shape.num_heads > case.shape.num_kv_heads
    attend = partial(F.scaled_dot_product_attention, query, enable_gqa=is_grouped, **_causal(case))
    return [partial(attend, key, value) for key, value in pairs]


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

    def calls(self, case: Case, query: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Call]:
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
        return [partial(_flex, self._compiled, mask, is_grouped, query, key, value) for key, value in pairs]


def _flex(
    compiled: Callable[..., Tensor], mask: object, is_grouped: bool, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return compiled(query, key, value, block_mask=mask, enable_gqa=is_grouped)
