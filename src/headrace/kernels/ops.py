"""The signature of each op: what layers may call and what an implementation must provide."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from headrace.config import Activation, SoftmaxScheme, WeightFormat
from headrace.kernels.kv_cache import KvCache, KvCacheSpec
from headrace.kernels.weights import Experts, Weight, WeightBuilder

if TYPE_CHECKING:
    from headrace import _native

T = TypeVar("T")
"""What a recorded function returns: tensors, however they are put together."""


@dataclass(frozen=True, kw_only=True)
class SoftmaxSpec:
    """How one layer's softmax finds its reference; see `SoftmaxScheme`.

    unified_max: what the asynchronized scheme subtracts from logits, in natural logarithms (phi in the paper).
    element_bounds: it then also asks of each logit that logit - unified_max lies strictly between these two, as the
        paper does; None asks only that the row as a whole is sound.
    """

    scheme: SoftmaxScheme = SoftmaxScheme.SYNCHRONIZED
    unified_max: float = 0.0
    element_bounds: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What stays the same for every call of one layer's attention.

    sliding_window: tokens a query sees, itself included; None sees all before it.
    logit_soft_cap: c * tanh(logits / c) before the softmax, None for none.
    """

    softmax_scale: float
    sliding_window: int | None = None
    logit_soft_cap: float | None = None
    softmax: SoftmaxSpec = SoftmaxSpec()


class AttentionShare(NamedTuple):
    """What the part of a context that one rank holds adds to softmax(logits) V, without the division.

    The whole is the sum over ranks of 2^reference * numerator over the sum of 2^reference * denominator; references of
    the asynchronized scheme are the unified maximum, but for rows computed again. They are in base 2, as kernels
    compute, since a change of base would round each rank's differently.

    Shapes:
        numerators:  [num_tokens, num_heads, head_dim] float32
        normalizers: [num_tokens, num_heads, 2] float32, denominator and reference; 0 and -infinity where a token sees
            nothing of what the rank holds
    """

    numerators: Tensor
    normalizers: Tensor


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """How a mixture of experts routes, and the activation of its experts.

    renormalize: the probabilities of the experts taken are scaled to sum to one.
    """

    num_experts_per_token: int
    renormalize: bool
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A forward pass recorded as one call, or why it could not be.

    replay: runs it again, on what the tensors it read from hold by then, into those it wrote to.
    """

    replay: Callable[[], None] | None = None
    num_ops: int = 0
    obstacle: str | None = None


class LinearOp(Protocol):
    def __call__(
        self, x: Tensor, weight: Weight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor: ...


class EmbeddingOp(Protocol):
    def __call__(
        self,
        ids: Tensor,
        weight: Weight,
        *,
        dtype: torch.dtype,
        scale: float = 1.0,
        offset: int = 0,
        zeros_outside: bool = False,
    ) -> Tensor: ...


class RmsNormOp(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False, residual: Tensor | None = None
    ) -> Tensor: ...


class LayerNormOp(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None = None
    ) -> Tensor: ...


class AddOp(Protocol):
    def __call__(self, residual: Tensor, x: Tensor) -> None: ...


class RotaryTableOp(Protocol):
    def __call__(self, positions: Tensor, inv_freq: Tensor, amplitude: float) -> tuple[Tensor, Tensor]: ...


class RotaryStoreKvOp(Protocol):
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
    ) -> None: ...


class MakeKvCacheOp(Protocol):
    def __call__(self, spec: KvCacheSpec) -> KvCache: ...


class KvCacheNumBytesOp(Protocol):
    def __call__(self, spec: KvCacheSpec) -> int: ...


class ReadKvOp(Protocol):
    def __call__(self, kv_cache: KvCache, slots: Tensor) -> tuple[Tensor, Tensor]: ...


class AttentionOp(Protocol):
    def __call__(
        self,
        query: Tensor,
        kv_cache: KvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        spec: AttentionSpec,
    ) -> Tensor: ...


class AttentionShareOp(Protocol):
    def __call__(
        self,
        query: Tensor,
        kv_cache: KvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        owned_blocks: Tensor,
        spec: AttentionSpec,
    ) -> AttentionShare: ...


class LibraryPrefillObstacle(Protocol):
    """Why the library's attention cannot take prompts of a step; None if it can."""

    def __call__(
        self, *, dtype: torch.dtype, num_kv_heads: int, head_dim: int, num_seqs: int, max_context_len: int
    ) -> str | None: ...


class JoinHeadsOp(Protocol):
    def __call__(self, parts: Sequence[Tensor]) -> Tensor: ...


class WeighShareOp(Protocol):
    def __call__(
        self, share: AttentionShare, normalizers: Sequence[Tensor], rank: int, *, dtype: torch.dtype, num_parts: int = 1
    ) -> Tensor: ...


class ActivationOp(Protocol):
    def __call__(self, x: Tensor, kind: Activation) -> Tensor: ...


class MixtureOp(Protocol):
    def __call__(self, x: Tensor, router_logits: Tensor, experts: Experts, spec: MixtureSpec) -> Tensor: ...


class ArgmaxOp(Protocol):
    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]: ...


class LogSumExpOp(Protocol):
    def __call__(self, logits: Tensor) -> Tensor: ...


class TopKOp(Protocol):
    def __call__(self, logits: Tensor, k: int) -> Tensor: ...


class QuantizeRowsOp(Protocol):
    def __call__(self, rows: Tensor, weight_format: WeightFormat) -> tuple[Tensor, Tensor]: ...


class WeightBuilderOp(Protocol):
    def __call__(self, weight_format: WeightFormat, rows: int, columns: int) -> WeightBuilder: ...


class WeightNumBytesOp(Protocol):
    def __call__(self, weight_format: WeightFormat, rows: int, columns: int) -> int: ...


class WeightRowsOp(Protocol):
    def __call__(self, weight: Weight, rows: range) -> Weight: ...


class RecordOp(Protocol):
    def __call__(self, forward: Callable[[], T]) -> tuple[T, Recording]: ...


class JoinReplaysOp(Protocol):
    """Two replays, one after the other, as one call."""

    def __call__(self, first: Callable[[], None], second: Callable[[], None], /) -> Callable[[], None]: ...


def call_in_turn(first: Callable[[], None], second: Callable[[], None], /) -> Callable[[], None]:
    """The `JoinReplaysOp` that knows nothing of what it joins."""

    def replay() -> None:
        first()
        second()

    return replay


class NativeStream(Protocol):
    """What native ops are launched on: those that join ranks run, are recorded and are replayed among the others.

    native: the stream itself.
    """

    @property
    def native(self) -> "_native.Stream": ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for an op's output; while recording it stays an output of the recording."""
        ...


class MachineOps(Protocol):
    """What this machine does at best, measured now, with the threads that the ops run on.

    An operation is a multiply or an add; `multiply` also says which type weights of a format are multiplied as.
    """

    def read_bytes_per_s(self, buffer_bytes: int) -> float: ...

    def multiply_ops_per_s(self, weight_format: WeightFormat) -> tuple[str, float]: ...


class SetNumThreadsOp(Protocol):
    def __call__(self, num_threads: int, /) -> None: ...
