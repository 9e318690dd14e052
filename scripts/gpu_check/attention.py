"""Attention over a paged cache: one new token, a whole prompt, or a chunk at the end of one; each softmax scheme, and
what others make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from headrace.config import KvCacheFormat
from headrace.engine.tune_prefill import forcing_prefill
from headrace.kernels import AttentionSpec, KvCache, SoftmaxSpec
from headrace.kernels.prefill_tuning import PrefillArm
from scripts.gpu_check.attention_cases import BLOCK_SIZE, Case, Paged
from scripts.gpu_check.attention_peers import CompiledFlex, peers
from scripts.gpu_check.context import TOLERANCE, Context, Runs
from scripts.gpu_check.figures import Figure

LIBRARY = "library"
"""The attention op's other implementation of a prompt, over the same pages."""

_UNIFIED_MAX = 0.0
"""Queries and keys are drawn so that logits have a standard deviation of 1, as the unified maximum expects of a model
that it was measured for."""

_STORED_AT_ONCE = 2**15


def measure(heads: str, phase: str) -> Callable[[Context], Iterator[Figure]]:
    return partial(_measure, heads, phase)


def _measure(heads: str, phase: str, context: Context) -> Iterator[Figure]:
    shape = context.scale.shape if heads == "alike" else context.scale.grouped
    scale, flex = context.scale, CompiledFlex(context)
    sizes = {
        "decode": [(batch, length, 1) for batch, length in scale.decode],
        "prefill": [(batch, length, length) for batch, length in scale.prefill],
        "chunk": [(1, length, num_new) for num_new, length in scale.chunks],
    }
    for batch, context_len, num_new in sizes[phase]:
        case = Case(shape=shape, heads=heads, batch=batch, context_len=context_len, num_new=num_new)
        if case.num_bytes > context.scale.max_cache_bytes:
            context.report(f"batch {batch}, {context_len} tokens", "the cache would be too large", False)
            continue
        yield from _case(context, case, flex)


def _case(context: Context, case: Case, flex: CompiledFlex) -> Iterator[Figure]:
    paged = _make_paged(context, case)
    own: dict[str, list[Callable[[], Tensor]]] = {
        scheme.value: [
            partial(_attention, context, paged, cache, SoftmaxSpec(scheme=scheme, unified_max=_UNIFIED_MAX))
            for cache in paged.caches
        ]
        for scheme in context.kernels.softmax_schemes
    }
    if _library_can(context, case):
        own[LIBRARY] = [partial(_by_library, context, paged, cache) for cache in paged.caches]
    sequences = sorted({0, case.batch - 1})
    expected = torch.stack([_expected(context, case, paged, i) for i in sequences])
    errors = context.errors(_first(own, case, sequences), expected)
    # Only now: FlashInfer may compile for minutes, and the kernels of this package are not to wait for it.
    others = peers(context, case, paged, flex)
    errors |= context.errors(_first(others, case, sequences), expected)
    for name, found in context.race_right(own | others, errors, others).items():
        yield Figure(
            group=f"{case.phase} attention",
            labels={"heads": case.heads, "batch": case.batch, "context": case.tokens, "by": name},
            seconds=found.best_s,
            slowest_s=found.slowest_s,
            num_bytes=case.num_bytes,
            num_ops=case.num_ops,
            error=errors[name],
            tolerance=TOLERANCE[context.dtype],
            is_captured=found.is_captured,
        )


def _attention(context: Context, paged: Paged, cache: KvCache, softmax: SoftmaxSpec) -> Tensor:
    spec = AttentionSpec(softmax_scale=paged.query.shape[-1] ** -0.5, softmax=softmax)
    return context.kernels.attention(paged.query, cache, paged.tables, paged.context_lens, paged.cu_seqlens_q, spec)


def _library_can(context: Context, case: Case) -> bool:
    """Whether the attention op gives this step to the library if it is told to."""
    obstacle = context.kernels.prefill_library_obstacle
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


def _first(runs: Runs, case: Case, sequences: list[int]) -> Runs:
    """What is compared of each."""
    return {name: [partial(_of_sequences, calls[0], case, sequences)] for name, calls in runs.items()}


def _of_sequences(run: Callable[[], Tensor], case: Case, sequences: list[int]) -> Tensor:
    """[sequences, num_new, num_heads, head_dim], of tokens end to end or, as torch's own attention has them, of heads
    before tokens."""
    out = run()
    by_sequence = out.transpose(1, 2) if out.dim() == 4 else out.view(case.batch, case.num_new, *out.shape[1:])
    return by_sequence[sequences]


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


def _expected(context: Context, case: Case, paged: Paged, sequence: int) -> Tensor:
    """softmax(q K^T / sqrt(head_dim)) V in float32, a head at a time."""
    key, value = paged.keys_and_values(context.kernels, paged.caches[0], sequence)
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
