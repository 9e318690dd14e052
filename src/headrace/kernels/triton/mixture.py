"""Mixtures of experts: one product for all experts that tokens chose, without asking the device which they are."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.errors import KernelError, ShapeError
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.mixture_tuning import ExpertLaunch, ExpertMatrix, MixtureShape
from headrace.kernels.ops import MixtureSpec
from headrace.kernels.triton.expert_tiles import block_rows
from headrace.kernels.triton.expert_weights import ExpertTables, WeightKind, WeightTable
from headrace.kernels.triton.flat_gemm import dot_dtype
from headrace.kernels.triton.launch import is_ptx
from headrace.kernels.triton.mixture_kernels import experts_down_kernel, experts_up_kernel, weighted_sum_kernel
from headrace.kernels.triton.routing import Routing, route
from headrace.kernels.tuning import Tiles
from headrace.kernels.weights import BLOCK_COLUMNS, Experts

_MAX_SCRATCH_BYTES = 2**28
"""Of experts' outputs before they are summed; more tokens are taken in several turns."""

_SUM_BLOCK = 1024

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Blocks(NamedTuple):
    """rows: pairs of a token and an expert that a block takes, all of one expert."""

    rows: int
    tiles: Tiles


class Mixture:
    """`reference.mixture`, of dense weights and quantized ones. Owns tables of the experts' addresses.

    dataflow: asked for the tiles of each launch.
    """

    def __init__(self, dataflow: Dataflow) -> None:
        self._dataflow = dataflow
        self._tables = ExpertTables()

    def __call__(self, x: Tensor, router_logits: Tensor, experts: Experts, spec: MixtureSpec) -> Tensor:
        """
        Shapes:
            x:             [num_tokens, hidden_size]; the dtype of the weights if they are floating point
            router_logits: [num_tokens, num_experts]; of equal ones the first is taken
            returns:       like x
        Raises:
            ShapeError: x, router_logits and experts do not fit together.
            KernelError: dtypes that do not, or weights that no kernel reads.
        """
        up, down = self._tables.of(experts)
        _check(x, router_logits, up, down, spec)
        x = x if x.stride(1) == 1 else x.contiguous()
        router_logits = router_logits if router_logits.stride(1) == 1 else router_logits.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        shape = experts.mixture_shape(x.dtype)
        for turn in _turns(len(x), down.shape[0], spec.num_experts_per_token):
            self._run(x[turn], router_logits[turn], (up, down), shape, spec, out[turn])
        return out

    def _run(
        self,
        x: Tensor,
        router_logits: Tensor,
        tables: tuple[WeightTable, WeightTable],
        shape: MixtureShape,
        spec: MixtureSpec,
        out: Tensor,
    ) -> None:
        up, down = tables
        routing = route(router_logits, spec.num_experts_per_token, renormalize=spec.renormalize)
        num_pairs, hidden_size = len(routing.pairs), down.shape[0]
        blocks = {matrix: self._blocks(shape, matrix, num_pairs) for matrix in ExpertMatrix}
        hidden = torch.empty(num_pairs, down.shape[1], dtype=x.dtype, device=x.device)
        _launch_up(x, up, routing, blocks[ExpertMatrix.UP], spec, hidden)
        num_splits = blocks[ExpertMatrix.DOWN].tiles.num_splits
        parts = torch.empty(num_pairs, num_splits, hidden_size, dtype=torch.float32, device=x.device)
        _launch_down(hidden, down, routing, blocks[ExpertMatrix.DOWN], parts)
        block = min(_SUM_BLOCK, triton.next_power_of_2(hidden_size))
        weighted_sum_kernel[(len(x), triton.cdiv(hidden_size, block))](
            parts,
            routing.weights,
            out,
            hidden_size,
            NUM_PARTS=spec.num_experts_per_token,
            NUM_SPLITS=num_splits,
            BLOCK=block,
        )

    def _blocks(self, shape: MixtureShape, matrix: ExpertMatrix, num_pairs: int) -> _Blocks:
        launch = ExpertLaunch(matrix=matrix, block_rows=block_rows(num_pairs, shape.num_experts))
        return _Blocks(launch.block_rows, self._dataflow.expert_tiles(shape, launch))


def _launch_up(x: Tensor, up: WeightTable, routing: Routing, blocks: _Blocks, spec: MixtureSpec, out: Tensor) -> None:
    num_experts = len(up.values)
    num_outputs, num_inputs = up.shape[0] // 2, up.shape[1]
    experts_up_kernel[_grid(len(routing.pairs), num_experts, num_outputs, blocks)](
        x,
        up.values,
        up.scales,
        up.row_scales,
        routing.pairs,
        routing.starts,
        out,
        x.stride(0),
        num_experts,
        num_outputs,
        num_inputs,
        NUM_EXPERTS_PER_TOKEN=spec.num_experts_per_token,
        KIND=spec.activation.value,
        **_constants(up, x.dtype, blocks),
    )


def _launch_down(x: Tensor, down: WeightTable, routing: Routing, blocks: _Blocks, out: Tensor) -> None:
    num_experts = len(down.values)
    num_outputs, num_inputs = down.shape
    tiles = blocks.tiles
    experts_down_kernel[_grid(len(routing.pairs), num_experts, num_outputs, blocks)](
        x,
        down.values,
        down.scales,
        down.row_scales,
        routing.pairs,
        routing.starts,
        out,
        num_experts,
        num_outputs,
        num_inputs,
        triton.cdiv(triton.cdiv(num_inputs, tiles.num_splits), tiles.block_k) * tiles.block_k,
        NUM_SPLITS=tiles.num_splits,
        **_constants(down, x.dtype, blocks),
    )


def _constants(table: WeightTable, dtype: torch.dtype, blocks: _Blocks) -> dict[str, object]:
    tiles = blocks.tiles
    return {
        "WEIGHT": WeightKind(
            dtype=_DTYPES[dtype],
            dot_dtype=dot_dtype(dtype),
            num_bits=table.num_bits,
            is_aligned=table.is_aligned,
            is_ptx=is_ptx(),
        ),
        "BLOCK_EXPERTS": triton.next_power_of_2(len(table.values)),
        "BLOCK_M": blocks.rows,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "STEP": BLOCK_COLUMNS if table.num_bits else tiles.block_k,
        "NUM_STAGES": tiles.num_stages,
        "num_warps": tiles.num_warps,
    }


def _grid(num_pairs: int, num_experts: int, num_outputs: int, blocks: _Blocks) -> tuple[int, int, int]:
    """Each expert that has pairs may have one block that is not full."""
    num_blocks = num_pairs // blocks.rows + min(num_pairs, num_experts)
    return num_blocks, triton.cdiv(num_outputs, blocks.tiles.block_n), blocks.tiles.num_splits


def _turns(num_tokens: int, hidden_size: int, num_experts_per_token: int) -> list[slice]:
    size = max(1, _MAX_SCRATCH_BYTES // (hidden_size * num_experts_per_token * torch.float32.itemsize))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _check(x: Tensor, router_logits: Tensor, up: WeightTable, down: WeightTable, spec: MixtureSpec) -> None:
    num_experts, hidden_size = len(up.values), up.shape[1]
    if x.dim() != 2 or x.shape[1] != hidden_size:
        raise ShapeError(f"x is {list(x.shape)}; want [num_tokens, {hidden_size}] columns, as the experts take")
    if router_logits.shape != (len(x), num_experts):
        raise ShapeError(f"router_logits are {list(router_logits.shape)} instead of [{len(x)}, {num_experts}]")
    if len(down.values) != num_experts or down.shape != (hidden_size, up.shape[0] // 2):
        raise ShapeError(f"{num_experts} experts of {list(up.shape)} with {len(down.values)} of {list(down.shape)}")
    if not 1 <= spec.num_experts_per_token <= num_experts:
        raise ShapeError(f"{spec.num_experts_per_token} of {num_experts} experts; allowed: 1 to {num_experts}")
    for table in (up, down):
        if x.dtype not in _DTYPES or (table.num_bits == 0 and x.dtype != table.dtype):
            raise KernelError(f"input is {x.dtype}, the experts {table.dtype}; allowed: the same for both")
