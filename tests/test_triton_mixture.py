"""Triton's mixtures of experts against float64 and the definition: dense and quantized weights, any routing."""

import pytest
import torch
from torch import Tensor

from headrace.config import Activation, WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels import DenseWeight, Experts, MixtureSpec, reference

pytest.importorskip("triton", reason="Triton is not installed")

from triton_device import DEVICE, DTYPES

from headrace.kernels.dataflow import Dataflow
from headrace.kernels.mixture_tuning import ExpertLaunch, ExpertMatrix
from headrace.kernels.triton import make_ops, mixture, routing
from headrace.kernels.triton.dataflow import TritonMachine
from headrace.kernels.triton.expert_tiles import block_rows
from headrace.kernels.triton.mixture import Mixture
from headrace.kernels.triton.weights import as_quantized, make_weight_builder
from headrace.kernels.tuning import Tiles

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HIDDEN_SIZE, INTERMEDIATE_SIZE = 70, 37
SPEC = MixtureSpec(num_experts_per_token=2, renormalize=True, activation=Activation.SILU)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_mixture() -> Mixture:
    return Mixture(Dataflow(TritonMachine(DEVICE)))


def make_experts(num_experts: int, weight_format: WeightFormat | torch.dtype, sizes=(HIDDEN_SIZE, INTERMEDIATE_SIZE)):
    generator = torch.Generator().manual_seed(0)
    hidden_size, intermediate_size = sizes

    def make(rows: int, columns: int):
        values = torch.randn(rows, columns, generator=generator) / columns**0.5
        if isinstance(weight_format, torch.dtype):
            return DenseWeight(data=values.to(DEVICE, weight_format))
        builder = make_weight_builder(weight_format, rows, columns, device=DEVICE)
        builder.write(0, values)
        return builder.build()

    return Experts(
        up=tuple(make(2 * intermediate_size, hidden_size) for _ in range(num_experts)),
        down=tuple(make(hidden_size, intermediate_size) for _ in range(num_experts)),
    )


def make_input(num_tokens: int, num_experts: int, dtype: torch.dtype, size: int = HIDDEN_SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, size, generator=generator)
    # No two logits of a row are equal.
    logits = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(num_tokens)])
    return x.to(DEVICE, dtype), (logits / 8).to(DEVICE, dtype)


def assert_is_definition(x: Tensor, logits: Tensor, experts: Experts, spec: MixtureSpec) -> None:
    out = make_mixture()(x, logits, experts, spec)
    assert out.dtype == x.dtype
    rounding = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[x.dtype]
    wanted = reference.mixture(x, logits, as_reference(experts), spec)
    torch.testing.assert_close(out, wanted, rtol=rounding, atol=rounding)


def as_reference(experts: Experts) -> Experts:
    """The same weights as the definition reads them."""
    up, down = (
        tuple(weight if isinstance(weight, DenseWeight) else as_quantized(weight) for weight in weights)
        for weights in (experts.up, experts.down)
    )
    return Experts(up=up, down=down)


@pytest.mark.parametrize("renormalize", [False, True], ids=["raw", "renormalized"])
@pytest.mark.parametrize(("num_experts", "k", "num_tokens"), [(1, 1, 1), (5, 5, 3), (9, 3, 21)])
def test_mixture_in_float64(num_experts, k, num_tokens, renormalize):
    experts = make_experts(num_experts, torch.float32)
    x, logits = make_input(num_tokens, num_experts, torch.float32)
    probabilities = logits.double().softmax(-1)
    expected = torch.zeros(num_tokens, HIDDEN_SIZE, dtype=torch.float64, device=DEVICE)
    for token in range(num_tokens):
        taken = probabilities[token].argsort(descending=True)[:k].tolist()
        scale = probabilities[token, taken].sum() if renormalize else 1.0
        for e in taken:
            gate, up = (experts.up[e].data.double() @ x[token].double()).chunk(2)
            out = experts.down[e].data.double() @ (torch.nn.functional.silu(gate) * up)
            expected[token] += probabilities[token, e] / scale * out
    spec = MixtureSpec(num_experts_per_token=k, renormalize=renormalize, activation=Activation.SILU)
    out = make_mixture()(x, logits, experts, spec)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("num_tokens", [1, 40, 160], ids=lambda n: f"{n}-tokens")
def test_each_kind_of_tiles(dtype, num_tokens):
    """All but a few tokens go to two experts of four, so that blocks are full, not full and empty."""
    x, logits = make_input(num_tokens, 4, dtype)
    logits[5:, 1:3] += 1
    assert_is_definition(x, logits, make_experts(4, dtype), SPEC)


def test_blocks_grow_with_the_tokens_of_an_expert():
    assert [block_rows(pairs, 4) for pairs in (2, 32, 33, 128, 129, 512, 513)] == [16, 16, 32, 32, 64, 64, 128]


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
@pytest.mark.parametrize("sizes", [(HIDDEN_SIZE, INTERMEDIATE_SIZE), (64, 96)], ids=["odd", "aligned"])
@each_dtype
def test_quantized_experts(dtype, sizes, weight_format):
    x, logits = make_input(6, 4, dtype, sizes[0])
    spec = MixtureSpec(num_experts_per_token=2, renormalize=True, activation=Activation.GELU_TANH)
    assert_is_definition(x, logits, make_experts(4, weight_format, sizes), spec)


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
def test_quantized_experts_of_many_tokens(weight_format):
    """With more than 32 rows integers are scaled, not sums."""
    x, logits = make_input(40, 1, torch.float32)
    assert block_rows(40, 1) > 32
    spec = MixtureSpec(num_experts_per_token=1, renormalize=True, activation=Activation.SILU)
    assert_is_definition(x, logits, make_experts(1, weight_format), spec)


@pytest.mark.parametrize("weight_format", [torch.float32, WeightFormat.INT4], ids=str)
def test_splits_of_the_downs_are_added_up(weight_format):
    """Of 4 splits of 150 columns in steps of 64, one has less and one nothing to add."""
    dataflow, sizes = Dataflow(TritonMachine(DEVICE)), (40, 150)
    experts = make_experts(4, weight_format, sizes)
    x, logits = make_input(3, 4, torch.float32, sizes[0])
    wanted = reference.mixture(x, logits, as_reference(experts), SPEC)
    launch = ExpertLaunch(matrix=ExpertMatrix.DOWN, block_rows=16)
    with dataflow.trying_expert_tiles(launch, Tiles(block_n=32, block_k=64, num_splits=4)):
        torch.testing.assert_close(Mixture(dataflow)(x, logits, experts, SPEC), wanted, rtol=1e-5, atol=1e-5)


def test_aligned_rows_and_unaligned_addresses():
    """16-byte loads are for matrices that all begin at a multiple of 16 bytes."""
    experts = make_experts(3, torch.float16, (64, 32))
    x, logits = make_input(4, 3, torch.float16, 64)
    moved = torch.empty(64 * 32 + 1, dtype=torch.float16, device=DEVICE)[1:].view(64, 32)
    moved.copy_(experts.down[1].data)
    down = (experts.down[0], DenseWeight(data=moved), experts.down[2])
    assert_is_definition(x, logits, Experts(up=experts.up, down=down), SPEC)
    assert_is_definition(x, logits, experts, SPEC)


def test_tokens_in_several_turns(monkeypatch):
    x, logits = make_input(7, 4, torch.float32)
    experts = make_experts(4, torch.float32)
    whole = make_mixture()(x, logits, experts, SPEC)
    monkeypatch.setattr(mixture, "_MAX_SCRATCH_BYTES", 3 * 2 * HIDDEN_SIZE * 4)
    assert torch.equal(make_mixture()(x, logits, experts, SPEC), whole)


def test_groups_are_sorted_by_expert_and_token(monkeypatch):
    monkeypatch.setattr(routing, "_BLOCK_PAIRS", 8)
    _, logits = make_input(13, 6, torch.float32)
    logits[:, 4] = -9  # of which nobody comes
    weights, pairs, starts = routing.route(logits, 3, renormalize=False)
    probabilities = logits.softmax(-1)
    taken = probabilities.topk(3).indices.sort(-1).values
    torch.testing.assert_close(weights, probabilities.gather(1, taken))
    assert pairs.tolist() == taken.flatten().argsort(stable=True).tolist()
    assert starts.tolist() == [0, *taken.flatten().bincount(minlength=6).cumsum(0).tolist()]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_of_logits_harms_no_other(bad):
    experts = make_experts(4, torch.float32)
    x, logits = make_input(3, 4, torch.float32)
    expected = make_mixture()(x, logits, experts, SPEC)
    logits[1, 2] = bad
    out = make_mixture()(x, logits, experts, SPEC)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


def test_of_equal_experts_the_first_is_taken():
    experts = make_experts(5, torch.float32)
    x, _ = make_input(2, 5, torch.float32)
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    clear = torch.tensor([[-9.0, 1.0, 1.0, -9.0, -9.0], [2.0, 2.0, -9.0, -9.0, -9.0]], device=DEVICE)
    torch.testing.assert_close(make_mixture()(x, logits, experts, SPEC), make_mixture()(x, clear, experts, SPEC))


def test_no_tokens_give_none():
    x, logits = torch.empty(0, HIDDEN_SIZE, device=DEVICE), torch.empty(0, 4, device=DEVICE)
    assert make_ops(DEVICE)["mixture"](x, logits, make_experts(4, torch.float32), SPEC).shape == (0, HIDDEN_SIZE)


def test_mixture_refuses_what_does_not_fit():
    experts = make_experts(4, torch.float32)
    x, logits = make_input(3, 4, torch.float32)
    with pytest.raises(ShapeError, match=r"router_logits are \[3, 3\]"):
        make_mixture()(x, logits[:, :3], experts, SPEC)
    with pytest.raises(ShapeError, match="columns"):
        make_mixture()(x[:, 1:], logits, experts, SPEC)
    with pytest.raises(KernelError, match="float16"):
        make_mixture()(x.half(), logits.half(), experts, SPEC)
    with pytest.raises(ShapeError, match="5 of 4 experts"):
        make_mixture()(
            x, logits, experts, MixtureSpec(num_experts_per_token=5, renormalize=True, activation=SPEC.activation)
        )
    with pytest.raises(KernelError, match="alike"):
        mixed = Experts(up=(*experts.up[:3], make_experts(1, WeightFormat.INT8).up[0]), down=experts.down)
        make_mixture()(x, logits, mixed, SPEC)
