"""Attention of a chunk of a prompt by the library: torch's FlashAttention over keys and values laid end to end.

The library reads no blocks as small as a cache's, so a kernel gathers what the chunks see into one buffer first, an
int8 cache dequantized: each key and value is read and written once more than by `attention_prefill`, which the library
must make up for (4,096 tokens of a head of 128: 4 MiB moved for 4.3 Gflop). Where the sequences lie in the buffer, the
same kernel finds out on the device; the host is not asked.

What a row rounds to is the library's affair: it promises the same bits neither for other chunks of a prompt nor with
other tokens beside it. And since the buffer is bounded, a step of many sequences is not its own to take.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from headrace.kernels.kv_cache import GpuKvCache
from headrace.kernels.triton.attention_rows import UNALIGNED

MAX_SEQS = 8
"""Programs are launched for the longest chunk there could be, all tokens of the step, in each of so many sequences."""

BUFFER_BYTES = 2**28
"""Of a device: 64k tokens of Llama-3-8B's 8 KV heads. Held from the first step on, whatever that is, so that the KV
cache, which is made after a few steps were tried, leaves it its room."""

_HEAD_DIM_STEP, _MAX_HEAD_DIM = 8, 256
_GATHERED_AT_ONCE = 32

# Heads in groups need no word before torch 2.12, and get one from then on.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def prefill_library_obstacle(
    device: torch.device, *, dtype: torch.dtype, num_kv_heads: int, head_dim: int, num_seqs: int, max_context_len: int
) -> str | None:
    """Why the library cannot take a step that is synchronized and without a soft cap; None if it can.

    dtype: of queries, as they are computed with.
    """
    if device.type == "cuda":
        if torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
            return "torch has no FlashAttention for this GPU"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"FlashAttention takes no {dtype}"
    if head_dim % _HEAD_DIM_STEP or head_dim > _MAX_HEAD_DIM:
        return f"FlashAttention takes no heads of {head_dim}"
    if num_seqs > MAX_SEQS:
        return f"{num_seqs} sequences in a step, more than {MAX_SEQS}"
    num_bytes = 2 * dtype.itemsize * num_seqs * max_context_len * num_kv_heads * head_dim
    return None if num_bytes <= BUFFER_BYTES else f"contexts of up to {num_bytes} bytes, more than {BUFFER_BYTES}"


class LibraryPrefill:
    """Attention of all sequences of more than max_tokens new tokens. Calls that share one must follow one another.

    Owns: the buffer that keys and values are gathered in.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None

    def hold_buffer(self) -> Tensor:
        """[BUFFER_BYTES] uint8."""
        if self._buffer is None:
            self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=self._device)
        return self._buffer

    def __call__(
        self,
        query: Tensor,
        cache: GpuKvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        *,
        max_tokens: int,
        softmax_scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Like query, in a step without an obstacle; sequences of up to max_tokens new tokens have a place in it, but
        what that holds is not said.
        """
        num_seqs, capacity = len(context_lens), block_tables.shape[1] * cache.spec.block_size
        num_kv_heads, head_dim = cache.spec.num_kv_heads, cache.spec.head_dim
        shape = 2, num_seqs * capacity, num_kv_heads, head_dim
        keys, values = self.hold_buffer().view(query.dtype)[: 2 * shape[1] * num_kv_heads * head_dim].view(shape)
        cu_seqlens_k = torch.empty_like(cu_seqlens_q)
        gather_kernel[(triton.cdiv(capacity, _GATHERED_AT_ONCE), num_kv_heads, num_seqs)](
            block_tables,
            context_lens,
            cu_seqlens_q,
            *cache.keys_and_values,
            keys,
            values,
            cu_seqlens_k,
            num_seqs,
            block_tables.stride(0),
            SEQS=MAX_SEQS,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=cache.spec.block_size,
            BLOCK_N=_GATHERED_AT_ONCE,
            MAX_TOKENS=max_tokens,
            IS_INT8=len(cache.scales[0]) > 0,
        )
        if self._device.type == "cpu":
            return _by_sequence(query, keys, values, cu_seqlens_q, cu_seqlens_k, softmax_scale, sliding_window)
        before = -1 if sliding_window is None else sliding_window - 1
        bounds = cu_seqlens_q, cu_seqlens_k, len(query), capacity
        scale, window = softmax_scale, (before, 0)
        out = varlen_attn(query, keys, values, *bounds, scale=scale, window_size=window, **_GROUPED)
        assert isinstance(out, Tensor), "without auxiliary outputs it is the only one"
        return out


def _by_sequence(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    sliding_window: int | None,
) -> Tensor:
    """What `varlen_attn` computes, where Triton's interpreter runs: torch has it for GPUs alone."""
    out = torch.empty_like(query)
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (first, last), (begin, end) in bounds:
        num_new, num_keys = last - first, end - begin
        if not num_keys:
            continue
        mask = torch.ones(num_new, num_keys, dtype=torch.bool).tril(num_keys - num_new)
        if sliding_window is not None:
            mask = mask.triu(num_keys - num_new - sliding_window + 1)
        q, k, v = (x[None].transpose(1, 2) for x in (query[first:last], keys[begin:end], values[begin:end]))
        found = F.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
        out[first:last] = found[0].transpose(0, 1)
    return out


@triton.jit(do_not_specialize=("num_seqs", "table_stride"), do_not_specialize_on_alignment=UNALIGNED)
def gather_kernel(
    tables_ptr,
    context_lens_ptr,
    bounds_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    gathered_keys_ptr,
    gathered_values_ptr,
    gathered_bounds_ptr,
    num_seqs,
    table_stride,
    SEQS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Keys and values of sequences of more than MAX_TOKENS new tokens end to end, [position, KV head, head_dim] in the
    queries' type, and where each begins, [num_seqs + 1]; grid: tiles of positions, KV heads, sequences.

    A value whose scale is not a number becomes 0: who sees the token has NaN from its key, and who does not, multiplies
    the value by 0.
    """
    seqs = tl.arange(0, SEQS)
    is_seq = seqs < num_seqs
    new = tl.load(bounds_ptr + seqs + 1, mask=is_seq, other=0) - tl.load(bounds_ptr + seqs, mask=is_seq, other=0)
    lens = tl.where(new > MAX_TOKENS, tl.load(context_lens_ptr + seqs, mask=is_seq, other=0), 0)
    kv_head, seq = tl.program_id(1), tl.program_id(2)
    begin = tl.sum(tl.where(seqs < seq, lens, 0), axis=0)
    length = tl.sum(tl.where(seqs == seq, lens, 0), axis=0)
    first = tl.program_id(0) * BLOCK_N
    if (first == 0) & (kv_head == 0):
        tl.store(gathered_bounds_ptr + seq + 1, begin + length)
        if seq == 0:
            tl.store(gathered_bounds_ptr, 0)
    if first < length:
        positions = first + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        is_position = positions < length
        mask = is_position[:, None] & (d < HEAD_DIM)[None, :]
        table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
        blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=is_position, other=0).to(tl.int64)
        slots = (blocks * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE
        at = slots[:, None] * HEAD_DIM + d[None, :]
        keys = tl.load(keys_ptr + at, mask=mask, other=0)
        values = tl.load(values_ptr + at, mask=mask, other=0)
        if IS_INT8:
            keys = keys * tl.load(key_scales_ptr + slots, mask=is_position, other=0.0)[:, None]
            scales = tl.load(value_scales_ptr + slots, mask=is_position, other=0.0)
            values = values * tl.where(scales == scales, scales, 0.0)[:, None]
        to = ((begin + positions).to(tl.int64) * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + d[None, :]
        tl.store(gathered_keys_ptr + to, keys, mask=mask)
        tl.store(gathered_values_ptr + to, values, mask=mask)
