"""A mixture's launches: tokens times their experts' up and down matrices, and the weighted sum of what experts gave."""

import triton
import triton.language as tl

from headrace.kernels.triton.activation import activate
from headrace.kernels.triton.expert_weights import Matrix, add_product, load_columns, scale_rows


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
    WEIGHT: tl.constexpr,
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
    matrix = Matrix(values_address, scales_address, row_scales_address, 2 * num_outputs, num_inputs)
    for begin_k in tl.range(0, num_inputs, BLOCK_K, num_stages=NUM_STAGES):
        for k in tl.static_range(0, BLOCK_K, STEP):
            x = load_columns(x_ptrs, m < end, begin_k + k, num_inputs, WEIGHT, STEP)
            gate = add_product(gate, x, matrix, gate_rows, begin_k + k, WEIGHT, BLOCK_M <= 32, STEP)
            up = add_product(up, x, matrix, up_rows, begin_k + k, WEIGHT, BLOCK_M <= 32, STEP)
    gate = scale_rows(gate, matrix, gate_rows, WEIGHT)
    up = scale_rows(up, matrix, up_rows, WEIGHT)
    # Rounded where the definition, which is made of other ops, rounds.
    activated = activate(gate.to(WEIGHT.dtype).to(tl.float32), KIND).to(WEIGHT.dtype)
    out = activated.to(tl.float32) * up.to(WEIGHT.dtype).to(tl.float32)
    places = m.to(tl.int64)[None, :] * num_outputs + n[:, None]
    tl.store(out_ptr + places, out.to(WEIGHT.dtype), mask=(m < end)[None, :] & (n < num_outputs)[:, None])


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
    WEIGHT: tl.constexpr,
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
    matrix = Matrix(values_address, scales_address, row_scales_address, num_outputs, num_inputs)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = begin + tl.arange(0, BLOCK_M)
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * num_inputs
    out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(2) * k_per_split
    for begin_k in tl.range(first, tl.minimum(first + k_per_split, num_inputs), BLOCK_K, num_stages=NUM_STAGES):
        for k in tl.static_range(0, BLOCK_K, STEP):
            x = load_columns(x_ptrs, m < end, begin_k + k, num_inputs, WEIGHT, STEP)
            out = add_product(out, x, matrix, n, begin_k + k, WEIGHT, BLOCK_M <= 32, STEP)
    out = scale_rows(out, matrix, n, WEIGHT)
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
