"""One call of attention: its tensors, checked, and what kernels are told of them."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.errors import KernelError, ShapeError
from headrace.kernels.kv_cache import GpuKvCache, KvCache
from headrace.kernels.ops import AttentionSpec
from headrace.kernels.token_heads import by_token
from headrace.kernels.triton.attention_arguments import Heads, SoftmaxKind
from headrace.kernels.triton.attention_rows import NO_WINDOW
from headrace.kernels.triton.attention_tiles import DecodeShape
from headrace.kernels.triton.kv_cache import gpu_cache
from headrace.kernels.triton.launch import is_interpreted
from headrace.kernels.triton.rotary_store import QUERY_DTYPES
from headrace.kernels.triton.softmax import SCHEMES
from headrace.kernels.triton.splits import split_unit_tokens

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One call's tensors, checked, and what kernels are told of them."""

    query: Tensor
    cache: GpuKvCache
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    owned_blocks: Tensor
    is_share: bool
    spec: AttentionSpec

    @classmethod
    def checked(
        cls,
        query: Tensor,
        kv_cache: KvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        spec: AttentionSpec,
        owned_blocks: Tensor | None = None,
    ) -> "AttentionCall":
        cache = gpu_cache(kv_cache)
        _check(query, cache, block_tables, context_lens, cu_seqlens_q, owned_blocks)
        return cls(
            query=by_token(_as_computed(query, spec.softmax.scheme)),
            cache=cache,
            block_tables=_by_row(block_tables),
            context_lens=context_lens.contiguous(),
            cu_seqlens_q=cu_seqlens_q.contiguous(),
            owned_blocks=context_lens[:, None] if owned_blocks is None else _by_row(owned_blocks),
            is_share=owned_blocks is not None,
            spec=spec,
        )

    @property
    def num_tokens(self) -> int:
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def head_dim(self) -> int:
        return self.query.shape[2]

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def num_kv_heads(self) -> int:
        return self.cache.spec.num_kv_heads

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def may_decode(self) -> bool:
        """Whether a sequence may have few enough new tokens to be decoded. Which have, is known on the device alone,
        unless there are as many tokens as sequences, or a single sequence."""
        return self.num_tokens > 0 and (self.num_seqs > 1 or self.num_tokens <= self.decode_shape.max_tokens)

    @property
    def may_prefill(self) -> bool:
        """Whether one may have more."""
        return self.num_tokens > self.num_seqs and (self.num_seqs > 1 or self.num_tokens > self.decode_shape.max_tokens)

    @cached_property
    def decode_shape(self) -> DecodeShape:
        return DecodeShape.of(self.group)

    @property
    def unit(self) -> int:
        return split_unit_tokens(self.cache.spec.cache_format, self.head_dim)

    @property
    def max_context_len(self) -> int:
        """Of this cache's part of a context: all that a block table has room for."""
        return self.block_tables.shape[1] * self.cache.spec.block_size

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        tables = self.block_tables, self.context_lens, self.cu_seqlens_q, self.owned_blocks
        return self.query, *tables, *self.cache.keys_and_values, self.cache.counts

    @cached_property
    def strides(self) -> tuple[int, int, int]:
        return self.query.stride(0), self.block_tables.stride(0), self.owned_blocks.stride(0)

    @cached_property
    def numbers(self) -> tuple[float, ...]:
        """The window, and the scale, the cap and the unified maximum with its bounds for logits in base 2."""
        spec, softmax = self.spec, self.spec.softmax
        least, largest = softmax.element_bounds or (0.0, 0.0)
        window = NO_WINDOW if spec.sliding_window is None else min(spec.sliding_window, NO_WINDOW)
        logits = spec.softmax_scale, spec.logit_soft_cap or 1.0, softmax.unified_max, least, largest
        return window, *(x * _LOG2_E for x in logits)

    @cached_property
    def heads(self) -> Heads:
        return Heads(
            num_kv_heads=self.num_kv_heads,
            group=self.group,
            head_dim=self.head_dim,
            block_d=max(16, triton.next_power_of_2(self.head_dim)),
            block_size=self.cache.spec.block_size,
            is_int8=self.cache.spec.cache_format is KvCacheFormat.INT8,
            is_share=self.is_share,
        )

    def softmax(self, scheme: SoftmaxScheme) -> SoftmaxKind:
        """That of the call, by this scheme."""
        return SoftmaxKind(
            scheme=SCHEMES[scheme],
            has_cap=self.spec.logit_soft_cap is not None,
            is_strict=self.spec.softmax.element_bounds is not None,
        )


def _as_computed(query: Tensor, scheme: SoftmaxScheme) -> Tensor:
    """float16 has not the exponents that a unified maximum needs, and the interpreter multiplies no bfloat16."""
    is_unsuited = query.dtype is torch.float16 and scheme is SoftmaxScheme.ASYNCHRONIZED
    if is_unsuited or (query.dtype is torch.bfloat16 and is_interpreted()):
        return query.float()
    return query


def _by_row(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _check(
    query: Tensor,
    cache: GpuKvCache,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    owned_blocks: Tensor | None,
) -> None:
    num_heads, num_kv_heads = query.shape[1], cache.spec.num_kv_heads
    if num_heads % num_kv_heads:
        raise ShapeError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if query.shape[2] != cache.spec.head_dim:
        raise ShapeError(f"heads of {query.shape[2]} over a cache of {cache.spec.head_dim}")
    num_seqs = len(context_lens)
    if len(block_tables) != num_seqs or len(cu_seqlens_q) != num_seqs + 1:
        raise ShapeError(
            f"{num_seqs} context_lens, {len(block_tables)} block tables and {len(cu_seqlens_q)} cu_seqlens_q; "
            "allowed: n, n and n + 1"
        )
    if owned_blocks is not None and (owned_blocks.dtype != torch.int32 or len(owned_blocks) != num_seqs):
        raise ShapeError(
            f"owned_blocks are {owned_blocks.dtype} of {len(owned_blocks)} sequences; allowed: int32 of each of the "
            f"{num_seqs}"
        )
    if query.dtype not in QUERY_DTYPES:
        raise KernelError(f"query is {query.dtype}; allowed: float32, bfloat16 and float16")
    if {block_tables.dtype, context_lens.dtype, cu_seqlens_q.dtype} != {torch.int32}:
        raise KernelError("block_tables, context_lens and cu_seqlens_q must be int32")
