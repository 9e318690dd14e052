"""What every layer is given: the ops it computes with and the ranks it shares its work with."""

from dataclasses import dataclass

from headrace.kernels import Kernels, SoftmaxSpec
from headrace.parallel import Group


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """softmax: for each layer of the model; empty if all are synchronized."""

    kernels: Kernels
    tp_group: Group
    softmax: tuple[SoftmaxSpec, ...] = ()

    def layer_softmax(self, index: int) -> SoftmaxSpec:
        return self.softmax[index] if self.softmax else SoftmaxSpec()
