"""Contexts to measure attention over: random keys and values in a cache larger than a machine's caches."""

from collections.abc import Callable
from itertools import count

import torch

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.kernels import AttentionSpec, Kernels, KvCacheSpec, SoftmaxSpec
from headrace.kernels.attention_tuning import AttentionChoice, AttentionShape

_WORKING_SET_BYTES = 128 * 2**20
"""More than caches hold: a model reads every layer's keys and values, and its weights, before it meets one again."""

_BLOCK_SIZE = 16
_FILL_TOKENS = 1024


class Contexts:
    """Contexts in one cache, each call's after the one before; blocks in no order, as in a busy engine.

    num_new: the last tokens of each, which attend; num_seqs: contexts of one call.
    """

    def __init__(
        self, kernels: Kernels, shape: AttentionShape, longest: int, *, num_new: int = 1, num_seqs: int = 1
    ) -> None:
        self._kernels, self._device = kernels, kernels.device
        dtype = torch.float32 if shape.cache_format is KvCacheFormat.FLOAT32 else torch.bfloat16
        self._num_seqs = num_seqs
        self._spec = _cache_spec(kernels, shape, num_seqs * -(-longest // _BLOCK_SIZE))
        self._cache = kernels.make_kv_cache(self._spec)
        no_queries = torch.empty(_FILL_TOKENS, 0, shape.head_dim, dtype=dtype, device=self._device)
        key, value = torch.randn(2, _FILL_TOKENS, shape.num_kv_heads, shape.head_dim).to(self._device, dtype)
        for slots in torch.split(torch.arange(self._spec.num_slots, device=self._device), _FILL_TOKENS):
            n = len(slots)
            kernels.rotary_store_kv_(no_queries[:n], key[:n], value[:n], self._cache, slots, None)
        self._query = torch.randn(num_seqs * num_new, shape.num_heads, shape.head_dim).to(self._device, dtype)
        self._order = torch.randperm(self._spec.num_blocks, dtype=torch.int32).to(self._device)
        self._bounds = torch.arange(num_seqs + 1, dtype=torch.int32, device=self._device) * num_new
        self._attention_specs = {
            scheme: AttentionSpec(softmax_scale=shape.head_dim**-0.5, softmax=SoftmaxSpec(scheme=scheme))
            for scheme in kernels.softmax_schemes
        }
        self._calls = count()

    def num_batches(self, context_len: int) -> int:
        """Calls that each have contexts of their own."""
        return self._spec.num_blocks // (self._num_seqs * -(-context_len // _BLOCK_SIZE))

    def call(self, choice: AttentionChoice, context_len: int) -> Callable[[], object]:
        """A token's attention in each sequence, over the next contexts of so many tokens."""
        dataflow, attend = self._kernels.dataflow, self.attend(choice.scheme, context_len)
        assert dataflow is not None, "there is nothing to choose"

        def run() -> object:
            dataflow.max_pieces_from = {1: choice.max_pieces}
            try:
                return attend()
            finally:
                dataflow.max_pieces_from = {}

        return run

    def attend(self, scheme: SoftmaxScheme, context_len: int) -> Callable[[], object]:
        """Attention over the next contexts of so many tokens, as the dataflow then has it."""
        num_blocks = self._num_seqs * -(-context_len // _BLOCK_SIZE)
        first = next(self._calls) % self.num_batches(context_len) * num_blocks
        table = self._order[first : first + num_blocks].view(self._num_seqs, -1)
        lens = torch.full((self._num_seqs,), context_len, dtype=torch.int32, device=self._device)
        spec = self._attention_specs[scheme]
        return lambda: self._kernels.attention(self._query, self._cache, table, lens, self._bounds, spec)


def _cache_spec(kernels: Kernels, shape: AttentionShape, num_blocks: int) -> KvCacheSpec:
    """Of so many blocks, or of more where they would fit into caches."""
    return _spec_of(shape, max(num_blocks, _WORKING_SET_BYTES // kernels.kv_cache_num_bytes(_spec_of(shape, 1))))


def batch_bytes(kernels: Kernels, shape: AttentionShape, num_seqs: int, context_len: int) -> int:
    """Of the keys and values of so many contexts."""
    return kernels.kv_cache_num_bytes(_spec_of(shape, num_seqs * -(-context_len // _BLOCK_SIZE)))


def _spec_of(shape: AttentionShape, num_blocks: int) -> KvCacheSpec:
    return KvCacheSpec(
        cache_format=shape.cache_format,
        num_blocks=num_blocks,
        block_size=_BLOCK_SIZE,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )
