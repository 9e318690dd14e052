"""The sums that ranks make, on every instruction set, bit by bit."""

import pytest
import torch

pytest.importorskip("headrace._native", reason="the native module is not built", exc_type=ImportError)

from rank_cases import NATIVE_DTYPES, assert_same_bits, brought, rank_order_sum, through_int8

from headrace import _native

each_target = pytest.mark.parametrize("target", _native.supported_targets())
each_dtype = pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)


def pointers(parts):
    return [part.data_ptr() for part in parts]


@each_target
@each_dtype
@pytest.mark.parametrize("out_dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_sum(target, dtype, out_dtype, num_ranks):
    native = _native.target_from_name(target)
    for size in (0, 1, 15, 16, 17, 1023, 1024, 1025, 4099):
        # Begins anywhere, ends before memory that must stay.
        parts = [brought(rank, [size + 1], dtype)[1:] for rank in range(num_ranks)]
        out = torch.full([size + 1], 7.0, dtype=out_dtype)
        _native.sum_in_rank_order(
            native, pointers(parts), NATIVE_DTYPES[dtype], size, out.data_ptr(), NATIVE_DTYPES[out_dtype]
        )
        assert_same_bits(out[:size], rank_order_sum(parts, out_dtype))
        assert out[size] == 7.0


@each_target
@pytest.mark.parametrize("out_dtype", NATIVE_DTYPES, ids=str)
def test_sum_in_place_may_narrow(target, out_dtype):
    parts = [brought(rank, [5000], torch.float32) for rank in range(3)]
    expected = rank_order_sum(parts, out_dtype)
    native = _native.target_from_name(target)
    _native.sum_in_rank_order(
        native, pointers(parts), _native.DType.FLOAT32, 5000, parts[1].data_ptr(), NATIVE_DTYPES[out_dtype]
    )
    assert_same_bits(parts[1].view(out_dtype)[:5000], expected)


@each_target
def test_sum_keeps_what_is_special(target):
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3.4e38, 1 + 2**-9])
    out = torch.empty(8, dtype=torch.bfloat16)
    native = _native.target_from_name(target)
    _native.sum_in_rank_order(
        native, pointers([values]), _native.DType.FLOAT32, 8, out.data_ptr(), _native.DType.BFLOAT16
    )
    expected = values.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(out.view(torch.int16)[finite], expected.view(torch.int16)[finite])


@each_target
@each_dtype
@pytest.mark.parametrize(("num_rows", "row_size"), [(0, 5), (3, 0), (1, 1), (5, 63), (5, 64), (5, 65), (7, 1000)])
def test_sum_of_quantized(target, dtype, num_rows, row_size):
    parts = [brought(rank, [num_rows, row_size], dtype) for rank in range(3)]
    if parts[0].numel() > 1:
        parts[0][0] = 0.0
        parts[1][0] = 1e-40  # too small for a scale
    out = torch.full([num_rows, row_size], torch.nan)
    _native.sum_quantized_in_rank_order(
        _native.target_from_name(target), pointers(parts), NATIVE_DTYPES[dtype], num_rows, row_size, out.data_ptr()
    )
    if parts[0].numel() > 1:
        parts[1][0] = 0.0
    expected = rank_order_sum([through_int8(part.float()) for part in parts], torch.float32)
    assert_same_bits(out, expected)
