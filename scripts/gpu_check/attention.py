"""Attention over a paged cache: one new token, or a whole prompt; each softmax scheme, and what others make of it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.bench.kernels import ModelShape
from headrace.config import KvCacheFormat
from headrace.engine.tune_prefill import forcing_prefill
from headrace.kernels import AttentionSpec, KvCache, KvCacheSpec, SoftmaxSpec
from headrace.kernels.prefill_tuning import PrefillArm
from scripts.gpu_check.context import TOLERANCE, Context
from scripts.gpu_check.figures import Figure

BLOCK_SIZE = 16
LIBRARY = "library"
"""The attention op's other implementation of a prompt, over the same pages."""
SDPA, FLEX, FLASHINFER = "torch SDPA", "FlexAttention", "FlashInfer"

_UNIFIED_MAX = 0.0
"""Queries and keys are drawn so that logits have a standard deviation of 1, as the unified maximum expects of a model
that it was measured for."""

_STORED_AT_ONCE = 2**15


@dataclass(frozen=True, kw_only=True)
class Case:
    """num_new: the last tokens of each context, which attend to all before them and to themselves."""

    shape: ModelShape
    heads: str
    batch: int
    context_len: int
    num_new: int

    @property
    def phase(self) -> str:
        return "decode" if self.num_new == 1 else "prefill"

    @property
    def num_blocks(self) -> int:
        """Of one sequence."""
        return -(-self.context_len // BLOCK_SIZE)

    @property
    def num_bytes(self) -> int:
        """Keys and values that are seen, in 2 bytes an entry."""
        return 4 * self.batch * self.context_len * self.shape.num_kv_heads * self.shape.head_dim

    @property
    def num_ops(self) -> int:
        pairs = self.num_new * (2 * self.context_len - self.num_new + 1) // 2
        return 4 * self.batch * self.shape.num_heads * self.shape.head_dim * pairs

    def cache_spec(self, cache_format: KvCacheFormat) -> KvCacheSpec:
        return KvCacheSpec(
            cache_format=cache_format,
            num_blocks=self.batch * self.num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
        )


@dataclass(frozen=True, kw_only=True)
class Paged:
    """What an attention op reads. Blocks lie in no order, as in an engine that has run for a while."""

    query: Tensor
    caches: list[KvCache]
    tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor


def measure(heads: str, phase: str) -> Callable[[Context], Iterator[Figure]]:
    return partial(_measure, heads, phase)


def _measure(heads: str, phase: str, context: Context) -> Iterator[Figure]:
    shape = context.scale.shape if heads == "alike" else context.scale.grouped
    lengths = context.scale.decode if phase == "decode" else context.scale.prefill
    flex = _CompiledFlex(context)
    for batch, context_len in lengths:
        num_new = 1 if phase == "decode" else context_len
        case = Case(shape=shape, heads=heads, batch=batch, context_len=context_len, num_new=num_new)
        if case.num_bytes > context.scale.max_cache_bytes:
            context.report(f"batch {batch}, {context_len} tokens", "the cache would be too large", False)
            continue
        yield from _case(context, case, flex)


def _case(context: Context, case: Case, flex: _CompiledFlex) -> Iterator[Figure]:
    paged = _make_paged(context, case)
    runs: dict[str, list[Callable[[], Tensor]]] = {
        scheme.value: [
            partial(_attention, context, paged, cache, SoftmaxSpec(scheme=scheme, unified_max=_UNIFIED_MAX))
            for cache in paged.caches
        ]
        for scheme in context.kernels.softmax_schemes
    }
    if _library_can(context, case):
        runs[LIBRARY] = [partial(_by_library, context, paged, cache) for cache in paged.caches]
    sequences = sorted({0, case.batch - 1})
    expected = torch.stack([_expected(context, case, paged, i) for i in sequences])
    first = {name: [partial(_of_sequences, calls[0], case, sequences)] for name, calls in runs.items()}
    errors = context.errors(first, expected)
    raced = {name: runs[name] for name in errors} | _peers(context, case, paged, flex)
    for name, found in context.race(raced).items():
        yield Figure(
            group=f"{case.phase} attention",
            labels={"heads": case.heads, "batch": case.batch, "context": case.context_len, "by": name},
            seconds=found.best_s,
            slowest_s=found.slowest_s,
            num_bytes=case.num_bytes,
            num_ops=case.num_ops,
            error=errors.get(name),
            tolerance=TOLERANCE[context.dtype],
            is_captured=found.is_captured,
        )


def _attention(context: Context, paged: Paged, cache: KvCache, softmax: SoftmaxSpec) -> Tensor:
    spec = AttentionSpec(softmax_scale=paged.query.shape[-1] ** -0.5, softmax=softmax)
    return context.kernels.attention(paged.query, cache, paged.tables, paged.context_lens, paged.cu_seqlens_q, spec)


def _library_can(context: Context, case: Case) -> bool:
    """Whether the attention op gives this step to the library if it is told to."""
    obstacle = context.kernels.library_prefill_obstacle
    if case.num_new == 1 or obstacle is None:
        return False
    found = obstacle(
        dtype=context.dtype,
        num_kv_heads=case.shape.num_kv_heads,
        head_dim=case.shape.head_dim,
        num_seqs=case.batch,
        max_context_len=case.num_blocks * BLOCK_SIZE,
    )
    if found is not None:
        context.report(f"{LIBRARY}, batch {case.batch}, {case.context_len} tokens", found, False)
    return found is None


def _by_library(context: Context, paged: Paged, cache: KvCache) -> Tensor:
    dataflow = context.kernels.dataflow
    assert dataflow is not None, "there is nothing to choose"
    with forcing_prefill(dataflow, PrefillArm.LIBRARY):
        return _attention(context, paged, cache, SoftmaxSpec())


def _of_sequences(run: Callable[[], Tensor], case: Case, sequences: list[int]) -> Tensor:
    out = run()
    return out.view(case.batch, case.num_new, *out.shape[1:])[sequences]


def _make_paged(context: Context, case: Case) -> Paged:
    device, spec = context.device, case.cache_spec(_cache_format(context))
    kernels, shape = context.kernels, case.shape
    caches = [kernels.make_kv_cache(spec) for _ in range(context.num_copies(case.num_bytes))]
    for cache in caches:
        for start in range(0, spec.num_slots, _STORED_AT_ONCE):
            slots = torch.arange(start, min(spec.num_slots, start + _STORED_AT_ONCE), device=device)
            key, value = (context.randn(len(slots), shape.num_kv_heads, shape.head_dim) for _ in range(2))
            kernels.rotary_store_kv_(key[:, :0], key, value, cache, slots, None)
    tables = torch.randperm(spec.num_blocks, dtype=torch.int32, device=device).view(case.batch, case.num_blocks)
    return Paged(
        query=context.randn(case.batch * case.num_new, shape.num_heads, shape.head_dim),
        caches=caches,
        tables=tables,
        context_lens=torch.full((case.batch,), case.context_len, dtype=torch.int32, device=device),
        cu_seqlens_q=case.num_new * torch.arange(case.batch + 1, dtype=torch.int32, device=device),
    )


def _cache_format(context: Context) -> KvCacheFormat:
    return KvCacheFormat.FLOAT32 if context.dtype == torch.float32 else KvCacheFormat.BFLOAT16


def _keys_and_values(
    context: Context, case: Case, paged: Paged, cache: KvCache, sequence: int
) -> tuple[Tensor, Tensor]:
    """Of one sequence [context_len, num_kv_heads, head_dim] each."""
    positions = torch.arange(case.context_len, device=context.device)
    slots = paged.tables[sequence].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return context.kernels.read_kv(cache, slots)


def _expected(context: Context, case: Case, paged: Paged, sequence: int) -> Tensor:
    """softmax(q K^T / sqrt(head_dim)) V in float32, a head at a time."""
    key, value = (x.float() for x in _keys_and_values(context, case, paged, paged.caches[0], sequence))
    query = paged.query.view(case.batch, case.num_new, *paged.query.shape[1:])[sequence].float()
    first_position = case.context_len - case.num_new
    hidden = torch.arange(case.context_len, device=context.device)[None] > (
        first_position + torch.arange(case.num_new, device=context.device)[:, None]
    )
    out = torch.empty_like(query)
    group = case.shape.num_heads // case.shape.num_kv_heads
    for head in range(case.shape.num_heads):
        logits = query[:, head] @ key[:, head // group].T * case.shape.head_dim**-0.5
        out[:, head] = logits.masked_fill_(hidden, float("-inf")).softmax(-1) @ value[:, head // group]
    return out


def _peers(context: Context, case: Case, paged: Paged, flex: _CompiledFlex) -> dict[str, list[Callable[[], Tensor]]]:
    """The same work by others: torch's on keys and values that lie in order, FlashInfer's on pages."""
    group = case.shape.num_heads // case.shape.num_kv_heads
    size = (case.batch, case.shape.num_kv_heads, case.context_len, case.shape.head_dim)
    query = context.randn(case.batch, case.shape.num_heads, case.num_new, case.shape.head_dim)
    pairs = [(context.randn(*size), context.randn(*size)) for _ in paged.caches]
    runs: dict[str, list[Callable[[], Tensor]]] = {
        SDPA: [
            partial(F.scaled_dot_product_attention, query, k, v, is_causal=case.num_new > 1, enable_gqa=group > 1)
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


class _CompiledFlex:
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
