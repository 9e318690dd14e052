"""What every layer is given: the ops it computes with and the ranks it shares its work with."""

from dataclasses import dataclass, field

import torch

from headrace.config import ParallelConfig
from headrace.kernels import Kernels, SoftmaxSpec
from headrace.parallel.group import Group, OneRankGroup


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What a model's layers are built with.

    softmax: for each layer of the model; empty if all are synchronized.
    partial_dtype: of a rank's summand before an all-reduce; None is that of the activations.
    parallel: which of the literal behaviours layers have; the ranks themselves are those of tp_group.
    kv_group: the ranks of tp_group that have this rank's KV head, in its order; with parallel.kv_sharding they split
        its contexts.
    """

    kernels: Kernels
    tp_group: Group
    softmax: tuple[SoftmaxSpec, ...] = ()
    partial_dtype: torch.dtype | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv_group: Group = field(default_factory=lambda: OneRankGroup("kv"))

    def layer_softmax(self, index: int) -> SoftmaxSpec:
        return self.softmax[index] if self.softmax else SoftmaxSpec()
