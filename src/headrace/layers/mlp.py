"""Feed-forward layers: gated or plain, dense or a mixture of experts."""

from collections.abc import Iterator

import torch
from torch import Tensor

from headrace.config import MlpConfig, ModelConfig, MoeConfig
from headrace.layers.context import LayerContext
from headrace.layers.linear import ColumnParallelLinear, RowParallelLinear, even_part
from headrace.layers.parameter import Parameter, whole_matrix
from headrace.parallel.sharding import shard_range


class Mlp:
    """down(act(gate(x)) * up(x)), gate and up in one fused projection; or down(act(up(x))) if not gated."""

    def __init__(
        self, prefix: str, hidden_size: int, config: MlpConfig, context: LayerContext, *, reduces: bool = True
    ) -> None:
        size, group = config.intermediate_size, context.tp_group
        kernels = context.kernels
        self._config = config
        self._activation = kernels.gated_activation if config.gated else kernels.activation
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"] if config.gated else [f"{prefix}.up_proj"]
        self.up = ColumnParallelLinear(
            [even_part(name, size, context) for name in names], hidden_size, context, has_bias=config.bias
        )
        columns = shard_range(size, group.rank, group.world_size)
        self.down = RowParallelLinear(
            f"{prefix}.down_proj", hidden_size, size, context, columns=columns, has_bias=config.bias, reduces=reduces
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

    def __init__(self, prefix: str, config: ModelConfig, moe: MoeConfig, context: LayerContext) -> None:
        self._kernels = context.kernels
        self._group = context.tp_group
        self._moe = moe
        expert = MlpConfig(intermediate_size=moe.intermediate_size, activation=config.mlp.activation)
        self.router = Parameter([whole_matrix(f"{prefix}.gate.weight", moe.num_experts, config.hidden_size)])
        self.experts = [
            Mlp(f"{prefix}.experts.{i}", config.hidden_size, expert, context, reduces=False)
            for i in range(moe.num_experts)
        ]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        router_logits = self._kernels.linear(hidden_states, self.router.weight)
        weights, chosen = self._kernels.route_experts(
            router_logits, self._moe.num_experts_per_token, renormalize=self._moe.renormalize
        )
        out = torch.zeros_like(hidden_states)
        for expert in sorted(set(chosen.flatten().tolist())):
            tokens, choice = (chosen == expert).nonzero(as_tuple=True)
            share = weights[tokens, choice, None].to(out.dtype)
            out.index_add_(0, tokens, self.experts[expert](hidden_states[tokens]) * share)
        self._group.all_reduce_(out)
        return out

    def parameters(self) -> Iterator[Parameter]:
        yield self.router
        for expert in self.experts:
            yield from expert.parameters()


def make_mlp(prefix: str, config: ModelConfig, moe: MoeConfig | None, context: LayerContext) -> Mlp | MoeMlp:
    if moe is not None:
        return MoeMlp(prefix, config, moe, context)
    return Mlp(prefix, config.hidden_size, config.mlp, context)
