"""Feed-forward layers: gated or plain, dense or a mixture of experts."""

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor

from headrace.config import MlpConfig, ModelConfig, MoeConfig
from headrace.costs.sharding import shard_features
from headrace.kernels import Experts, MixtureSpec
from headrace.layers.context import LayerContext
from headrace.layers.linear import ColumnParallelLinear, OutputPart, RowParallelLinear
from headrace.layers.parameter import Parameter, whole_matrix


class Mlp:
    """down(act(gate(x)) * up(x)), gate and up in one fused projection; or down(act(up(x))) if not gated."""

    def __init__(self, prefix: str, hidden_size: int, config: MlpConfig, context: LayerContext, *, site: str) -> None:
        size, group = config.intermediate_size, context.tp_group
        kernels = context.kernels
        self._config = config
        self._activation = kernels.gated_activation if config.gated else kernels.activation
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"] if config.gated else [f"{prefix}.up_proj"]
        columns = shard_features(size, group.rank, group.world_size)
        self.up = ColumnParallelLinear(
            [OutputPart(name=name, size=size, rows=columns) for name in names],
            hidden_size,
            context,
            has_bias=config.bias,
        )
        self.down = RowParallelLinear(
            f"{prefix}.down_proj", hidden_size, size, context, columns=columns, site=site, has_bias=config.bias
        )

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return self.down(self._activation(self.up(hidden_states), self._config.activation))

    def parameters(self) -> Iterator[Parameter]:
        yield from self.up.parameters()
        yield from self.down.parameters()


class MoeMlp:
    """Each token through its `num_experts_per_token` best experts, their outputs summed by router weight.

    One all-reduce a layer, whatever the router chose: ranks must never differ in the collectives they call.
    """

    def __init__(self, prefix: str, config: ModelConfig, moe: MoeConfig, context: LayerContext, *, site: str) -> None:
        self._linear = context.kernels.linear
        self._mixture = context.kernels.mixture
        self._group = context.tp_group
        self._site = site
        self.spec = MixtureSpec(
            num_experts_per_token=moe.num_experts_per_token,
            renormalize=moe.renormalize,
            activation=config.mlp.activation,
        )
        expert = MlpConfig(intermediate_size=moe.intermediate_size, activation=config.mlp.activation)
        self.router = Parameter([whole_matrix(f"{prefix}.gate.weight", moe.num_experts, config.hidden_size)])
        self.experts = [
            Mlp(f"{prefix}.experts.{i}", config.hidden_size, expert, context, site=site) for i in range(moe.num_experts)
        ]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        router_logits = self._linear(hidden_states, self.router.weight)
        out = self._mixture(hidden_states, router_logits, self.weights, self.spec)
        return self._group.all_reduce(out, self._site)

    @cached_property
    def weights(self) -> Experts:
        """Of the experts, once they are loaded."""
        return Experts(
            up=tuple(expert.up.weight.weight for expert in self.experts),
            down=tuple(expert.down.weight.weight for expert in self.experts),
        )

    def parameters(self) -> Iterator[Parameter]:
        yield self.router
        yield from self.expert_parameters()

    def expert_parameters(self) -> Iterator[Parameter]:
        for expert in self.experts:
            yield from expert.parameters()


def make_mlp(
    prefix: str, config: ModelConfig, moe: MoeConfig | None, context: LayerContext, *, site: str
) -> Mlp | MoeMlp:
    if moe is not None:
        return MoeMlp(prefix, config, moe, context, site=site)
    return Mlp(prefix, config.hidden_size, config.mlp, context, site=site)
