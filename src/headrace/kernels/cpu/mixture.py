"""Mixtures of experts (native/mixture.h)."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from headrace import _native
from headrace.errors import ShapeError
from headrace.kernels.cpu.activation import ACTIVATION_KINDS
from headrace.kernels.cpu.dtypes import DTYPES
from headrace.kernels.cpu.linear import check_linear, packed
from headrace.kernels.cpu.stream import Stream
from headrace.kernels.cpu.targets import check_target
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.ops import MixtureSpec
from headrace.kernels.weights import Experts, PackedWeight


class Mixture:
    """`reference.mixture` on one instruction set, as one op: which experts run is read while it runs.

    A row's result depends on that row alone, to the bit, if it is to be batch invariant.

    Raises:
        BackendUnavailable: an instruction set this machine cannot run.
    """

    def __init__(self, target: str, stream: Stream, dataflow: Dataflow, *, batch_invariant: bool = True) -> None:
        check_target(target)
        self._target = target
        self._stream = stream
        self._dataflow = dataflow
        self._batch_invariant = batch_invariant
        self._experts: WeakKeyDictionary[Experts, _native.Experts] = WeakKeyDictionary()
        self._natives: dict[MixtureSpec, _native.Mixture] = {}

    def __call__(self, x: Tensor, router_logits: Tensor, experts: Experts, spec: MixtureSpec) -> Tensor:
        """
        Shapes:
            x:             [num_tokens, hidden_size] float32 or bfloat16; that of the weights if they are floating point
            router_logits: [num_tokens, num_experts], dtype of x; of equal ones the first is taken
            returns:       like x
        Raises:
            ShapeError: x, router_logits and experts do not fit together.
            KernelError: dtypes that do not, or weights that are not packed.
        """
        up, down = packed(experts.up[0]), packed(experts.down[0])
        check_linear(x, up, None)
        if router_logits.shape != (len(x), len(experts.up)) or router_logits.dtype != x.dtype:
            raise ShapeError(
                f"router_logits are {list(router_logits.shape)} {router_logits.dtype} instead of "
                f"[{len(x)}, {len(experts.up)}] {x.dtype}"
            )
        x, router_logits = x.contiguous(), router_logits.contiguous()
        native, weights, dtype = self._router(spec), self._native_experts(experts), DTYPES[x.dtype]
        out = self._stream.empty(x.shape, x.dtype)
        # In float32 only because the stream has no bytes.
        workspace = self._stream.empty((native.workspace_bytes(weights, dtype, len(x)) // 4,), torch.float32)
        native.run(
            self._stream.native,
            weights,
            self._arms(up),
            self._arms(down),
            dtype,
            len(x),
            x.data_ptr(),
            router_logits.data_ptr(),
            out.data_ptr(),
            workspace.data_ptr(),
        )
        return out

    def _arms(self, weight: PackedWeight) -> _native.ArmsByRows:
        bounds = self._dataflow.bounds(weight.linear_shape)
        return _native.ArmsByRows(bounds.flat_gemm_from, bounds.gemm_from)

    def _router(self, spec: MixtureSpec) -> _native.Mixture:
        found = self._natives.get(spec)
        if found is None:
            found = self._natives[spec] = _native.Mixture(
                self._target,
                spec.num_experts_per_token,
                spec.renormalize,
                ACTIVATION_KINDS[spec.activation],
                self._batch_invariant,
            )
        return found

    def _native_experts(self, experts: Experts) -> _native.Experts:
        found = self._experts.get(experts)
        if found is None:
            found = self._experts[experts] = _native.Experts(
                [packed(weight).matrix for weight in experts.up], [packed(weight).matrix for weight in experts.down]
            )
        return found
