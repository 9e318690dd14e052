"""What every layer is given: the ops it computes with and the ranks it shares its work with."""

from dataclasses import dataclass

from headrace.kernels import Kernels
from headrace.parallel import Group


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    kernels: Kernels
    tp_group: Group
