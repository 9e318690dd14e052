"""What is used of FlashInfer, for a dry run on a CPU: names, order and defaults of parameters (0.6.18 and 0.7.2), and
layouts.

What FlashInfer would refuse, or worse read as something else, is refused here; what it computes is computed from its
definition, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RECOMMENDED_BYTES = 128 * 2**20
_DECODE_GROUPS = (1, 2, 3, 4, 6, 8, 16)
"""Heads that share a KV head, for which decoding on CUDA cores is compiled."""

_LAYOUTS = ("NHD", "HND")


class BatchDecodeWithPagedKVCacheWrapper:
    """One new token of each sequence."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
    ) -> None:
        self._pages = _Pages(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        group = num_qo_heads // num_kv_heads
        if not self._use_tensor_cores and group not in _DECODE_GROUPS:
            raise RuntimeError(f"Unsupported group_size: {group}")
        self._pages.plan(indptr, indices, last_page_len, page_size)
        self._pages.plan_heads(num_qo_heads, num_kv_heads, head_dim, q_data_type, kv_data_type)

    def run(self, q: Tensor, paged_kv_cache: Tensor | tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        bounds = list(range(len(self._pages.lens) + 1))
        return self._pages.attend(q, paged_kv_cache, bounds, out, causal=False)


class BatchPrefillWithPagedKVCacheWrapper:
    """The last tokens of each sequence."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False) -> None:
        self._pages = _Pages(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._bounds: list[int] = []
        self._causal = False

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        self._pages.plan(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        self._pages.plan_heads(num_qo_heads, num_kv_heads, head_dim_qk, q_data_type, kv_data_type)
        _check_indices("qo_indptr", qo_indptr, len(self._pages.lens) + 1)
        self._bounds, self._causal = qo_indptr.tolist(), causal

    def run(self, q: Tensor, paged_kv_cache: Tensor | tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        return self._pages.attend(q, paged_kv_cache, self._bounds, out, causal=self._causal)


class _Pages:
    """lens: tokens of each sequence."""

    def __init__(self, workspace: Tensor, layout: str, use_cuda_graph: bool) -> None:
        if layout not in _LAYOUTS:
            raise KeyError(f"Invalid kv_layout {layout}")
        assert not use_cuda_graph, "takes buffers that the stand-in has no parameters for"
        assert workspace.dtype == torch.uint8, workspace.dtype
        assert workspace.numel() >= _RECOMMENDED_BYTES, workspace.numel()
        # Zeros that nobody has touched take no memory, and reading them all would take time.
        assert not workspace[: 2**16].any(), "it must be zeros when it is first used"
        self._layout, self._tables, self.lens = layout, [], []

    def plan(self, begins: Tensor, page_ids: Tensor, last_page_len: Tensor, page_size: int) -> None:
        _check_indices("indptr", begins, len(last_page_len) + 1)
        _check_indices("indices", page_ids, int(begins[-1]))
        _check_indices("last_page_len", last_page_len, len(last_page_len))
        assert int(begins[0]) == 0
        assert 1 <= int(last_page_len.min()) <= int(last_page_len.max()) <= page_size
        counts = begins.diff().tolist()
        self._page_size = page_size
        self._tables = [*page_ids.long().split(counts)]
        self.lens = [(n - 1) * page_size + last for n, last in zip(counts, last_page_len.tolist(), strict=True)]

    def plan_heads(
        self, num_heads: int, num_kv_heads: int, head_dim: int, q_dtype: str | torch.dtype, kv_dtype: object
    ) -> None:
        assert num_heads % num_kv_heads == 0
        self._num_heads, self._num_kv_heads, self._head_dim = num_heads, num_kv_heads, head_dim
        self._q_dtype = getattr(torch, q_dtype) if isinstance(q_dtype, str) else q_dtype
        self._kv_dtype = self._q_dtype if kv_dtype is None else kv_dtype

    def attend(
        self,
        q: Tensor,
        cache: Tensor | tuple[Tensor, Tensor],
        bounds: list[int],
        out: Tensor | None,
        *,
        causal: bool,
    ) -> Tensor:
        if q.dtype != self._q_dtype:
            raise ValueError(f"The dtype of q {q.dtype} does not match the q_data_type {self._q_dtype}")
        assert tuple(q.shape) == (bounds[-1], self._num_heads, self._head_dim), q.shape
        out = torch.empty_like(q) if out is None else out
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        keys, values = self._unpacked(cache)
        for i, (table, length) in enumerate(zip(self._tables, self.lens, strict=True)):
            rows = slice(bounds[i], bounds[i + 1])
            key, value = (x[table].flatten(0, 1)[:length].double() for x in (keys, values))
            out[rows] = _attention(q[rows].double(), key, value, causal=causal).to(out.dtype)
        return out

    def _unpacked(self, cache: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, page_size, num_kv_heads, head_dim]."""
        keys, values = cache if isinstance(cache, tuple) else cache.unbind(1)
        if keys.dtype != self._kv_dtype:
            raise ValueError(f"The dtype of k {keys.dtype} does not match the kv_data_type {self._kv_dtype}")
        assert keys.stride() == values.stride(), "one set of strides is read for both"
        if self._layout == "HND":
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        assert keys.shape == values.shape
        assert tuple(keys.shape[1:]) == (self._page_size, self._num_kv_heads, self._head_dim), keys.shape
        return keys, values


def _check_indices(name: str, indices: Tensor, size: int) -> None:
    """FlashInfer is compiled for the type of some of them and reads all as that."""
    assert indices.dtype == torch.int32, f"{name} is {indices.dtype}"
    assert tuple(indices.shape) == (size,), f"{name} has shape {tuple(indices.shape)}"


def _attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Of one sequence; the last query sees all keys."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    logits = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    if causal:
        is_seen = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
        logits = logits.masked_fill(~is_seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), value)
