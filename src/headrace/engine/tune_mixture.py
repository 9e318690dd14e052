"""Measures the mixtures of experts of a loaded model, on a GPU, whose launches can be cut up in several ways."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import islice, product

import torch
from torch import Tensor

from headrace.engine.tune import measuring_progress
from headrace.kernels import Experts, Kernels, MixtureSpec
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.mixture_tuning import ExpertLaunch, ExpertMatrix, MixtureShape, TunedMixture
from headrace.kernels.timing import best_of_rounds, timer_of
from headrace.kernels.tuning import Tiles
from headrace.models.decoder import Decoder

_MAX_LAYERS = 4
"""Whose experts are measured in turn: far more than a cache holds, or a small model."""

PAIRS_PER_EXPERT = {16: 2, 32: 16, 64: 64, 128: 512}
"""Where tiles for a number of rows are compared: within the range that this number is for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelMixtures:
    """The mixtures of a model's layers that are of one shape, which in all known models is all.

    dtype: of what they take.
    """

    experts: Sequence[Experts]
    spec: MixtureSpec
    dtype: torch.dtype

    @classmethod
    def of(cls, decoder: Decoder, dtype: torch.dtype) -> "ModelMixtures | None":
        """None without experts."""
        layers = list(decoder.mixtures())
        if not layers:
            return None
        alike = [layer.weights for layer in layers if _sizes(layer.weights) == _sizes(layers[0].weights)]
        return cls(experts=alike, spec=layers[0].spec, dtype=dtype)

    @property
    def shape(self) -> MixtureShape:
        return self.experts[0].mixture_shape(self.dtype)


def _sizes(experts: Experts) -> tuple[int, tuple[int, int]]:
    return len(experts.up), experts.up[0].shape


def measure_mixture(
    kernels: Kernels, mixtures: ModelMixtures, *, num_rounds: int, show_progress: bool = False
) -> TunedMixture:
    """Time the whole mixture with each of the tiles that one of its launches may take."""
    dataflow = kernels.dataflow
    assert dataflow is not None, "there is nothing to choose"
    launches = [
        ExpertLaunch(matrix=matrix, block_rows=rows)
        for rows, matrix in product(dataflow.expert_block_rows, ExpertMatrix)
    ]
    times = {}
    with measuring_progress("measuring mixtures of experts (Ctrl-C ends it)", len(launches), show_progress) as start:
        for launch in launches:
            start(str(launch))
            times[launch] = best_of_rounds(_timers(kernels, dataflow, mixtures, launch), num_rounds)
    return TunedMixture(measured_on=date.today().isoformat(), times=times)


def _timers(
    kernels: Kernels, dataflow: Dataflow, mixtures: ModelMixtures, launch: ExpertLaunch
) -> dict[Tiles, Callable[[], float]]:
    calls = _calls(kernels, mixtures, PAIRS_PER_EXPERT[launch.block_rows])
    return {
        tiles: timer_of([partial(_run, dataflow, launch, tiles, call) for call in calls], device=kernels.device)
        for tiles in dataflow.expert_tile_choices(mixtures.shape, launch)
        if dataflow.can_run(partial(_run, dataflow, launch, tiles, calls[0]))
    }


def _run(dataflow: Dataflow, launch: ExpertLaunch, tiles: Tiles, call: Callable[[], object]) -> None:
    with dataflow.trying_expert_tiles(launch, tiles):
        call()


def _calls(kernels: Kernels, mixtures: ModelMixtures, pairs_per_expert: int) -> list[Callable[[], Tensor]]:
    """One for each of a few layers, of as many tokens as give each expert that many pairs, on average."""
    shape, spec = mixtures.shape, mixtures.spec
    num_tokens = max(1, pairs_per_expert * shape.num_experts // spec.num_experts_per_token)
    x, logits = (
        torch.randn(num_tokens, size).to(kernels.device, mixtures.dtype)
        for size in (shape.hidden_size, shape.num_experts)
    )
    return [partial(kernels.mixture, x, logits, experts, spec) for experts in islice(mixtures.experts, _MAX_LAYERS)]
