"""What sampling asks of rows of logits: each row cut into tiles, one program for each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.errors import ShapeError
from headrace.kernels.triton.order import order_keys
from headrace.kernels.triton.top_k import MAX_SELECTED, select_top_k

_TILE = 4096
_NUM_WARPS = 8


@triton.jit
def tile_argmax_kernel(logits_ptr, keys_ptr, row_stride, vocab_size, num_tiles, TILE: tl.constexpr):
    """Grid: [num_rows, num_tiles]; keys[row, tile] orders by logit, then by smaller id, which it ends with."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    # What lies past the end loses to every id before it, whatever its logit.
    logits = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    tl.store(keys_ptr + row * num_tiles + tile, tl.max(order_keys(logits, ids), axis=0))


@triton.jit
def argmax_kernel(logits_ptr, keys_ptr, ids_ptr, values_ptr, row_stride, num_tiles, BLOCK: tl.constexpr):
    """Grid: [num_rows]; from the tiles' keys to the row's id and logit."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=-(2**63))
    token_id = 0x7FFFFFFF - (tl.max(keys, axis=0) & 0x7FFFFFFF)
    tl.store(ids_ptr + row, token_id)
    tl.store(values_ptr + row, tl.load(logits_ptr + row * row_stride + token_id))


@triton.jit
def finite_or_zero(x):
    return tl.where((x > float("-inf")) & (x < float("inf")), x, 0.0)


@triton.jit
def tile_sum_kernel(logits_ptr, largest_ptr, sums_ptr, row_stride, vocab_size, num_tiles, TILE: tl.constexpr):
    """Grid: [num_rows, num_tiles]; sums = sum(exp(logit - largest)), with a largest of 0 where it is not finite."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf"))
    largest = tl.max(logits, axis=0)
    tl.store(largest_ptr + row * num_tiles + tile, largest)
    tl.store(sums_ptr + row * num_tiles + tile, tl.sum(tl.exp(logits - finite_or_zero(largest)), axis=0))


@triton.jit
def log_sum_exp_kernel(largest_ptr, sums_ptr, out_ptr, num_tiles, BLOCK: tl.constexpr):
    """Grid: [num_rows]; a NaN or an infinity in a tile has made its sum NaN or infinite, and so the row's."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK)
    is_inside = tiles < num_tiles
    largest = tl.load(largest_ptr + row * num_tiles + tiles, mask=is_inside, other=float("-inf"))
    sums = tl.load(sums_ptr + row * num_tiles + tiles, mask=is_inside, other=0.0)
    reference = finite_or_zero(tl.max(largest, axis=0))
    is_finite = (sums > 0.0) & (sums < float("inf"))
    scaled = tl.where(is_finite, sums * tl.exp(finite_or_zero(largest) - reference), sums)
    tl.store(out_ptr + row, reference + tl.log(tl.sum(scaled, axis=0)))


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.argmax`.

    Raises:
        ShapeError: logits are not [num_rows, vocab_size] float32.
    """
    logits = _checked(logits)
    num_rows, num_tiles = len(logits), triton.cdiv(logits.shape[1], _TILE)
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        keys = torch.empty(num_rows, num_tiles, dtype=torch.int64, device=logits.device)
        tile_argmax_kernel[(num_rows, num_tiles)](
            logits, keys, logits.stride(0), logits.shape[1], num_tiles, TILE=_TILE, num_warps=_NUM_WARPS
        )
        block = triton.next_power_of_2(num_tiles)
        argmax_kernel[(num_rows,)](logits, keys, ids, values, logits.stride(0), num_tiles, BLOCK=block, num_warps=1)
    return ids, values


def log_sum_exp(logits: Tensor) -> Tensor:
    """`reference.log_sum_exp`, summed in float32.

    Raises:
        ShapeError: logits are not [num_rows, vocab_size] float32.
    """
    logits = _checked(logits)
    num_rows, num_tiles = len(logits), triton.cdiv(logits.shape[1], _TILE)
    out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        largest = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
        sums = torch.empty_like(largest)
        tile_sum_kernel[(num_rows, num_tiles)](
            logits, largest, sums, logits.stride(0), logits.shape[1], num_tiles, TILE=_TILE, num_warps=_NUM_WARPS
        )
        block = triton.next_power_of_2(num_tiles)
        log_sum_exp_kernel[(num_rows,)](largest, sums, out, num_tiles, BLOCK=block, num_warps=1)
    return out


def top_k(logits: Tensor, k: int) -> Tensor:
    """`reference.top_k`; more than MAX_SELECTED are sorted by torch.

    Raises:
        ShapeError: logits are not [num_rows, vocab_size] float32.
    """
    logits = _checked(logits)
    k = min(k, logits.shape[1])
    if k > MAX_SELECTED:
        return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
    if k == 0 or not len(logits):
        return torch.empty(len(logits), k, dtype=torch.int64, device=logits.device)
    return select_top_k(logits, k)


def _checked(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ShapeError(f"logits are {list(logits.shape)} {logits.dtype}; want [num_rows, vocab_size] float32")
    return logits if logits.stride(1) == 1 else logits.contiguous()
