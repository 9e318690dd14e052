"""Rotary position embedding and the write of new keys and values (native/rotary.h)."""

import torch
from torch import Tensor

from headrace import _native
from headrace.errors import KernelError
from headrace.kernels.cpu.dtypes import DTYPES
from headrace.kernels.cpu.kv_cache import packed
from headrace.kernels.cpu.stream import Stream
from headrace.kernels.cpu.targets import check_target
from headrace.kernels.kv_cache import KvCache
from headrace.kernels.token_heads import by_token, check_stored_heads


class RotaryTable:
    """`reference.rotary_table`; the same bits on every machine."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __call__(self, positions: Tensor, inv_freq: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
        """amplitude * cos and sin of position * inv_freq, the product rounded to float32.

        Shapes:
            positions: [num_tokens] int64
            inv_freq:  [half] float32
            returns:   two tensors [num_tokens, half] float32
        """
        if positions.dtype != torch.int64 or inv_freq.dtype != torch.float32:
            raise KernelError(
                f"positions are {positions.dtype} and inv_freq {inv_freq.dtype}; allowed: int64 and float32"
            )
        positions, inv_freq = positions.contiguous(), inv_freq.contiguous()
        shape = len(positions), len(inv_freq)
        cos, sin = (self._stream.empty(shape, torch.float32) for _ in range(2))
        _native.rotary_table(
            self._stream.native,
            positions.data_ptr(),
            len(positions),
            inv_freq.data_ptr(),
            len(inv_freq),
            amplitude,
            cos.data_ptr(),
            sin.data_ptr(),
        )
        return cos, sin


class RotaryStoreKv:
    """`reference.rotary_store_kv_` on one instruction set; the same bits on all of them.

    Raises:
        BackendUnavailable: an instruction set this machine cannot run.
    """

    def __init__(self, target: str, stream: Stream) -> None:
        check_target(target)
        self._stream = stream
        self._native = _native.StoreKv(target)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KvCache,
        slot_mapping: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        *,
        interleaved: bool = False,
    ) -> None:
        """
        Shapes:
            query:        [num_tokens, num_heads, head_dim] float32 or bfloat16, rotated in place
            key, value:   [num_tokens, num_kv_heads, head_dim], dtype of query
            slot_mapping: [num_tokens] int64; NOT_STORED writes nothing
            cos, sin:     [num_tokens, half] float32
        Raises:
            ShapeError: tensors that do not fit together or the cache.
            KernelError: dtypes that do not.
            IndexError: a slot the cache has not; nothing is written then.
        """
        kv_cache = packed(kv_cache)
        num_tokens, half = len(query), 0 if cos_sin is None else cos_sin[0].shape[-1]
        check_stored_heads(query, key, value, kv_cache.spec, half, DTYPES)
        key, value = by_token(key), by_token(value)
        slot_mapping = slot_mapping.contiguous()
        cos, sin = (None, None) if cos_sin is None else (cos_sin[0].contiguous(), cos_sin[1].contiguous())
        self._native.run(
            self._stream.native,
            kv_cache.cache,
            DTYPES[query.dtype],
            num_tokens,
            query.shape[1],
            query.data_ptr(),
            query.stride(0),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            0 if cos is None else cos.data_ptr(),
            0 if sin is None else sin.data_ptr(),
            half,
            interleaved,
            slot_mapping.data_ptr(),
        )
