"""Attention over the paged KV cache (native/attention.h)."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from headrace import _native
from headrace.config import SoftmaxScheme
from headrace.errors import KernelError, ShapeError
from headrace.kernels.cpu.dtypes import DTYPES
from headrace.kernels.cpu.kv_cache import packed
from headrace.kernels.cpu.stream import Stream
from headrace.kernels.cpu.targets import check_target
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.kv_cache import KvCache, PackedKvCache
from headrace.kernels.ops import AttentionShare, AttentionSpec
from headrace.kernels.token_heads import by_token

_SCHEMES = {
    SoftmaxScheme.SYNCHRONIZED: _native.SoftmaxScheme.SYNCHRONIZED,
    SoftmaxScheme.ASYNCHRONIZED: _native.SoftmaxScheme.ASYNCHRONIZED,
    SoftmaxScheme.LAZY: _native.SoftmaxScheme.LAZY,
}


class Attention:
    """`reference.attention` on one instruction set, by any softmax scheme.

    A token's result depends on its query and on the keys and values it sees, to the bit: not on the batch, the chunks a
    prompt came in, prefix hits or the number of threads. Float32 caches are computed in float32. With a bfloat16 cache,
    queries and probabilities are rounded to it where the machine multiplies bfloat16; with int8, queries become
    integers of 8 bits, as keys are, and probabilities of 14.

    Raises:
        BackendUnavailable: an instruction set this machine cannot run.
    """

    def __init__(self, target: str, stream: Stream, dataflow: Dataflow | None = None) -> None:
        check_target(target)
        self._stream = stream
        self._dataflow = dataflow or Dataflow()
        self.target = target
        self._native = _native.Attention(target)
        self._specs: dict[AttentionSpec, _native.AttentionSpec] = {}

    def __call__(
        self,
        query: Tensor,
        kv_cache: KvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        spec: AttentionSpec,
        *,
        max_pieces: int | None = None,
    ) -> Tensor:
        """
        max_pieces: a context is cut into at most so many pieces for several threads; None asks the dataflow.

        Shapes:
            query:        [num_tokens, num_heads, head_dim] float32 or bfloat16
            block_tables: [num_seqs, max_blocks_per_seq] int32; entries past the context are never read
            context_lens: [num_seqs] int32, >= new tokens of the sequence
            cu_seqlens_q: [num_seqs + 1] int32
            returns:      like query, same dtype; accumulated in float32
        Raises:
            ShapeError: tensors that do not fit together or the cache.
            KernelError: dtypes that do not.
            IndexError: a block, a length or a row outside the cache or the batch.
        """
        kv_cache = packed(kv_cache)
        tables = _Tables.checked(query, kv_cache, block_tables, context_lens, cu_seqlens_q)
        query = by_token(query)
        out = self._stream.empty(query.shape, query.dtype)
        self._native.run(
            self._stream.native,
            self._native_spec(spec),
            kv_cache.cache,
            DTYPES[query.dtype],
            query.data_ptr(),
            query.stride(0),
            query.shape[0],
            query.shape[1],
            *tables.arguments(),
            out.data_ptr(),
            max_pieces or self._dataflow.max_pieces(len(context_lens)) or 0,
        )
        return out

    def share(
        self,
        query: Tensor,
        kv_cache: KvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        owned_blocks: Tensor,
        spec: AttentionSpec,
        *,
        max_pieces: int | None = None,
    ) -> AttentionShare:
        """`reference.attention_share`, by any softmax scheme: what `__call__` computes, before the division.

        A row of the asynchronized scheme whose share leaves the sound range is computed again, synchronized, and then
        refers to its own maximum instead of the unified one. Where every share is sound, so is their sum.

        Raises:
            as `__call__`; IndexError also for owned_blocks that do not count blocks.
        """
        kv_cache = packed(kv_cache)
        tables = _Tables.checked(query, kv_cache, block_tables, context_lens, cu_seqlens_q)
        if owned_blocks.dtype != torch.int32 or len(owned_blocks) != len(context_lens):
            raise ShapeError(
                f"owned_blocks are {owned_blocks.dtype} of {len(owned_blocks)} sequences; allowed: int32 of each of "
                f"the {len(context_lens)}"
            )
        query, owned_blocks = by_token(query), owned_blocks.contiguous()
        numerators = self._stream.empty(query.shape, torch.float32)
        normalizers = self._stream.empty((*query.shape[:2], 2), torch.float32)
        self._native.run_share(
            self._stream.native,
            self._native_spec(spec),
            kv_cache.cache,
            DTYPES[query.dtype],
            query.data_ptr(),
            query.stride(0),
            query.shape[0],
            query.shape[1],
            *tables.arguments(),
            owned_blocks.data_ptr(),
            owned_blocks.shape[1],
            numerators.data_ptr(),
            normalizers.data_ptr(),
            max_pieces or self._dataflow.max_pieces(len(context_lens)) or 0,
        )
        return AttentionShare(numerators, normalizers)

    def _native_spec(self, spec: AttentionSpec) -> _native.AttentionSpec:
        found = self._specs.get(spec)
        if found is None:
            found = self._specs[spec] = _native.AttentionSpec(
                spec.softmax_scale,
                spec.sliding_window,
                spec.logit_soft_cap,
                _SCHEMES[spec.softmax.scheme],
                spec.softmax.unified_max,
                spec.softmax.element_bounds,
            )
        return found


class _Tables(NamedTuple):
    """What says where each sequence's tokens are, checked and contiguous. Held while an op reads it."""

    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor

    @classmethod
    def checked(
        cls, query: Tensor, kv_cache: PackedKvCache, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor
    ) -> Self:
        _check(query, kv_cache, block_tables, context_lens, cu_seqlens_q)
        return cls(block_tables.contiguous(), context_lens.contiguous(), cu_seqlens_q.contiguous())

    def arguments(self) -> tuple[int, int, int, int, int]:
        """num_seqs, block_tables_ptr, max_blocks_per_seq, context_lens_ptr, cu_seqlens_q_ptr."""
        tables, lens, bounds = self
        return len(lens), tables.data_ptr(), tables.shape[1], lens.data_ptr(), bounds.data_ptr()


def _check(
    query: Tensor, kv_cache: PackedKvCache, block_tables: Tensor, context_lens: Tensor, cu_seqlens_q: Tensor
) -> None:
    num_heads, num_kv_heads = query.shape[1], kv_cache.spec.num_kv_heads
    if num_heads % num_kv_heads:
        raise ShapeError(f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly")
    if query.shape[2] != kv_cache.spec.head_dim:
        raise ShapeError(f"heads of {query.shape[2]} over a cache of {kv_cache.spec.head_dim}")
    num_seqs = len(context_lens)
    if len(block_tables) != num_seqs or len(cu_seqlens_q) != num_seqs + 1:
        raise ShapeError(
            f"{num_seqs} context_lens, {len(block_tables)} block tables and {len(cu_seqlens_q)} cu_seqlens_q; "
            "allowed: n, n and n + 1"
        )
    if query.dtype not in DTYPES:
        raise KernelError(f"query is {query.dtype}; allowed: float32 and bfloat16")
    if {block_tables.dtype, context_lens.dtype, cu_seqlens_q.dtype} != {torch.int32}:
        raise KernelError("block_tables, context_lens and cu_seqlens_q must be int32")
