"""What a CUDA graph does, on a CPU: a pass recorded op by op, and run again on the same memory without its Python.

A tape holds torch's ops with the very tensors that they read and wrote. So a replay sees what lies in those tensors by
then and nothing else: whatever the pass computed on the host is as it was when it was recorded. An op that looks at a
tensor on the host cannot be recorded. Memory that was only allocated holds NaN at each replay, as a graph's holds
whatever was there.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.config import SoftmaxScheme
from headrace.kernels import NOT_STORED, AttentionSpec, DenseKvCache, KernelChoice, Kernels, Recording, resolve_kernels
from headrace.kernels.reference.rotary import rotary_

_LOOKS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
_ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in _LOOKS:
            raise RuntimeError(f"{func._schema.name} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, out in self.ops:
                if func._schema.name in _ALLOCATIONS:
                    if out.is_floating_point():
                        out.fill_(torch.nan)
                else:
                    _write(out, func(*args, **kwargs))


def _write(there: Any, here: Any) -> None:
    if isinstance(there, Tensor):
        # Views, and what is computed in place, are there already. (`func.is_view` also says so of copies: aten::to.)
        if there.untyped_storage().data_ptr() != here.untyped_storage().data_ptr():
            there.copy_(here)
    elif isinstance(there, tuple | list):
        for a, b in zip(there, here, strict=True):
            _write(a, b)


class TapeRecorder:
    """`record` as `GraphRecorder` does it, with tapes for graphs. num_replays: of all of them."""

    def __init__(self) -> None:
        self.num_recordings = self.num_replays = 0

    def record(self, forward: Callable[[], Any]) -> tuple[Any, Recording]:
        computed = forward()
        tape = Tape()
        try:
            with tape:
                out = forward()
        except RuntimeError as error:
            return computed, Recording(obstacle=str(error))
        self.num_recordings += 1
        with torch.inference_mode():
            _write(out, computed)

        def replay() -> None:
            self.num_replays += 1
            tape.replay()

        return out, Recording(replay=replay, num_ops=len(tape.ops))


def tape_kernels(recorder: TapeRecorder) -> Kernels:
    """The reference, with ops that look at no tensor on the host where it does, on steps that are padded."""
    return replace(
        resolve_kernels(KernelChoice.REFERENCE),
        attention=attention,
        rotary_store_kv_=rotary_store_kv_,
        record=recorder.record,
        pads_steps=True,
    )


def rotary_store_kv_(query, key, value, kv_cache, slot_mapping, cos_sin, *, interleaved=False) -> None:
    assert isinstance(kv_cache, DenseKvCache)
    key = key.clone()
    if cos_sin is not None:
        rotary_(query, *cos_sin, interleaved=interleaved)
        rotary_(key, *cos_sin, interleaved=interleaved)
    is_stored = slot_mapping != NOT_STORED
    slots = torch.where(is_stored, slot_mapping, 0)
    for data, x in zip(kv_cache.data.flatten(1, 2), (key, value), strict=True):
        # One after the other: what is not stored writes to slot 0 what is there by then.
        for i in range(len(slots)):
            slot = slots[i : i + 1]
            data.index_copy_(0, slot, torch.where(is_stored[i], x[i : i + 1], data[slot]))


def attention(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec: AttentionSpec) -> Tensor:
    """Over all that tables have room for, masked."""
    assert isinstance(kv_cache, DenseKvCache)
    assert spec.softmax.scheme is SoftmaxScheme.SYNCHRONIZED
    rows = torch.arange(len(query))
    sequence = torch.searchsorted(cu_seqlens_q, rows, right=True) - 1
    stop = context_lens[sequence] - (cu_seqlens_q[sequence + 1] - rows - 1)
    size = kv_cache.spec.block_size
    keys = torch.arange(block_tables.shape[1] * size)
    slots = block_tables.clamp(min=0)[:, keys // size].long() * size + keys % size
    # A weight of 0 does not hide a NaN in memory that nobody has written.
    key, value = kv_cache.data.flatten(1, 2)[:, slots[sequence]].nan_to_num(0.0)
    group = query.shape[1] // kv_cache.spec.num_kv_heads
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    scores = torch.einsum("thd,tkhd->thk", query, key) * spec.softmax_scale
    if spec.logit_soft_cap is not None:
        scores = spec.logit_soft_cap * torch.tanh(scores / spec.logit_soft_cap)
    hidden = keys >= stop[:, None]
    if spec.sliding_window is not None:
        hidden |= keys < stop[:, None] - spec.sliding_window
    # Who sees nothing gets nothing.
    weights = torch.softmax(scores.masked_fill(hidden[:, None], -math.inf), dim=-1).nan_to_num(0.0)
    return torch.einsum("thk,tkhd->thd", weights, value)
