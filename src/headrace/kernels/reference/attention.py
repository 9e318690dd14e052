"""Attention over the paged KV cache."""

import math

import torch
from torch import Tensor

from headrace.config import SoftmaxScheme
from headrace.errors import KernelError, ShapeError
from headrace.kernels.kv_cache import KvCache
from headrace.kernels.ops import AttentionShare, AttentionSpec
from headrace.kernels.reference.kv_cache import read_kv

_MAX_SCORE_ELEMENTS = 16 * 2**20
"""Scores held at once; longer prefills go through in tiles of query rows (64 MiB of float32)."""


def attention(
    query: Tensor,
    kv_cache: KvCache,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """Attend each sequence's new tokens to its cached keys and values, their own included.

    out[i] = softmax(soft_cap(softmax_scale * q[i] K^T) + mask) V, for a token at position p over the keys
    max(0, p - sliding_window + 1) .. p; the new tokens are the last of the context.

    Shapes:
        query:        [num_tokens, num_heads, head_dim]
        block_tables: [num_seqs, max_blocks_per_seq] int32; entries past the context are never read
        context_lens: [num_seqs] int32, >= new tokens of the sequence; 0 for a place that holds none, whose output is 0
        cu_seqlens_q: [num_seqs + 1] int32
        returns:      like query, same dtype; accumulated in float32
    Raises:
        ShapeError: num_heads is not a multiple of num_kv_heads.
        KernelError: another softmax scheme than the synchronized one, which this is with a single partial result.
    """
    _check(query, kv_cache, spec)
    num_heads = query.shape[1]
    out = torch.empty_like(query)
    bounds = cu_seqlens_q.tolist()
    for i, context_len in enumerate(context_lens.tolist()):
        start, stop = bounds[i], bounds[i + 1]
        if context_len == 0:
            out[start:stop] = 0.0
            continue
        tile = max(1, _MAX_SCORE_ELEMENTS // (num_heads * context_len))
        for row in range(start, stop, tile):
            end = min(row + tile, stop)
            visible = context_len - (stop - end)
            out[row:end] = _attend(query[row:end], kv_cache, block_tables[i], visible, spec)
    return out


def attention_share(
    query: Tensor,
    kv_cache: KvCache,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    owned_blocks: Tensor,
    spec: AttentionSpec,
) -> AttentionShare:
    """`attention` over the blocks of each context that this cache holds, before the division.

    With logits s of the keys a token sees among those: reference = log2(e) max s, denominator = sum of
    2^(log2(e) s - reference), numerator the same sum of values.

    Shapes:
        query:        [num_tokens, num_heads, head_dim]
        block_tables: [num_seqs, max_owned_blocks] int32: the blocks held, in order
        context_lens: [num_seqs] int32, of the whole contexts; 0 for a place that holds none
        cu_seqlens_q: [num_seqs + 1] int32
        owned_blocks: [num_seqs, max_blocks_per_seq + 1] int32: how many of the first i blocks of a sequence are held
    Raises:
        ShapeError: num_heads is not a multiple of num_kv_heads.
        KernelError: another softmax scheme than the synchronized one.
    """
    _check(query, kv_cache, spec)
    numerators = torch.zeros_like(query, dtype=torch.float32)
    normalizers = numerators.new_zeros(*query.shape[:2], 2)
    normalizers[..., 1] = -math.inf
    bounds = cu_seqlens_q.tolist()
    for i, context_len in enumerate(context_lens.tolist()):
        for row in range(bounds[i], bounds[i + 1]):
            stop = max(0, context_len - (bounds[i + 1] - row) + 1)
            start = 0 if spec.sliding_window is None else max(0, stop - spec.sliding_window)
            first, last = (
                _num_owned(owned_blocks[i], position, kv_cache.spec.block_size) for position in (start, stop)
            )
            if first < last:
                key, value = _gather(kv_cache, block_tables[i], first, last)
                numerators[row], normalizers[row] = _attend_share(query[row], key, value, spec)
    return AttentionShare(numerators, normalizers)


def _num_owned(owned_blocks: Tensor, position: int, block_size: int) -> int:
    """How many of a sequence's first `position` tokens are held."""
    block, rest = divmod(position, block_size)
    before = int(owned_blocks[block])
    return before * block_size + (rest if rest and owned_blocks[block + 1] > before else 0)


def _attend_share(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Numerators [num_heads, head_dim] and normalizers [num_heads, 2] of one token."""
    grouped = query.float().view(key.shape[0], -1, query.shape[1])
    logits = _soft_cap((grouped @ key.transpose(1, 2)) * spec.softmax_scale, spec) * math.log2(math.e)
    reference = logits.amax(-1)
    weights = torch.exp2(logits - reference[..., None])
    normalizers = torch.stack([weights.sum(-1), reference], dim=-1)
    return (weights @ value).view(query.shape), normalizers.flatten(0, 1)


def _attend(query: Tensor, kv_cache: KvCache, block_table: Tensor, visible: int, spec: AttentionSpec) -> Tensor:
    """Attention of the last `len(query)` of `visible` tokens of one sequence."""
    num_queries, head_dim = query.shape[0], query.shape[2]
    num_kv_heads = kv_cache.spec.num_kv_heads
    first_position = visible - num_queries
    first_key = 0 if spec.sliding_window is None else max(0, first_position - spec.sliding_window + 1)
    key, value = _gather(kv_cache, block_table, first_key, visible)
    # One matrix product per KV head: [num_kv_heads, num_queries * heads sharing it, head_dim].
    grouped = query.float().view(num_queries, num_kv_heads, -1, head_dim).transpose(0, 1).flatten(1, 2)
    scores = (grouped @ key.transpose(1, 2)) * spec.softmax_scale
    scores = _soft_cap(scores, spec)
    if num_queries > 1 or spec.sliding_window is not None:
        hidden = _hidden(first_position, num_queries, first_key, visible, spec.sliding_window, scores.device)
        scores = scores.view(num_kv_heads, num_queries, -1, hidden.shape[1])
        scores = scores.masked_fill(hidden[None, :, None, :], -math.inf).flatten(1, 2)
    out = torch.softmax(scores, dim=-1) @ value
    return out.view(num_kv_heads, num_queries, -1, head_dim).transpose(0, 1).reshape(query.shape).to(query.dtype)


def _soft_cap(scores: Tensor, spec: AttentionSpec) -> Tensor:
    if spec.logit_soft_cap is None:
        return scores
    return spec.logit_soft_cap * torch.tanh(scores / spec.logit_soft_cap)


def _check(query: Tensor, kv_cache: KvCache, spec: AttentionSpec) -> None:
    if spec.softmax.scheme is not SoftmaxScheme.SYNCHRONIZED:
        raise KernelError(f"the reference has no {spec.softmax.scheme.value} softmax; allowed: synchronized")
    num_heads, num_kv_heads = query.shape[1], kv_cache.spec.num_kv_heads
    if num_heads % num_kv_heads:
        raise ShapeError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")


def _gather(kv_cache: KvCache, block_table: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values of positions start to stop: two tensors [num_kv_heads, stop - start, head_dim] float32."""
    block_size = kv_cache.spec.block_size
    positions = torch.arange(start, stop, device=block_table.device)
    slots = block_table[positions // block_size].long() * block_size + positions % block_size
    key, value = read_kv(kv_cache, slots)
    return key.transpose(0, 1), value.transpose(0, 1)


def _hidden(
    first_position: int, num_queries: int, first_key: int, stop: int, window: int | None, device: torch.device
) -> Tensor:
    """Whether a query may not see a key: [num_queries, stop - first_key]."""
    position = torch.arange(first_position, first_position + num_queries, device=device)[:, None]
    key_position = torch.arange(first_key, stop, device=device)[None, :]
    hidden = key_position > position
    if window is not None:
        hidden |= key_position <= position - window
    return hidden
