"""Attention over the paged KV cache."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.errors import KernelError, ShapeError
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.kv_cache import GpuKvCache, KvCache
from headrace.kernels.ops import AttentionShare, AttentionSpec
from headrace.kernels.triton.attention_decode import DecodeShape, merge_kernel, repair_kernel, split_kernel
from headrace.kernels.triton.attention_library import LibraryPrefill, library_prefill_obstacle
from headrace.kernels.triton.attention_prefill import prefill_kernel
from headrace.kernels.triton.attention_rows import NO_WINDOW
from headrace.kernels.triton.attention_tiles import decode_tiles, prefill_tiles
from headrace.kernels.triton.kv_cache import gpu_cache
from headrace.kernels.triton.launch import has_warpgroup_products, is_interpreted, num_multiprocessors
from headrace.kernels.triton.rotary import QUERY_DTYPES, by_token
from headrace.kernels.triton.softmax import SCHEMES
from headrace.kernels.triton.splits import max_num_splits, split_unit_tokens

_LOG2_E = math.log2(math.e)

_PROGRAMS_PER_MULTIPROCESSOR = 2
"""As many as fit beside each other with two tiles each under way (`attention_decode`)."""

_MERGE_CONSTANTS = ("HEAD_DIM", "BLOCK_D", "BLOCK_SIZE", "IS_INT8", "IS_SHARE", "SCHEME")


class Attention:
    """`reference.attention`, by any softmax scheme.

    A token's result depends on its query and on the keys and values it sees, to the bit: not on the batch, nor on how
    many programs share the work. But where the dataflow gives prompts to the library, that promises less
    (`attention_library`).

    device: where tensors lie.
    dataflow: asked for the number of programs of a decode launch, its `max_pieces`, without an answer as many as fill
        the device; and from how many tokens of a step on the library takes prompts, its `library_prefill_from`, without
        an answer never.
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
        call = _Call.checked(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec)
        if self._is_librarys(call):
            out = self._prefill_by_library(call).to(query.dtype)
            if call.may_decode:
                self._decode(call, out, out, call.constants() | {"IS_SHARE": False})
            return out
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        self._attend(call, out, out, is_share=False)
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
        call = _Call.checked(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec, owned_blocks)
        numerators = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        normalizers = torch.empty((*query.shape[:2], 2), dtype=torch.float32, device=query.device)
        self._attend(call, numerators, normalizers, is_share=True)
        return AttentionShare(numerators, normalizers)

    def _attend(self, call: "_Call", out: Tensor, normalizers: Tensor, *, is_share: bool) -> None:
        constants = call.constants() | {"IS_SHARE": is_share}
        if call.may_decode:
            self._decode(call, out, normalizers, constants)
        if call.may_prefill:
            self._prefill(call, out, normalizers, constants)

    def _is_librarys(self, call: "_Call") -> bool:
        """Whether the library takes what the call has of prompts: as measured, and where it can."""
        least = None if self._dataflow is None else self._dataflow.library_prefill_from
        if least is None or call.num_tokens < least or not call.may_prefill:
            return False
        if call.spec.softmax.scheme is not SoftmaxScheme.SYNCHRONIZED or call.spec.logit_soft_cap is not None:
            return False
        obstacle = library_prefill_obstacle(
            call.query.device,
            dtype=call.query.dtype,
            num_kv_heads=call.num_kv_heads,
            head_dim=call.head_dim,
            num_seqs=call.num_seqs,
            max_context_len=call.max_context_len,
        )
        return obstacle is None

    def _prefill_by_library(self, call: "_Call") -> Tensor:
        return self._library(
            call.query,
            call.cache,
            call.block_tables,
            call.context_lens,
            call.cu_seqlens_q,
            max_tokens=DecodeShape.of(call.group).max_tokens,
            softmax_scale=call.spec.softmax_scale,
            sliding_window=call.spec.sliding_window,
        )

    def _decode(self, call: "_Call", out: Tensor, normalizers: Tensor, constants: dict[str, Any]) -> None:
        shape = DecodeShape.of(call.group)
        token_slots = 1 if call.num_tokens == call.num_seqs else shape.max_tokens
        max_splits = max_num_splits(call.max_context_len, call.unit)
        num_rows = call.num_seqs * token_slots * call.num_heads
        partials = torch.empty(num_rows, max_splits, call.head_dim, dtype=torch.float32, device=out.device)
        states = torch.empty(num_rows, max_splits, 2, dtype=torch.float32, device=out.device)
        tiles = decode_tiles(call.query.dtype, call.head_dim, call.cache.spec.cache_format)
        places = {"TOKEN_SLOTS": token_slots, "UNIT": call.unit}
        row_tiles = {"BLOCK_M": shape.block_m, "BLOCK_N": tiles.block_n}
        num_pieces = call.num_seqs * max_splits * call.num_kv_heads * shape.row_tiles
        num_programs = (self._dataflow and self._dataflow.max_pieces) or self._default_programs
        split_kernel[(min(num_programs, num_pieces),)](
            *call.tensors,
            partials,
            states,
            call.num_seqs,
            *call.strides,
            max_splits,
            *call.numbers,
            **constants,
            **places,
            **row_tiles,
            SEQS=_seqs(call.num_seqs),
            MAX_TOKENS=shape.max_tokens,
            ROW_TILES=shape.row_tiles,
            STAGES=tiles.stages,
            num_warps=tiles.num_warps,
        )
        is_asynchronized = call.spec.softmax.scheme is SoftmaxScheme.ASYNCHRONIZED
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
            **{name: constants[name] for name in _MERGE_CONSTANTS},
            **places,
            NUM_HEADS=call.num_heads,
            MAX_TOKENS=shape.max_tokens,
            num_warps=tiles.num_warps,
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
                **{name: value for name, value in constants.items() if name != "SCHEME"},
                **places,
                **row_tiles,
                num_warps=tiles.num_warps,
            )

    def _prefill(self, call: "_Call", out: Tensor, normalizers: Tensor, constants: dict[str, Any]) -> None:
        cache_format = call.cache.spec.cache_format
        tiles = prefill_tiles(call.query.dtype, call.head_dim, cache_format, has_warpgroups=self._has_warpgroups)
        # Each sequence has at most one tile that is not full.
        num_tiles = call.num_tokens * call.group // tiles.block_m + call.num_seqs
        is_asynchronized = call.spec.softmax.scheme is SoftmaxScheme.ASYNCHRONIZED
        num_rows = call.num_tokens * call.num_heads
        unsound = torch.empty(num_rows, dtype=torch.int32, device=out.device) if is_asynchronized else None
        passes = [constants | {"REPAIRS": False}]
        if is_asynchronized:
            passes.append(constants | {"REPAIRS": True, "SCHEME": SCHEMES[SoftmaxScheme.SYNCHRONIZED]})
        for how in passes:
            prefill_kernel[(num_tiles, call.num_kv_heads)](
                *call.tensors,
                unsound,
                out,
                normalizers,
                call.num_seqs,
                *call.strides,
                *call.numbers,
                **how,
                SEQS=_seqs(call.num_seqs),
                BLOCK_M=tiles.block_m,
                BLOCK_N=tiles.block_n,
                MAX_TOKENS=DecodeShape.of(call.group).max_tokens,
                HAS_WINDOW=call.spec.sliding_window is not None,
                STAGES=tiles.stages,
                num_warps=tiles.num_warps,
            )


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call's tensors, checked, and what kernels are told of them."""

    query: Tensor
    cache: GpuKvCache
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    owned_blocks: Tensor
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
    ) -> "_Call":
        cache = gpu_cache(kv_cache)
        _check(query, cache, block_tables, context_lens, cu_seqlens_q, owned_blocks)
        return cls(
            query=by_token(_as_computed(query, spec.softmax.scheme)),
            cache=cache,
            block_tables=_by_row(block_tables),
            context_lens=context_lens.contiguous(),
            cu_seqlens_q=cu_seqlens_q.contiguous(),
            owned_blocks=context_lens[:, None] if owned_blocks is None else _by_row(owned_blocks),
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
        return self.num_tokens > 0 and (self.num_seqs > 1 or self.num_tokens <= self._max_decoded)

    @property
    def may_prefill(self) -> bool:
        """Whether one may have more."""
        return self.num_tokens > self.num_seqs and (self.num_seqs > 1 or self.num_tokens > self._max_decoded)

    @property
    def _max_decoded(self) -> int:
        return DecodeShape.of(self.group).max_tokens

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

    def constants(self) -> dict[str, Any]:
        return {
            "NUM_KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(self.head_dim)),
            "BLOCK_SIZE": self.cache.spec.block_size,
            "IS_INT8": self.cache.spec.cache_format is KvCacheFormat.INT8,
            "SCHEME": SCHEMES[self.spec.softmax.scheme],
            "HAS_CAP": self.spec.logit_soft_cap is not None,
            "IS_STRICT": self.spec.softmax.element_bounds is not None,
        }


def _as_computed(query: Tensor, scheme: SoftmaxScheme) -> Tensor:
    """float16 has not the exponents that a unified maximum needs, and the interpreter multiplies no bfloat16."""
    is_unsuited = query.dtype is torch.float16 and scheme is SoftmaxScheme.ASYNCHRONIZED
    if is_unsuited or (query.dtype is torch.bfloat16 and is_interpreted()):
        return query.float()
    return query


def _seqs(num_seqs: int) -> int:
    """One kernel for all batches of up to 64, and few for larger ones."""
    return max(64, int(triton.next_power_of_2(num_seqs)))


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
