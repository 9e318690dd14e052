"""Native linear and embedding against the reference: every instruction set, weight format and arm, odd shapes first."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import BackendUnavailable, KernelError, ShapeError
from headrace.kernels import DenseWeight, KernelChoice, PackedWeight, QuantizedWeight, reference, resolve_kernels

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)
native_linear = pytest.importorskip("headrace.kernels.cpu.linear")
_native = pytest.importorskip("headrace._native")

TARGETS = cpu.supported_targets()
ARMS = [native_linear.Arm.GEMV, native_linear.Arm.FLAT_GEMM, native_linear.Arm.GEMM]
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 130)
OUTPUTS = (1, 15, 16, 17, 33, 100)
INPUTS = (1, 2, 3, 31, 32, 33, 64, 100, 256, 1000)
FORMATS = (WeightFormat.FLOAT32, WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4)

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
HALF_EPS = 2.0**-11
"""Relative error of float16, where tiles take it."""

each_target = pytest.mark.parametrize("target", TARGETS)
each_format = pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.value)
each_arm = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name.lower())


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Two threads for the kernels, one for torch, whose threads would only be in the way."""
    before = torch.get_num_threads(), _native.num_threads()
    torch.set_num_threads(1)
    _native.set_num_threads(2)
    yield
    _native.set_num_threads(before[1])
    torch.set_num_threads(before[0])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed weight, the reference's of the same values, and the float64 matrix both stand for."""

    packed: PackedWeight
    plain: DenseWeight | QuantizedWeight
    exact: Tensor
    weight_format: WeightFormat

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.plain, QuantizedWeight)

    @property
    def x_dtypes(self) -> list[torch.dtype]:
        if self.weight_format is WeightFormat.FLOAT32:
            return [torch.float32]
        return [torch.bfloat16] if self.weight_format is WeightFormat.BFLOAT16 else [torch.float32, torch.bfloat16]


def dtype_of(weight: PackedWeight) -> torch.dtype:
    """That of a floating-point weight, or float32, which holds the rows of a quantized one exactly enough."""
    return torch.bfloat16 if weight.weight_format is WeightFormat.BFLOAT16 else torch.float32


def embed(ids: Tensor, weight: PackedWeight) -> Tensor:
    return cpu.Embedding(cpu.Stream())(ids, weight, dtype=dtype_of(weight))


@cache
def make_case(weight_format: WeightFormat, rows: int, columns: int) -> Case:
    generator = torch.Generator().manual_seed(rows * 10007 + columns)
    # Magnitudes that differ by row and by column, so that a scale of the wrong group or row shows.
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.logspace(-2, 1, rows)[:, None] * torch.logspace(-1, 1, columns)[None, :]
    packed = cpu.make_weight_builder(weight_format, rows, columns)
    plain = reference.make_weight_builder(weight_format, rows, columns)
    for start in range(0, rows, 7):
        packed.write(start, values[start : start + 7])
        plain.write(start, values[start : start + 7])
    weight = plain.build()
    assert not isinstance(weight, PackedWeight)
    exact = reference.dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.data
    built = packed.build()
    assert isinstance(built, PackedWeight)
    return Case(packed=built, plain=weight, exact=exact.double(), weight_format=weight_format)


def make_x(num_rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * num_rows + columns + seed)
    return torch.randn(num_rows, columns, generator=generator).to(dtype)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    """No NaN, and |actual - expected| <= tolerance everywhere; says where not."""
    error = (actual.double() - expected.double()).abs()
    wrong = ~(error <= tolerance)
    if wrong.any():
        where = [tuple(index) for index in wrong.nonzero()[:5].tolist()]
        shown = [f"{i}: {actual[i].item()} instead of {expected[i].item()}" for i in where]
        raise AssertionError(f"{int(wrong.sum())} of {wrong.numel()} wrong: {'; '.join(shown)}")


def tolerance_of(case: Case, x: Tensor, expected: Tensor) -> Tensor:
    """Rounding of a sum of n terms is at most n eps sum|terms|, twice for two of them; then the output's rounding, and
    that of int8 weights to float16, which has a bit less than they have with their scales."""
    terms = x.double().abs() @ case.exact.abs().T
    num_terms = x.shape[1] + 3
    error = 2 * num_terms * EPS[torch.float32] * terms
    if case.weight_format is WeightFormat.INT8:
        error += HALF_EPS / 2 * terms
    return error + EPS[x.dtype] * expected.double().abs() + 1e-30


def has_half_tiles(target: str, case: Case) -> bool:
    """Whether x becomes float16 instead of int8."""
    return cpu.has_float16_tiles(target) and case.is_quantized


def expected_of(case: Case, x: Tensor, bias: Tensor | None = None, *, halves: bool = False) -> Tensor:
    """In float64 for floating-point weights; the reference's own definition for integer ones."""
    if isinstance(case.plain, QuantizedWeight):
        define = reference.linear_float16_activations if halves else reference.linear_int8_activations
        return define(x.float(), case.plain, None if bias is None else bias.float())
    out = x.double() @ case.exact.T
    return out if bias is None else out + bias.double()


@cache
def make_problem(
    weight_format: WeightFormat, num_outputs: int, num_inputs: int, dtype: torch.dtype, *, halves: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x with the most rows any test takes, the output expected for it, and the tolerance."""
    case = make_case(weight_format, num_outputs, num_inputs)
    x = make_x(max(ROWS), num_inputs, dtype)
    expected = expected_of(case, x, halves=halves)
    return x, expected, tolerance_of(case, x, expected)


def run(target: str, arm: object, x: Tensor, case: Case, bias: Tensor | None = None) -> Tensor:
    return cpu.Linear(target, cpu.Stream())(x, case.packed, bias, arm=arm)


class TestAgainstTheReference:
    @each_target
    @each_format
    @each_arm
    @pytest.mark.parametrize("num_outputs", OUTPUTS)
    def test_all_shapes(self, target: str, weight_format: WeightFormat, arm: object, num_outputs: int) -> None:
        for num_inputs in INPUTS:
            case = make_case(weight_format, num_outputs, num_inputs)
            for dtype in case.x_dtypes:
                halves = has_half_tiles(target, case)
                x, expected, tolerance = make_problem(weight_format, num_outputs, num_inputs, dtype, halves=halves)
                for num_rows in ROWS:
                    actual = run(target, arm, x[:num_rows], case)
                    assert (actual.shape, actual.dtype) == ((num_rows, num_outputs), dtype)
                    assert_within(actual, expected[:num_rows], tolerance[:num_rows])

    @each_target
    @each_format
    @each_arm
    def test_bias(self, target: str, weight_format: WeightFormat, arm: object) -> None:
        case = make_case(weight_format, 33, 100)
        for dtype in case.x_dtypes:
            x, bias = make_x(5, 100, dtype), 100 * make_x(1, 33, dtype)[0]
            expected = expected_of(case, x, bias, halves=has_half_tiles(target, case))
            tolerance = tolerance_of(case, x, expected) + 2 * EPS[torch.float32] * bias.double().abs()
            assert_within(run(target, arm, x, case, bias), expected, tolerance)

    @each_target
    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    def test_quantizing_activations_costs_little(self, target: str, weight_format: WeightFormat) -> None:
        """Against float64 with x as it is: errors of 8 bits, at most half a step of 1 / 64 in a group, average out."""
        case = make_case(weight_format, 100, 1000)
        x = make_x(17, 1000, torch.float32)
        exact = x.double() @ case.exact.T
        for arm in ARMS:
            error = (run(target, arm, x, case).double() - exact).norm() / exact.norm()
            assert error < (0.001 if has_half_tiles(target, case) else 0.01)

    @each_target
    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    def test_a_group_that_stands_out(self, target: str, weight_format: WeightFormat) -> None:
        """Beside it a row's other weights may lose 2^-14 of its scale, at most twice the step of its largest weight."""
        values = 1e-4 * make_x(16, 320, torch.float32)
        values[:, 64:96] *= 1e4
        builder = cpu.make_weight_builder(weight_format, 16, 320)
        builder.write(0, values)
        x = make_x(5, 320, torch.float32)
        x[:, 64:96] = 0
        lost = 2.0**-14
        step = 2 * values.abs().max() / (8 if weight_format is WeightFormat.INT4 else 128)
        rounding = 1e-4 * 4 / (8 if weight_format is WeightFormat.INT4 else 128) + 2.0**-6 * values.abs()
        tolerance = x.abs().double() @ (rounding + lost * step).double().T
        linear = cpu.Linear(target, cpu.Stream())
        for arm in ARMS:
            assert_within(linear(x, builder.build(), arm=arm), x.double() @ values.double().T, tolerance)

    @each_target
    @each_format
    def test_more_work_than_one_thread_takes(self, target: str, weight_format: WeightFormat) -> None:
        case = make_case(weight_format, 300, 512)
        for dtype in case.x_dtypes:
            x = make_x(200, 512, dtype)
            for arm in ARMS:
                expected = expected_of(case, x, halves=has_half_tiles(target, case))
                assert_within(run(target, arm, x, case), expected, tolerance_of(case, x, expected))


class TestARowDependsOnItselfAlone:
    @each_target
    @each_format
    def test_bits_are_equal_for_every_batch_arm_and_thread_count(
        self, target: str, weight_format: WeightFormat
    ) -> None:
        case = make_case(weight_format, 300, 1000)
        for dtype in case.x_dtypes:
            x, bias = make_x(130, 1000, dtype), make_x(1, 300, dtype)[0]
            alone = torch.cat([run(target, ARMS[0], row, case, bias) for row in x.split(1)])
            for arm, num_threads in product(ARMS, (1, 2, 3, 5)):
                _native.set_num_threads(num_threads)
                for num_rows in (1, 2, 3, 8, 9, 17, 33, 64, 65, 130):
                    batch = run(target, arm, x[:num_rows], case, bias)
                    assert torch.equal(batch, alone[:num_rows]), (num_threads, arm, num_rows)

    @each_target
    @each_format
    def test_rows_that_each_thread_prepares_for_itself(self, target: str, weight_format: WeightFormat) -> None:
        """One and two threads have enough panels of these to do so, three have not."""
        case = make_case(weight_format, 1037, 130)
        x = make_x(33, 130, case.x_dtypes[0])
        expected = expected_of(case, x, halves=has_half_tiles(target, case))
        _native.set_num_threads(3)
        shared = run(target, ARMS[1], x, case)
        assert_within(shared, expected, tolerance_of(case, x, expected))
        for arm, num_threads, num_rows in product(ARMS, (1, 2), (1, 2, 16, 17, 31, 32, 33)):
            _native.set_num_threads(num_threads)
            own = run(target, arm, x[:num_rows], case)
            assert torch.equal(own, shared[:num_rows]), (arm, num_threads, num_rows)

    @each_target
    @each_format
    @pytest.mark.parametrize("num_inputs", [4130, 12330, 37010])
    def test_rows_too_long_for_a_cache(self, target: str, weight_format: WeightFormat, num_inputs: int) -> None:
        """They are walked in parts, whose sums wait for the next one, in one block of rows and in several; the longer
        ones already where three tiles are multiplied at once, and the longest where there is a single one."""
        case = make_case(weight_format, 100, num_inputs)
        most_rows = 300 if num_inputs < 10000 else 80
        x = make_x(most_rows, num_inputs, case.x_dtypes[0])
        expected = expected_of(case, x, halves=has_half_tiles(target, case))
        whole = run(target, ARMS[2], x, case)
        assert_within(whole, expected, tolerance_of(case, x, expected))
        sizes = ((0, 2, 40), (1, 1, 49), (1, 9, 300), (2, 9, 33), (2, 1, 257), (2, 2, 1), (2, 2, 48))
        for arm, num_threads, num_rows in sizes:
            _native.set_num_threads(num_threads)
            part = run(target, ARMS[arm], x[:num_rows], case)
            assert torch.equal(part, whole[:num_rows]), (arm, num_threads, num_rows)

    @each_target
    @each_format
    def test_what_lay_in_scratch_memory_does_not_matter(self, target: str, weight_format: WeightFormat) -> None:
        """NaN where steps are filled up with zeros, and in place of the row that one of two tiles has less."""
        _native.set_num_threads(1)
        case = make_case(weight_format, 33, 33)
        x = make_x(17, 33, case.x_dtypes[0])
        expected = expected_of(case, x, halves=has_half_tiles(target, case))
        nan = cpu.make_weight_builder(WeightFormat.BFLOAT16, 48, 63)
        nan.write(0, torch.full((48, 63), torch.nan))
        weight_of_nan = nan.build()
        for arm in ARMS:
            rows_of_nan = torch.full((18, 63), torch.nan, dtype=torch.bfloat16)
            cpu.Linear(target, cpu.Stream())(rows_of_nan, weight_of_nan, arm=arm)
            assert_within(run(target, arm, x, case), expected, tolerance_of(case, x, expected))

    @pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("amx")])
    @pytest.mark.parametrize("weight_format", [WeightFormat.BFLOAT16, WeightFormat.INT4], ids=lambda f: f.value)
    def test_more_panels_than_may_have_sums_that_wait(self, target: str, weight_format: WeightFormat) -> None:
        case = make_case(weight_format, 4150, 2600)
        x = make_x(250, 2600, torch.bfloat16)
        _native.set_num_threads(1)
        batch = run(target, ARMS[2], x, case)
        for row in (0, 131, 249):
            assert torch.equal(batch[row : row + 1], run(target, ARMS[0], x[row : row + 1], case)), row

    @each_target
    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    def test_without_batch_invariance_few_rows_take_bytes_and_many_what_tiles_take(
        self, target: str, weight_format: WeightFormat
    ) -> None:
        case = make_case(weight_format, 100, 1000)
        x = make_x(19, 1000, torch.float32)
        linear = cpu.Linear(target, cpu.Stream(), batch_invariant=False)
        of_few = "amx" if cpu.has_float16_tiles(target) else target
        for arm, definition in zip(ARMS, (of_few, of_few, target), strict=True):
            assert torch.equal(linear(x, case.packed, arm=arm), run(definition, arm, x, case))

    @each_target
    @each_format
    @each_arm
    def test_place_in_the_batch_does_not_matter(self, target: str, weight_format: WeightFormat, arm: object) -> None:
        case = make_case(weight_format, 100, 256)
        x = make_x(19, 256, case.x_dtypes[0])
        order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
        assert torch.equal(run(target, arm, x, case)[order], run(target, arm, x[order], case))

    @pytest.mark.skipif(not {"avx2", "avx512"} <= set(TARGETS), reason="needs AVX2 and AVX-512")
    @pytest.mark.parametrize(
        "weight_format", [f for f in FORMATS if f is not WeightFormat.BFLOAT16], ids=lambda f: f.value
    )
    def test_avx2_and_avx512_round_alike(self, weight_format: WeightFormat) -> None:
        """Not promised, but true by construction: same operations, same order."""
        case = make_case(weight_format, 100, 1000)
        x = make_x(33, 1000, torch.float32)
        assert torch.equal(run("avx2", None, x, case), run("avx512", None, x, case))


class TestInputs:
    @each_target
    @each_format
    @each_arm
    def test_any_alignment(self, target: str, weight_format: WeightFormat, arm: object) -> None:
        case = make_case(weight_format, 33, 100)
        for dtype in case.x_dtypes:
            x, bias = make_x(9, 100, dtype), make_x(1, 33, dtype)[0]
            expected = run(target, arm, x, case, bias)
            for offset in (1, 2, 3, 5):
                shifted = torch.empty(x.numel() + offset, dtype=dtype)[offset:].view_as(x).copy_(x)
                shifted_bias = torch.empty(33 + offset, dtype=dtype)[offset:].copy_(bias)
                assert torch.equal(run(target, arm, shifted, case, shifted_bias), expected)

    @each_target
    @each_format
    def test_strided_rows_and_columns(self, target: str, weight_format: WeightFormat) -> None:
        case = make_case(weight_format, 33, 100)
        for dtype in case.x_dtypes:
            wide = make_x(9, 300, dtype)
            for view in (wide[:, 50:150], wide[:, ::3], wide[::2, :100], wide[:1, :100].expand(9, 100)):
                assert torch.equal(run(target, None, view, case), run(target, None, view.contiguous(), case))
            still = wide[:1, :100].as_strided((1, 100), (0, 1))
            for arm in ARMS:
                assert torch.equal(run(target, arm, still, case), run(target, arm, wide[:1, :100], case))
            transposed = make_x(100, 9, dtype).T
            assert torch.equal(run(target, None, transposed, case), run(target, None, transposed.contiguous(), case))

    @each_target
    @each_format
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_a_number_stays_in_its_row(self, target: str, weight_format: WeightFormat, bad: float) -> None:
        case = make_case(weight_format, 33, 100)
        x = make_x(9, 100, case.x_dtypes[0])
        dirty = x.clone()
        dirty[4, 37] = bad
        expected = (dirty.float() @ case.exact.float().T) if not case.is_quantized else expected_of(case, dirty)
        for arm in ARMS:
            clean, out = run(target, arm, x, case), run(target, arm, dirty, case)
            assert torch.equal(out[4].float(), expected[4].float()) or torch.equal(out[4].isnan(), expected[4].isnan())
            assert not out[4].isfinite().any()
            others = torch.arange(9) != 4
            assert torch.equal(out[others], clean[others])

    @each_target
    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    def test_what_is_too_large_to_quantize_stays_in_its_row(self, target: str, weight_format: WeightFormat) -> None:
        case = make_case(weight_format, 33, 100)
        x = make_x(9, 100, torch.float32)
        large = x.clone()
        large[4, 37] = -(2.0**111)
        for arm in ARMS:
            clean, out = run(target, arm, x, case), run(target, arm, large, case)
            assert out[4].isnan().all()
            assert torch.equal(out[torch.arange(9) != 4], clean[torch.arange(9) != 4])

    @each_target
    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    @each_arm
    def test_extreme_activations(self, target: str, weight_format: WeightFormat, arm: object) -> None:
        """Zeros, subnormals, huge and one lonely value in a group are quantized as the reference does it."""
        case = make_case(weight_format, 33, 100)
        rows = [torch.zeros(100), torch.full((100,), 1e-40), torch.full((100,), 1e30), torch.zeros(100)]
        rows[3][50] = -7.0
        # The ends of the range: the least that is not zero, the most that is a number.
        rows += [torch.full((100,), 2.0**exponent) for exponent in (-121, -120, 110)]
        rows += [torch.full((100,), 2.0**111 * (1 - 2.0**-24)), torch.full((100,), -127.75)]
        x = torch.stack(rows)
        expected = expected_of(case, x, halves=has_half_tiles(target, case))
        assert_within(run(target, arm, x, case), expected, tolerance_of(case, x, expected))

    @each_target
    @each_arm
    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    def test_extreme_integers_do_not_saturate(self, target: str, weight_format: WeightFormat, arm: object) -> None:
        """All weights and activations at the end of their range, both signs; int8 even at -128."""
        low = -128 if weight_format is WeightFormat.INT8 else -8
        scales = torch.ones(16, 2)
        q = torch.full((16, 64), low, dtype=torch.int8)
        q[8:] = 127 if weight_format is WeightFormat.INT8 else 7
        stored = q if weight_format is WeightFormat.INT8 else reference_int4(q)
        builder = cpu.make_weight_builder(weight_format, 16, 64)
        builder.write_quantized(0, stored, scales)
        x = torch.full((2, 64), 127.0)
        x[1] = -127.0
        assert torch.equal(cpu.Linear(target, cpu.Stream())(x, builder.build(), arm=arm), x @ q.float().T)

    @each_format
    def test_no_rows_and_more_dimensions(self, weight_format: WeightFormat) -> None:
        case = make_case(weight_format, 33, 100)
        linear = cpu.Linear(cpu.best_target(), cpu.Stream())
        x = make_x(6, 100, case.x_dtypes[0])
        assert linear(x[:0], case.packed).shape == (0, 33)
        assert torch.equal(linear(x.view(2, 3, 100), case.packed), linear(x, case.packed).view(2, 3, 33))

    @each_format
    @each_target
    def test_output_in_float32_is_that_of_bfloat16_before_it_was_rounded(
        self, target: str, weight_format: WeightFormat
    ) -> None:
        case = make_case(weight_format, 33, 100)
        linear = cpu.Linear(target, cpu.Stream())
        dtype = case.x_dtypes[-1]
        for num_rows in (1, 5):
            x, bias = make_x(num_rows, 100, dtype), torch.randn(33).to(dtype)
            wide = linear(x, case.packed, bias, out_dtype=torch.float32)
            assert wide.dtype == torch.float32
            assert torch.equal(wide.to(dtype), linear(x, case.packed, bias))

    def test_output_rows_are_all_written_and_nothing_else(self) -> None:
        """The kernel writes into the middle of a poisoned buffer."""
        for weight_format in FORMATS:
            case = make_case(weight_format, 33, 100)
            for target in TARGETS:
                for num_rows in (1, 2, 9, 17, 50):
                    x = make_x(num_rows, 100, case.x_dtypes[0])
                    poisoned = torch.full((num_rows + 2, 33), torch.nan, dtype=x.dtype)
                    native = _native.Linear(target, True)
                    dtype = _native.DType.FLOAT32 if x.dtype == torch.float32 else _native.DType.BFLOAT16
                    arm = native_linear.Arm.FLAT_GEMM
                    address = poisoned[1].data_ptr()
                    native.run(
                        _native.Stream(),
                        arm,
                        case.packed.matrix,
                        dtype,
                        num_rows,
                        x.data_ptr(),
                        x.stride(0),
                        0,
                        address,
                        dtype,
                    )
                    assert poisoned[0].isnan().all()
                    assert poisoned[-1].isnan().all()
                    assert torch.equal(poisoned[1:-1], run(target, None, x, case))


def reference_int4(q: Tensor) -> Tensor:
    nibbles = (q + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


class TestPackedWeights:
    @each_format
    @pytest.mark.parametrize("shape", [(1, 1), (15, 31), (16, 32), (17, 33), (100, 100), (33, 257)])
    def test_rows_come_back(self, weight_format: WeightFormat, shape: tuple[int, int]) -> None:
        case = make_case(weight_format, *shape)
        ids = torch.randint(0, shape[0], (7,), generator=torch.Generator().manual_seed(0))
        rows = embed(ids, case.packed)
        expected = reference.embedding(ids, case.plain, dtype=dtype_of(case.packed))
        assert (rows.dtype, rows.shape) == (expected.dtype, expected.shape)
        if case.is_quantized:
            assert_within(rows, expected, HALF_EPS * expected.double().abs())
        else:
            assert torch.equal(rows, expected)

    def test_ids_outside_the_vocabulary(self) -> None:
        packed = make_case(WeightFormat.INT4, 17, 33).packed
        for bad in (-1, 17, 32, 2**40):
            with pytest.raises(IndexError):
                embed(torch.tensor([0, bad]), packed)

    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    def test_stored_rows_and_quantized_rows_are_one_weight(self, weight_format: WeightFormat) -> None:
        case = make_case(weight_format, 33, 100)
        assert isinstance(case.plain, QuantizedWeight)
        builder = cpu.make_weight_builder(weight_format, 33, 100)
        for start in (20, 0):
            stop = 33 if start else 20
            builder.write_quantized(start, case.plain.qweight[start:stop], case.plain.scales[start:stop])
        ids = torch.arange(33)
        assert torch.equal(embed(ids, builder.build()), embed(ids, case.packed))

    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    @pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
    def test_packed_weights_are_the_definitions_to_the_bit(self, weight_format: WeightFormat, magnitude: float) -> None:
        """Scales far apart: by 2^12, nearly as far as bytes reach."""
        values = make_x(16, 128, torch.float32) * magnitude
        values *= torch.logspace(0, -3.3, 128)
        builder = cpu.make_weight_builder(weight_format, 16, 128)
        builder.write(0, values)
        plain = reference.make_weight_builder(weight_format, 16, 128)
        plain.write(0, values)
        expected = reference.embedding(torch.arange(16), plain.build(), dtype=torch.float32)
        assert torch.equal(embed(torch.arange(16), builder.build()), expected)

    @pytest.mark.parametrize("factor", [1e-4, 1e-5, 1e-6, 1e-8, 0.0])
    def test_scales_far_below_the_largest_lose_little_of_the_row(self, factor: float) -> None:
        """Two roundings: to the group's own steps, and to those of the least scale beside the row's largest."""
        values = make_x(16, 128, torch.float32)
        values[:, 32:96] *= factor
        builder = cpu.make_weight_builder(WeightFormat.INT8, 16, 128)
        builder.write(0, values)
        rows = embed(torch.arange(16), builder.build())
        largest = values.abs().amax(dim=1, keepdim=True).double() / 127 * 1.125
        tolerance = (largest * factor + largest * 2.0**-13) / 2 * (1 + 1e-5)
        assert_within(rows[:, 32:96], values[:, 32:96], tolerance.expand(16, 64))

    @pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
    def test_scales_of_another_kind_are_rounded_up_and_their_integers_with_them(
        self, weight_format: WeightFormat
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        low, high = (-128, 128) if weight_format is WeightFormat.INT8 else (-8, 8)
        q = torch.randint(low, high, (16, 160), generator=generator, dtype=torch.int8)
        scales = torch.randn(16, 5, generator=generator) * 10
        scales[:, 3] = 0
        builder = cpu.make_weight_builder(weight_format, 16, 160)
        builder.write_quantized(0, q if weight_format is WeightFormat.INT8 else reference_int4(q), scales)
        steps = scales.double().repeat_interleave(32, dim=1)
        largest = scales.abs().amax(dim=1, keepdim=True)
        tolerance = (steps.abs() * 1.125).maximum(largest * 2.0**-12) / 2
        assert_within(embed(torch.arange(16), builder.build()), q * steps, tolerance)

    def test_the_largest_scale(self) -> None:
        """Bug: those that rounding up brought to 2^127 had an infinite power of two."""
        builder = cpu.make_weight_builder(WeightFormat.INT8, 16, 32)
        scale = 2.0**126 * (1 - 2.0**-24)
        builder.write_quantized(0, torch.ones(16, 32, dtype=torch.int8), torch.full((16, 1), scale))
        assert torch.equal(embed(torch.arange(16), builder.build()), torch.full((16, 32), 2.0**126))

    @each_format
    def test_size(self, weight_format: WeightFormat) -> None:
        bits = {"float32": 32, "bfloat16": 16, "int8": 8.25, "int4": 4.25}[weight_format.value]
        packed = make_case(weight_format, 160, 512).packed
        row_scales = 160 * 4 if weight_format in (WeightFormat.INT8, WeightFormat.INT4) else 0
        assert packed.num_bytes == 160 * 512 * bits / 8 + row_scales
        assert packed.num_bytes == cpu.weight_num_bytes(weight_format, 160, 512)

    def test_memory_is_returned(self) -> None:
        """64 MiB, a hundred times: more than the machine would lend."""
        for _ in range(100):
            builder = cpu.make_weight_builder(WeightFormat.FLOAT32, 4096, 4096)
            builder.write(0, torch.ones(1, 4096))
            del builder
        gc.collect()

    def test_blocks_that_do_not_fit(self) -> None:
        dense = cpu.make_weight_builder(WeightFormat.FLOAT32, 8, 16)
        with pytest.raises(ShapeError, match="16 columns"):
            dense.write(0, torch.zeros(2, 15))
        with pytest.raises(IndexError):
            dense.write(7, torch.zeros(2, 16))
        with pytest.raises(NotImplementedError):
            dense.write_quantized(0, torch.zeros(2, 16), torch.zeros(2, 1))
        quantized = cpu.make_weight_builder(WeightFormat.INT4, 8, 64)
        with pytest.raises(ShapeError, match="2 columns"):
            quantized.write_quantized(0, torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1))
        with pytest.raises(ShapeError, match="2 rows of values, 1 of scales"):
            quantized.write_quantized(0, torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(1, 2))
        for bad in (torch.inf, -torch.inf, torch.nan, 2.0**126):
            with pytest.raises(KernelError, match="NaN, infinite or above"):
                quantized.write_quantized(0, torch.zeros(1, 32, dtype=torch.uint8), torch.full((1, 2), bad))
        with pytest.raises(KernelError, match="NaN or infinity"):
            quantized.write(0, torch.full((1, 64), torch.nan))


class TestContract:
    def test_shapes_and_dtypes_are_checked(self) -> None:
        linear = cpu.Linear(cpu.best_target(), cpu.Stream())
        case = make_case(WeightFormat.FLOAT32, 17, 33)
        with pytest.raises(ShapeError, match="32 columns, the weight takes 33"):
            linear(torch.zeros(2, 32), case.packed)
        with pytest.raises(ShapeError, match="bias"):
            linear(torch.zeros(2, 33), case.packed, torch.zeros(16))
        for dtype in (torch.float16, torch.float64, torch.bfloat16):
            with pytest.raises(KernelError, match="input is"):
                linear(torch.zeros(2, 33, dtype=dtype), case.packed)

    def test_weights_of_another_implementation_are_refused(self) -> None:
        case = make_case(WeightFormat.INT8, 17, 33)
        with pytest.raises(KernelError, match="packed"):
            cpu.Linear(cpu.best_target(), cpu.Stream())(torch.zeros(2, 33), case.plain)
        with pytest.raises(KernelError, match="cannot read a PackedWeight"):
            reference.linear(torch.zeros(2, 33), case.packed)

    def test_instruction_sets_are_forced_by_name_or_refused(self) -> None:
        assert TARGETS[0] == "portable"
        assert cpu.best_target() == TARGETS[-1]
        for target in TARGETS:
            kernels = resolve_kernels(KernelChoice.CPU, instruction_set=target)
            [choice] = [c for c in kernels.explain() if c.op == "linear"]
            assert choice.implementation == "cpu"
            assert f"instruction set {target}" in choice.reason
        with pytest.raises(BackendUnavailable, match=r"'sse9'.*allowed: portable"):
            resolve_kernels(KernelChoice.CPU, instruction_set="sse9")
        with pytest.raises(BackendUnavailable, match="needs the native kernels"):
            resolve_kernels(KernelChoice.REFERENCE, instruction_set="portable")

    def test_an_instruction_set_the_machine_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_native, "supported_targets", lambda: ["portable"])
        monkeypatch.setattr(_native, "compiled_targets", lambda: ["portable", "avx512"])
        with pytest.raises(BackendUnavailable, match="this machine cannot run it; allowed: portable"):
            cpu.Linear("avx512", cpu.Stream())
        with pytest.raises(ValueError, match="'sse9' cannot run here"):
            _native.Linear("sse9", True)

    def test_ops_on_weights_come_as_one_set(self) -> None:
        """Only they read packed weights."""
        kernels = resolve_kernels(KernelChoice.AUTO)
        chosen = {choice.op for choice in kernels.explain() if choice.implementation == "cpu"}
        assert chosen >= {"linear", "embedding", "make_weight_builder", "quantize_rows", "weight_num_bytes"}
        assert {c.implementation for c in resolve_kernels(KernelChoice.REFERENCE).explain()} == {"reference"}

    def test_without_the_native_module(self) -> None:
        """auto goes without and says why; asked for by name it is an error; the reference never looks."""
        code = (
            "import sys; sys.modules['headrace._native'] = None\n"
            "from headrace.kernels import KernelChoice, resolve_kernels\n"
            "print(resolve_kernels(KernelChoice.AUTO).explain()[0])\n"
            "resolve_kernels(KernelChoice.REFERENCE)\n"
            "resolve_kernels(KernelChoice.CPU)\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "implementation='reference', reason='auto: the native module does not load" in result.stdout
        assert "BackendUnavailable: asked for by HEADRACE_KERNELS=cpu" in result.stderr

    def test_reference_does_not_load_it(self) -> None:
        code = (
            "import sys; from headrace.kernels import KernelChoice, resolve_kernels\n"
            "resolve_kernels(KernelChoice.REFERENCE); assert 'headrace._native' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_stub_names_what_the_module_has(self) -> None:
        import ast
        from pathlib import Path

        import headrace

        stub = ast.parse((Path(headrace.__file__).parent / "_native.pyi").read_text())
        names = {n.name for n in stub.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        assert names == {name for name in vars(_native) if not name.startswith("_")}


def _product_in_child(expected: Tensor) -> None:
    case = make_case(WeightFormat.INT4, 300, 512)
    os._exit(0 if torch.equal(run(TARGETS[-1], None, make_x(64, 512, torch.float32), case), expected) else 1)


class TestThreads:
    def test_callers_take_turns(self) -> None:
        case = make_case(WeightFormat.INT4, 300, 512)
        x = make_x(64, 512, torch.float32)
        expected = run(TARGETS[-1], None, x, case)
        wrong: list[int] = []

        def call() -> None:
            for i in range(200):
                if not torch.equal(run(TARGETS[-1], None, x, case), expected):
                    wrong.append(i)

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not wrong

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_gets_workers_of_its_own(self) -> None:
        case = make_case(WeightFormat.INT4, 300, 512)
        expected = run(TARGETS[-1], None, make_x(64, 512, torch.float32), case)
        child = multiprocessing.get_context("fork").Process(target=_product_in_child, args=(expected,))
        child.start()
        child.join(20)
        assert child.exitcode == 0

    def test_sizes_are_checked_and_kept(self) -> None:
        for num_threads in (1, 4, 2):
            cpu.set_num_threads(num_threads)
            assert (_native.num_threads(), torch.get_num_threads()) == (num_threads, 1)
        with pytest.raises(ValueError, match="num_threads is 0"):
            _native.set_num_threads(0)

    def test_idle_workers_sleep(self) -> None:
        """After the spin of some tens of microseconds the process uses no CPU."""
        import time

        _native.set_num_threads(4)
        run(TARGETS[-1], None, make_x(64, 512, torch.float32), make_case(WeightFormat.INT4, 300, 512))
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.03

    def test_process_ends_with_a_pool_alive(self) -> None:
        code = (
            "import torch; from headrace.kernels import cpu; from headrace.config import WeightFormat\n"
            "cpu.set_num_threads(4); b = cpu.make_weight_builder(WeightFormat.FLOAT32, 512, 512)\n"
            "b.write(0, torch.ones(512, 512)); cpu.Linear('portable', cpu.Stream())(torch.ones(4, 512), b.build())\n"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=30)
