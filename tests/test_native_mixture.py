"""Native mixtures of experts against their definition: every instruction set and weight format, any routing."""

import pytest
import torch
from torch import Tensor

from headrace.config import Activation, WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels import Experts, MixtureSpec, reference
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.tuning import LinearArm

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)
_native = pytest.importorskip("headrace._native")

each_target = pytest.mark.parametrize("target", cpu.supported_targets())
each_format = pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.value)

HIDDEN_SIZE, INTERMEDIATE_SIZE = 37, 21
SPEC = MixtureSpec(num_experts_per_token=2, renormalize=True, activation=Activation.SILU)


@pytest.fixture(autouse=True, params=[1, 3], ids=lambda n: f"{n}-threads")
def _threads(request):
    before = _native.num_threads()
    _native.set_num_threads(request.param)
    yield
    _native.set_num_threads(before)


def dtype_of(weight_format: WeightFormat) -> torch.dtype:
    return torch.bfloat16 if weight_format is WeightFormat.BFLOAT16 else torch.float32


def make_experts(weight_format: WeightFormat, num_experts: int, make_builder=cpu.make_weight_builder) -> Experts:
    generator = torch.Generator().manual_seed(0)

    def make(rows: int, columns: int):
        builder = make_builder(weight_format, rows, columns)
        builder.write(0, torch.randn(rows, columns, generator=generator) / columns**0.5)
        return builder.build()

    return Experts(
        up=tuple(make(2 * INTERMEDIATE_SIZE, HIDDEN_SIZE) for _ in range(num_experts)),
        down=tuple(make(HIDDEN_SIZE, INTERMEDIATE_SIZE) for _ in range(num_experts)),
    )


def make_mixture(target: str, stream: cpu.Stream | None = None, dataflow: Dataflow | None = None):
    return cpu.Mixture(target, stream or cpu.Stream(), dataflow or Dataflow())


def make_input(num_tokens: int, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype)
    # No two logits of a row are equal, in bfloat16 either.
    logits = [torch.randperm(num_experts, generator=generator) for _ in range(num_tokens)]
    return x, torch.stack(logits).to(dtype) / 8


@each_target
@each_format
@pytest.mark.parametrize("renormalize", [False, True], ids=["raw", "renormalized"])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (4, 2), (60, 8), (5, 5)])
def test_mixture_is_the_sum_of_its_experts(target, weight_format, renormalize, num_experts, k):
    """The definition, on the native products of each expert, which have tests of their own."""
    spec = MixtureSpec(num_experts_per_token=k, renormalize=renormalize, activation=Activation.GELU_TANH)
    experts, dtype = make_experts(weight_format, num_experts), dtype_of(weight_format)
    linear = cpu.Linear(target, cpu.Stream())
    for num_tokens in (1, 2, 33):
        x, logits = make_input(num_tokens, num_experts, dtype)
        out = make_mixture(target)(x, logits, experts, spec)
        expected = reference.mixture(x, logits, experts, spec, linear=linear)
        assert out.dtype == dtype
        # A gate may round to the other neighbour in bfloat16, or in float16 for tiles, which its product with `up` and
        # `down` passes on.
        has_half_tiles = cpu.has_float16_tiles(target) and weight_format in (WeightFormat.INT8, WeightFormat.INT4)
        rounding = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-11 if has_half_tiles else 1e-5
        torch.testing.assert_close(out, expected, rtol=rounding, atol=rounding)


@each_target
def test_mixture_in_float64(target):
    packed = make_experts(WeightFormat.FLOAT32, 6)
    plain = make_experts(WeightFormat.FLOAT32, 6, reference.make_weight_builder)
    x, logits = make_input(9, 6, torch.float32)
    probabilities = logits.double().softmax(-1)
    expected = torch.zeros(9, HIDDEN_SIZE, dtype=torch.float64)
    for token in range(9):
        taken = sorted(range(6), key=lambda e, row=probabilities[token]: -row[e])[:2]
        for e in taken:
            gate, up = (plain.up[e].data.double() @ x[token].double()).chunk(2)
            out = plain.down[e].data.double() @ (torch.nn.functional.silu(gate) * up)
            expected[token] += probabilities[token, e] / probabilities[token, taken].sum() * out
    out = make_mixture(target)(x, logits, packed, SPEC)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def forced(arm: LinearArm) -> Dataflow:
    dataflow = Dataflow()
    dataflow.force(arm)
    return dataflow


@each_target
@each_format
def test_a_row_does_not_depend_on_the_others(target, weight_format):
    """1100 tokens, most of them of one expert, which takes them in three turns; alone, in part and with any arm."""
    experts, dtype = make_experts(weight_format, 4), dtype_of(weight_format)
    x, logits = make_input(1100, 4, dtype)
    logits[:1050, 2] += 10
    mixtures = [make_mixture(target, dataflow=forced(arm)) for arm in LinearArm]
    whole = mixtures[0](x, logits, experts, SPEC)
    for part in (slice(0, 1), slice(700, 703), slice(1000, 1100)):
        assert torch.equal(mixtures[0](x[part], logits[part], experts, SPEC), whole[part])
    for mixture in mixtures:
        assert torch.equal(mixture(x[600:700], logits[600:700], experts, SPEC), whole[600:700])


@each_target
def test_a_recorded_mixture_routes_anew(target):
    stream = cpu.Stream()
    mixture, experts = make_mixture(target, stream), make_experts(WeightFormat.INT4, 8)
    x, logits = make_input(5, 8, torch.float32)
    out, recording = stream.record(lambda: mixture(x, logits, experts, SPEC))
    assert recording.obstacle is None
    for seed in range(3):
        logits.copy_(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)))
        recording.replay()
        assert torch.equal(out, make_mixture(target)(x, logits, experts, SPEC))


@each_target
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_of_logits_harms_no_other(target, bad):
    experts = make_experts(WeightFormat.FLOAT32, 4)
    x, logits = make_input(3, 4, torch.float32)
    expected = make_mixture(target)(x, logits, experts, SPEC)
    logits[1, 2] = bad
    out = make_mixture(target)(x, logits, experts, SPEC)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@each_target
def test_of_equal_experts_the_first_is_taken(target):
    experts = make_experts(WeightFormat.FLOAT32, 5)
    x, _ = make_input(2, 5, torch.float32)
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    clear = torch.tensor([[-9.0, 1.0, 1.0, -9.0, -9.0], [2.0, 2.0, -9.0, -9.0, -9.0]])
    mixture = make_mixture(target)
    torch.testing.assert_close(mixture(x, logits, experts, SPEC), mixture(x, clear, experts, SPEC))


def test_no_tokens_give_none():
    out = make_mixture(cpu.best_target())(
        torch.empty(0, HIDDEN_SIZE), torch.empty(0, 4), make_experts(WeightFormat.FLOAT32, 4), SPEC
    )
    assert out.shape == (0, HIDDEN_SIZE)


def test_mixture_refuses_what_does_not_fit():
    mixture, experts = make_mixture(cpu.best_target()), make_experts(WeightFormat.FLOAT32, 4)
    x, logits = make_input(3, 4, torch.float32)
    with pytest.raises(ShapeError, match=r"router_logits are \[3, 3\]"):
        mixture(x, logits[:, :3], experts, SPEC)
    with pytest.raises(ShapeError, match="columns"):
        mixture(x[:, 1:], logits, experts, SPEC)
    with pytest.raises(KernelError, match="bfloat16"):
        mixture(x.bfloat16(), logits.bfloat16(), experts, SPEC)
    with pytest.raises(KernelError, match="packed"):
        plain = make_experts(WeightFormat.FLOAT32, 4, reference.make_weight_builder)
        mixture(x, logits, plain, SPEC)
    with pytest.raises(ValueError, match="at least one expert, and each at most once"):
        mixture(x, logits, experts, MixtureSpec(num_experts_per_token=5, renormalize=True, activation=Activation.SILU))
