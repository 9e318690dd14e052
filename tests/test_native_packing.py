"""Native quantizing and packing against the reference, to the bit: instruction sets, odd shapes, hostile values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels import KernelChoice, reference, resolve_kernels

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)
_native = pytest.importorskip("headrace._native")

TARGETS = cpu.supported_targets()
INTEGERS = (WeightFormat.INT8, WeightFormat.INT4)
FORMATS = (WeightFormat.FLOAT32, WeightFormat.BFLOAT16, *INTEGERS)
ROWS = (1, 2, 15, 16, 17, 33, 131)
COLUMNS = (1, 2, 31, 32, 33, 64, 101, 1000)

each_target = pytest.mark.parametrize("target", TARGETS)
each_integer = pytest.mark.parametrize("weight_format", INTEGERS, ids=lambda f: f.value)
each_format = pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.value)


@pytest.fixture(autouse=True, params=[1, 3], ids=["one_thread", "three_threads"])
def _threads(request: pytest.FixtureRequest):
    before = _native.num_threads()
    _native.set_num_threads(request.param)
    yield
    _native.set_num_threads(before)


def make_rows(num_rows: int, num_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows * 1009 + num_columns)
    rows = torch.randn(num_rows, num_columns, generator=generator) * torch.logspace(-3, 3, num_rows)[:, None]
    return rows.to(dtype)


def assert_same_bits(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))


class TestQuantizeRows:
    @each_target
    @each_integer
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_all_shapes(self, target: str, weight_format: WeightFormat, dtype: torch.dtype) -> None:
        for num_rows in ROWS:
            for num_columns in COLUMNS:
                rows = make_rows(num_rows, num_columns, dtype)
                actual = cpu.quantize_rows(rows, weight_format, target=target)
                assert_same_bits(actual, reference.quantize_rows(rows, weight_format))

    @each_target
    @each_integer
    def test_ties_of_magnitude_go_to_the_first(self, target: str, weight_format: WeightFormat) -> None:
        """Which of 3 and -3 is the extreme one decides the sign of an int4 scale."""
        rows = torch.zeros(64, 40)
        for i in range(64):
            rows[i, i % 32], rows[i, (7 * i + 3) % 32] = 3.0, -3.0
        actual = cpu.quantize_rows(rows, weight_format, target=target)
        assert_same_bits(actual, reference.quantize_rows(rows, weight_format))

    @each_target
    @each_integer
    @given(
        values=arrays(
            "float32",
            (3, 37),
            elements=st.one_of(
                st.floats(width=32, allow_nan=False, allow_infinity=False),
                st.sampled_from([0.0, -0.0, 0.5, 1.5, -2.5, 1e-45, -1.2e-38, 3.4e38, 127.0, -128.0, 8.0, -8.0]),
            ),
        )
    )
    @settings(deadline=None, max_examples=60)
    def test_any_values(self, target: str, weight_format: WeightFormat, values) -> None:
        rows = torch.from_numpy(values)
        actual = cpu.quantize_rows(rows, weight_format, target=target)
        assert_same_bits(actual, reference.quantize_rows(rows, weight_format))

    @each_target
    @each_integer
    def test_rows_and_columns_apart(self, target: str, weight_format: WeightFormat) -> None:
        wide = make_rows(34, 300)
        for view in (wide[:, 7:108], wide[::2, :101], wide[:, ::3], wide.T, wide[:1, :64].expand(5, 64)):
            actual = cpu.quantize_rows(view, weight_format, target=target)
            assert_same_bits(actual, reference.quantize_rows(view.contiguous(), weight_format))

    @each_target
    @each_integer
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("place", [(0, 0), (16, 31), (130, 100)])
    def test_what_is_not_finite(
        self, target: str, weight_format: WeightFormat, bad: float, place: tuple[int, int]
    ) -> None:
        rows = make_rows(131, 101)
        rows[place] = bad
        with pytest.raises(KernelError, match="NaN or infinity"):
            cpu.quantize_rows(rows, weight_format, target=target)
        with pytest.raises(KernelError, match="NaN or infinity"):
            cpu.make_weight_builder(weight_format, 131, 101, target=target).write(0, rows)

    @each_integer
    def test_no_rows(self, weight_format: WeightFormat) -> None:
        one = reference.quantize_rows(torch.ones(1, 40), weight_format)
        assert_same_bits(cpu.quantize_rows(torch.zeros(0, 40), weight_format), (one[0][:0], one[1][:0]))

    def test_the_dispatch_hands_it_out(self) -> None:
        rows = make_rows(5, 40)
        for target in TARGETS:
            kernels = resolve_kernels(KernelChoice.CPU, instruction_set=target)
            assert_same_bits(
                kernels.quantize_rows(rows, WeightFormat.INT4), reference.quantize_rows(rows, WeightFormat.INT4)
            )


def stored_rows(builder, num_rows: int) -> Tensor:
    return cpu.Embedding(cpu.Stream())(torch.arange(num_rows), builder.build(), dtype=torch.float32)


class TestWriting:
    @each_target
    @each_format
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_any_dtype_in_blocks_of_any_size(
        self, target: str, weight_format: WeightFormat, dtype: torch.dtype
    ) -> None:
        """Blocks that begin and end inside a panel, written last to first, against one whole block of float32."""
        for num_rows, num_columns in ((1, 1), (17, 33), (100, 101), (131, 257)):
            rows = make_rows(num_rows, num_columns, dtype)
            whole = cpu.make_weight_builder(weight_format, num_rows, num_columns, target="portable")
            whole.write(0, rows.float())
            parts = cpu.make_weight_builder(weight_format, num_rows, num_columns, target=target)
            for start in reversed(range(0, num_rows, 7)):
                parts.write(start, rows[start : start + 7])
            assert torch.equal(stored_rows(parts, num_rows), stored_rows(whole, num_rows))

    @each_target
    @pytest.mark.parametrize("weight_format", FORMATS[:2], ids=lambda f: f.value)
    def test_floating_point_is_rounded_once(self, target: str, weight_format: WeightFormat) -> None:
        rows = make_rows(33, 101)
        rows[3, 5], rows[4, 6] = float("inf"), 1e-40
        builder = cpu.make_weight_builder(weight_format, 33, 101, target=target)
        builder.write(0, rows)
        expected = rows if weight_format is WeightFormat.FLOAT32 else rows.bfloat16()
        assert torch.equal(stored_rows(builder, 33), expected.float())

    @each_integer
    def test_quantizing_first_changes_nothing(self, weight_format: WeightFormat) -> None:
        rows = make_rows(131, 101)
        at_once = cpu.make_weight_builder(weight_format, 131, 101)
        at_once.write(0, rows)
        in_two_steps = cpu.make_weight_builder(weight_format, 131, 101)
        in_two_steps.write_quantized(0, *reference.quantize_rows(rows, weight_format))
        assert torch.equal(stored_rows(at_once, 131), stored_rows(in_two_steps, 131))

    @each_format
    def test_rows_that_were_not_written_stay_zero(self, weight_format: WeightFormat) -> None:
        builder = cpu.make_weight_builder(weight_format, 50, 40)
        builder.write(20, make_rows(5, 40))
        rows = stored_rows(builder, 50)
        assert rows[20:25].abs().sum() > 0
        if weight_format in FORMATS[:2]:
            assert not rows[:20].any()
            assert not rows[25:].any()

    @each_format
    def test_rows_outside_the_matrix(self, weight_format: WeightFormat) -> None:
        builder = cpu.make_weight_builder(weight_format, 8, 16)
        for row, count in ((7, 2), (8, 1), (-1, 1), (0, 9)):
            with pytest.raises(IndexError):
                builder.write(row, torch.zeros(count, 16))
        with pytest.raises(ShapeError):
            builder.write(0, torch.zeros(2, 15))
        builder.write(8, torch.zeros(0, 16))
