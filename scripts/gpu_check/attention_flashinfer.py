"""FlashInfer's paged attention over the contexts that are measured here.

Its signatures and layouts were read in versions 0.6.18 and 0.7.2 (decode.py, prefill.py and the CUDA sources under
data/csrc); `flashinfer_stand_in` has what of them is used, for machines that it does not run on.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headrace.kernels import KvCache
from scripts.gpu_check.attention_cases import BLOCK_SIZE, Case, Paged
from scripts.gpu_check.context import Context
from scripts.gpu_check.scale import Scale

_LAYOUT = "NHD"
"""In a page, tokens before heads: FlashInfer's default."""

_WORKSPACE_BYTES = 256 * 2**20
"""For the parts of split contexts; 128 MiB are recommended."""

_TENSOR_CORES_FROM = 4
"""Heads that share a KV head, for which decoding is told to take tensor cores, as it never does by itself. Engines tell
FlashInfer so too: SGLang from here on, vLLM always."""

_PAGES_AT_ONCE = 2**11
"""That are copied: in float32, which the ops read caches in, they are twice as large as what they become."""


def is_installed(scale: Scale) -> bool:
    return importlib.util.find_spec(scale.flashinfer) is not None


def calls(context: Context, case: Case, paged: Paged) -> list[Callable[[], Tensor]]:
    """Planned once, as an engine plans once for all layers; a call for each cache, copied to FlashInfer's layout.

    What calls return is one tensor, which all write to: allocated by FlashInfer it would be cleared in each call.
    """
    flashinfer = importlib.import_module(context.scale.flashinfer)
    make = _decode if case.num_new == 1 else _prefill
    run = make(flashinfer, context, case, paged)
    out = torch.full_like(paged.query, torch.nan)
    return [partial(run, paged.query, _in_pages(context, case, kv_cache), out=out) for kv_cache in paged.caches]


def _decode(flashinfer: Any, context: Context, case: Case, paged: Paged) -> Callable[..., Tensor]:
    group = case.shape.num_heads // case.shape.num_kv_heads
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(context), _LAYOUT, use_tensor_cores=group >= _TENSOR_CORES_FROM
    )
    wrapper.plan(*_page_table(context, case, paged), *_sizes(case), **_dtypes(context))
    run: Callable[..., Tensor] = wrapper.run
    return run


def _prefill(flashinfer: Any, context: Context, case: Case, paged: Paged) -> Callable[..., Tensor]:
    """causal: of fewer queries than keys, the last sees all keys."""
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(context), _LAYOUT)
    table = _page_table(context, case, paged)
    wrapper.plan(paged.cu_seqlens_q, *table, *_sizes(case), causal=True, **_dtypes(context))
    run: Callable[..., Tensor] = wrapper.run
    return run


def _workspace(context: Context) -> Tensor:
    """It must be zeros when it is first used."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=context.device)


def _page_table(context: Context, case: Case, paged: Paged) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's pages begin among the page ids [batch + 1], those [num_pages], and how many tokens its last
    page has [batch]; all int32."""
    begins = case.num_blocks * torch.arange(case.batch + 1, dtype=torch.int32, device=context.device)
    last_page_len = (case.context_len - 1) % BLOCK_SIZE + 1
    lens = torch.full((case.batch,), last_page_len, dtype=torch.int32, device=context.device)
    return begins, paged.tables.flatten(), lens


def _sizes(case: Case) -> tuple[int, int, int, int]:
    shape = case.shape
    return shape.num_heads, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE


def _dtypes(context: Context) -> dict[str, torch.dtype]:
    """float16 if they are not named."""
    return {"q_data_type": context.dtype, "kv_data_type": context.dtype}


def _in_pages(context: Context, case: Case, kv_cache: KvCache) -> Tensor:
    """[pages, 2, page_size, num_kv_heads, head_dim], keys before values."""
    num_pages, shape = case.batch * case.num_blocks, case.shape
    size = (num_pages, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    pages = torch.empty(size, dtype=context.dtype, device=context.device)
    for first in range(0, num_pages, _PAGES_AT_ONCE):
        some = pages[first : first + _PAGES_AT_ONCE]
        slots = torch.arange(first * BLOCK_SIZE, (first + len(some)) * BLOCK_SIZE, device=context.device)
        for kind, found in enumerate(context.kernels.read_kv(kv_cache, slots)):
            some[:, kind] = found.view(len(some), *size[2:])
    return pages
