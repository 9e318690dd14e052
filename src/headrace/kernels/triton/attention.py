"""Attention over the paged KV cache."""

import torch
import triton
from torch import Tensor

from headrace.config import SoftmaxScheme
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.kv_cache import KvCache
from headrace.kernels.ops import AttentionShare, AttentionSpec
from headrace.kernels.triton.attention_call import AttentionCall
from headrace.kernels.triton.attention_decode import split_kernel
from headrace.kernels.triton.attention_library import LibraryPrefill, prefill_library_obstacle
from headrace.kernels.triton.attention_merge import merge_kernel, repair_kernel
from headrace.kernels.triton.attention_prefill import prefill_kernel
from headrace.kernels.triton.attention_tiles import decode_tiles, prefill_tiles
from headrace.kernels.triton.launch import has_warpgroup_products, num_multiprocessors
from headrace.kernels.triton.softmax import SCHEMES
from headrace.kernels.triton.splits import max_num_splits

_PROGRAMS_PER_MULTIPROCESSOR = 2
"""As many as fit beside each other with two tiles each under way (`attention_decode`)."""


class Attention:
    """`reference.attention`, by any softmax scheme.

    A token's result depends on its query and on the keys and values it sees, to the bit: not on the batch, nor on how
    many programs share the work. But where the dataflow gives prompts to the library, that promises less
    (`attention_library`).

    device: where tensors lie.
    dataflow: asked for the number of programs of a decode launch for so many sequences, its `max_pieces`, without an
        answer as many as fill the device; and from how many tokens of a step on the library takes prompts, its
        `prefill_library_from`, without an answer never.
    """

    def __init__(self, device: torch.device, dataflow: Dataflow | None = None) -> None:
        self._dataflow = dataflow
        self._default_programs = _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(device)
        self._has_warpgroups = has_warpgroup_products(device)
        self._library = LibraryPrefill(device)

    def __call__(
        self,
        query: Tensor,
        kv_cache: KvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        spec: AttentionSpec,
    ) -> Tensor:
        """
        Shapes:
            query:        [num_tokens, num_heads, head_dim]
            block_tables: [num_seqs, max_blocks_per_seq] int32; entries past the context are never read
            context_lens: [num_seqs] int32, >= new tokens of the sequence; 0 for a place that holds none, whose output
                is 0
            cu_seqlens_q: [num_seqs + 1] int32
            returns:      like query, same dtype; accumulated in float32
        Raises:
            ShapeError: tensors that do not fit together or the cache.
            KernelError: dtypes that do not.
        """
        call = AttentionCall.checked(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec)
        if self._is_librarys(call):
            out = self._prefill_by_library(call).to(query.dtype)
            if call.may_decode:
                self._decode(call, out, out)
            return out
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._attend(call, out, out)
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
    ) -> AttentionShare:
        """`reference.attention_share`, by any softmax scheme: what `__call__` computes, before the division.

        A row of the asynchronized scheme whose share leaves the sound range is computed again, synchronized, and then
        refers to its own maximum instead of the unified one.

        Raises:
            as `__call__`.
        """
        call = AttentionCall.checked(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec, owned_blocks)
        numerators = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        normalizers = torch.empty((*query.shape[:2], 2), dtype=torch.float32, device=query.device)
        self._attend(call, numerators, normalizers)
        return AttentionShare(numerators, normalizers)

    def _attend(self, call: AttentionCall, out: Tensor, normalizers: Tensor) -> None:
        if call.may_decode:
            self._decode(call, out, normalizers)
        if call.may_prefill:
            self._prefill(call, out, normalizers)

    def _is_librarys(self, call: AttentionCall) -> bool:
        """Whether the library takes what the call has of prompts: as measured, and where it can."""
        least = None if self._dataflow is None else self._dataflow.prefill_library_from
        if least is None:
            return False
        self._library.hold_buffer()
        if call.num_tokens < least or not call.may_prefill:
            return False
        if call.spec.softmax.scheme is not SoftmaxScheme.SYNCHRONIZED or call.spec.logit_soft_cap is not None:
            return False
        obstacle = prefill_library_obstacle(
            call.query.device,
            dtype=call.query.dtype,
            num_kv_heads=call.num_kv_heads,
            head_dim=call.head_dim,
            num_seqs=call.num_seqs,
            max_context_len=call.max_context_len,
        )
        return obstacle is None

    def _prefill_by_library(self, call: AttentionCall) -> Tensor:
        return self._library(
            call.query,
            call.cache,
            call.block_tables,
            call.context_lens,
            call.cu_seqlens_q,
            max_tokens=call.decode_shape.max_tokens,
            softmax_scale=call.spec.softmax_scale,
            sliding_window=call.spec.sliding_window,
        )

    def _decode(self, call: AttentionCall, out: Tensor, normalizers: Tensor) -> None:
        shape, scheme = call.decode_shape, call.spec.softmax.scheme
        token_slots = 1 if call.num_tokens == call.num_seqs else shape.max_tokens
        max_splits = max_num_splits(call.max_context_len, call.unit)
        num_rows = call.num_seqs * token_slots * call.num_heads
        partials = torch.empty(num_rows, max_splits, call.head_dim, dtype=torch.float32, device=out.device)
        states = torch.empty(num_rows, max_splits, 2, dtype=torch.float32, device=out.device)
        tiles = decode_tiles(call.query.dtype, call.head_dim, call.cache.spec.cache_format)
        how = {
            "HEADS": call.heads,
            "SHAPE": shape,
            "TOKEN_SLOTS": token_slots,
            "UNIT": call.unit,
            "num_warps": tiles.num_warps,
        }
        num_pieces = call.num_seqs * max_splits * call.num_kv_heads * shape.row_tiles
        measured = None if self._dataflow is None else self._dataflow.max_pieces(call.num_seqs)
        num_programs = measured or self._default_programs
        split_kernel[(min(num_programs, num_pieces),)](
            *call.tensors,
            partials,
            states,
            call.num_seqs,
            *call.strides,
            max_splits,
            *call.numbers,
            **how,
            SOFTMAX=call.softmax(scheme),
            SEQS=_seqs(call.num_seqs),
            BLOCK_N=tiles.block_n,
            STAGES=tiles.stages,
        )
        is_asynchronized = scheme is SoftmaxScheme.ASYNCHRONIZED
        unsound = torch.empty(num_rows, dtype=torch.int32, device=out.device) if is_asynchronized else None
        window, _, _, unified_max2, _, _ = call.numbers
        merge_kernel[(num_rows,)](
            call.context_lens,
            call.cu_seqlens_q,
            call.owned_blocks,
            partials,
            states,
            unsound,
            out,
            normalizers,
            call.owned_blocks.stride(0),
            max_splits,
            window,
            unified_max2,
            **how,
            SCHEME=SCHEMES[scheme],
        )
        if is_asynchronized:
            repair_kernel[(num_rows,)](
                *call.tensors,
                partials,
                states,
                unsound,
                out,
                normalizers,
                *call.strides,
                max_splits,
                *call.numbers,
                **how,
                SOFTMAX=call.softmax(SoftmaxScheme.SYNCHRONIZED),
                BLOCK_N=tiles.block_n,
            )

    def _prefill(self, call: AttentionCall, out: Tensor, normalizers: Tensor) -> None:
        cache_format, scheme = call.cache.spec.cache_format, call.spec.softmax.scheme
        tiles = prefill_tiles(call.query.dtype, call.head_dim, cache_format, has_warpgroups=self._has_warpgroups)
        # Each sequence has at most one tile that is not full.
        num_tiles = call.num_tokens * call.group // tiles.block_m + call.num_seqs
        is_asynchronized = scheme is SoftmaxScheme.ASYNCHRONIZED
        num_rows = call.num_tokens * call.num_heads
        unsound = torch.empty(num_rows, dtype=torch.int32, device=out.device) if is_asynchronized else None
        for repairs, by in enumerate((scheme, SoftmaxScheme.SYNCHRONIZED) if is_asynchronized else (scheme,)):
            prefill_kernel[(num_tiles, call.num_kv_heads)](
                *call.tensors,
                unsound,
                out,
                normalizers,
                call.num_seqs,
                *call.strides,
                *call.numbers,
                HEADS=call.heads,
                SOFTMAX=call.softmax(by),
                SEQS=_seqs(call.num_seqs),
                BLOCK_M=tiles.block_m,
                BLOCK_N=tiles.block_n,
                MAX_TOKENS=call.decode_shape.max_tokens,
                HAS_WINDOW=call.spec.sliding_window is not None,
                REPAIRS=bool(repairs),
                STAGES=tiles.stages,
                num_warps=tiles.num_warps,
            )


def _seqs(num_seqs: int) -> int:
    """One kernel for all batches of up to 64, and few for larger ones."""
    return max(64, int(triton.next_power_of_2(num_seqs)))
