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
from headrace.kernels.triton.activation import activate
from headrace.kernels.triton.expert_tiles import block_rows
from headrace.kernels.triton.expert_weights import ExpertTables, WeightTable, add_product, load_columns, scale_rows
from headrace.kernels.triton.flat_gemm import dot_dtype
from headrace.kernels.triton.launch import is_ptx
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


@triton.jit
def find_block(starts_ptr, block, num_experts, BLOCK_M: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """The expert of a block of at most BLOCK_M pairs, where it begins, and where the expert's pairs end; blocks are
    numbered through experts. Past the last block the expert is num_experts or more."""
    ids = tl.arange(0, BLOCK_EXPERTS)
    starts = tl.load(starts_ptr + ids, mask=ids < num_experts, other=0)
    ends = tl.load(starts_ptr + ids + 1, mask=ids < num_experts, other=0)
    num_blocks = (ends - starts + BLOCK_M - 1) // BLOCK_M
    ends_of_blocks = tl.cumsum(num_blocks, axis=0)
    expert = tl.sum((ends_of_blocks <= block).to(tl.int32), axis=0)
    is_expert = ids == expert
    block_in_expert = block - tl.sum(tl.where(is_expert, ends_of_blocks - num_blocks, 0), axis=0)
    begin = tl.sum(tl.where(is_expert, starts, 0), axis=0) + block_in_expert * BLOCK_M
    return expert, begin, tl.sum(tl.where(is_expert, ends, 0), axis=0)


@triton.jit
def experts_up_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    row_scales_ptr,
    pairs_ptr,
    starts_ptr,
    out_ptr,
    x_row_stride,
    num_experts,
    num_outputs,
    num_inputs,
    NUM_EXPERTS_PER_TOKEN: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_PTX: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[i] = act(gate_e(x)) * up_e(x) of the token of pairs[i] and its expert e.

    Grid: [blocks of pairs, ceil(num_outputs / BLOCK_N)], the first as many as there could be. C^T = W x^T, so that few
    tokens fill the tensor cores' short side.

    Shapes: out [num_pairs, num_outputs], weights [2 * num_outputs, num_inputs]
    """
    expert, begin, end = find_block(starts_ptr, tl.program_id(0), num_experts, BLOCK_M, BLOCK_EXPERTS)
    if expert >= num_experts:
        return
    values_address = tl.load(values_ptr + expert)
    scales_address = tl.load(scales_ptr + expert)
    row_scales_address = tl.load(row_scales_ptr + expert)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = begin + tl.arange(0, BLOCK_M)
    pairs = tl.load(pairs_ptr + m, mask=m < end, other=0)
    x_ptrs = x_ptr + (pairs // NUM_EXPERTS_PER_TOKEN).to(tl.int64)[None, :] * x_row_stride
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Rows of `up` that a block of gates has too many of are masked, not those of the next block's.
    up_rows = tl.where(n < num_outputs, num_outputs + n, 2 * num_outputs)
    gate_rows = tl.where(n < num_outputs, n, 2 * num_outputs)
    for begin_k in tl.range(0, num_inputs, BLOCK_K, num_stages=NUM_STAGES):
        for k in tl.static_range(0, BLOCK_K, STEP):
            x = load_columns(x_ptrs, m < end, begin_k + k, num_inputs, DOT_DTYPE, NUM_BITS, STEP)
            gate = add_product(
                gate,
                x,
                values_address,
                scales_address,
                gate_rows,
                begin_k + k,
                2 * num_outputs,
                num_inputs,
                DTYPE,
                DOT_DTYPE,
                NUM_BITS,
                IS_ALIGNED,
                IS_PTX,
                BLOCK_M <= 32,
                STEP,
            )
            up = add_product(
                up,
                x,
                values_address,
                scales_address,
                up_rows,
                begin_k + k,
                2 * num_outputs,
                num_inputs,
                DTYPE,
                DOT_DTYPE,
                NUM_BITS,
                IS_ALIGNED,
                IS_PTX,
                BLOCK_M <= 32,
                STEP,
            )
    gate = scale_rows(gate, row_scales_address, gate_rows, 2 * num_outputs, NUM_BITS)
    up = scale_rows(up, row_scales_address, up_rows, 2 * num_outputs, NUM_BITS)
    # Rounded where the definition, which is made of other ops, rounds.
    activated = activate(gate.to(DTYPE).to(tl.float32), KIND).to(DTYPE)
    out = activated.to(tl.float32) * up.to(DTYPE).to(tl.float32)
    places = m.to(tl.int64)[None, :] * num_outputs + n[:, None]
    tl.store(out_ptr + places, out.to(DTYPE), mask=(m < end)[None, :] & (n < num_outputs)[:, None])


@triton.jit
def experts_down_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    row_scales_ptr,
    pairs_ptr,
    starts_ptr,
    out_ptr,
    num_experts,
    num_outputs,
    num_inputs,
    k_per_split,
    NUM_SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_PTX: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The sum of out[pairs[i]] over splits = down_e(x[i]) in float32, e the expert of pairs[i].

    Grid: as `experts_up_kernel`, and splits of K.

    Shapes: x [num_pairs, num_inputs], out [num_pairs, NUM_SPLITS, num_outputs], weights [num_outputs, num_inputs]
    """
    expert, begin, end = find_block(starts_ptr, tl.program_id(0), num_experts, BLOCK_M, BLOCK_EXPERTS)
    if expert >= num_experts:
        return
    values_address = tl.load(values_ptr + expert)
    scales_address = tl.load(scales_ptr + expert)
    row_scales_address = tl.load(row_scales_ptr + expert)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = begin + tl.arange(0, BLOCK_M)
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * num_inputs
    out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(2) * k_per_split
    for begin_k in tl.range(first, tl.minimum(first + k_per_split, num_inputs), BLOCK_K, num_stages=NUM_STAGES):
        for k in tl.static_range(0, BLOCK_K, STEP):
            out = add_product(
                out,
                load_columns(x_ptrs, m < end, begin_k + k, num_inputs, DOT_DTYPE, NUM_BITS, STEP),
                values_address,
                scales_address,
                n,
                begin_k + k,
                num_outputs,
                num_inputs,
                DTYPE,
                DOT_DTYPE,
                NUM_BITS,
                IS_ALIGNED,
                IS_PTX,
                BLOCK_M <= 32,
                STEP,
            )
    out = scale_rows(out, row_scales_address, n, num_outputs, NUM_BITS)
    pairs = tl.load(pairs_ptr + m, mask=m < end, other=0)
    places = (pairs.to(tl.int64) * NUM_SPLITS + tl.program_id(2))[None, :] * num_outputs + n[:, None]
    tl.store(out_ptr + places, out, mask=(m < end)[None, :] & (n < num_outputs)[:, None])


@triton.jit
def weighted_sum_kernel(
    x_ptr, weights_ptr, out_ptr, size, NUM_PARTS: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t] = sum over j of weights[t, j] * (sum over s of x[t, j, s]), both ascending.

    Grid: [num_tokens, ceil(size / BLOCK)].

    Shapes: x [num_tokens, NUM_PARTS, NUM_SPLITS, size] float32, weights [num_tokens, NUM_PARTS] float32,
        out [num_tokens, size]
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(NUM_PARTS):
        weight = tl.load(weights_ptr + token * NUM_PARTS + part)
        sums = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(NUM_SPLITS):
            place = (token * NUM_PARTS + part) * NUM_SPLITS + split
            sums += tl.load(x_ptr + place * size + columns, mask=is_inside, other=0.0)
        total += weight * sums
    tl.store(out_ptr + token * size + columns, total.to(out_ptr.dtype.element_ty), mask=is_inside)


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
        "DTYPE": _DTYPES[dtype],
        "DOT_DTYPE": dot_dtype(dtype),
        "NUM_BITS": table.num_bits,
        "IS_ALIGNED": table.is_aligned,
        "IS_PTX": is_ptx(),
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
