"""Where one pipeline stage ends and the next begins."""

import torch
from torch import Tensor

from headrace.config import NormPlacement, ParallelConfig
from headrace.costs.sites import Site
from headrace.kernels import Kernels
from headrace.models.decoder import ResidualStream
from headrace.parallel.group import Group


class Boundary:
    """Hands the residual stream of a batch from stage to stage, each rank to its counterpart.

    Sent is hidden_states + update, one tensor of [num_tokens, hidden_size] in the activations' dtype. Literal variants:
    both apart (`send_residual`; the first layer of a stage then adds them, as the layer before would have), and of each
    tensor the 1 / t that a rank's place in its stage says, gathered by the receiving stage (`slice_boundary`).

    max_num_tokens: of a batch. What is received lies where the batch before lay, so that recorded steps find it.
    """

    def __init__(
        self,
        config: ParallelConfig,
        kernels: Kernels,
        tp_group: Group,
        pp_group: Group,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        max_num_tokens: int,
        placement: NormPlacement,
    ) -> None:
        self._kernels, self._tp_group, self._pp_group = kernels, tp_group, pp_group
        self._sends_residual = config.send_residual
        # Where a sublayer ends with its normalized sum, nothing is left to add, and zeros are sent for it.
        self._keeps_update = config.send_residual and placement is not NormPlacement.POST
        self._is_sliced = config.slice_boundary and tp_group.world_size > 1 and hidden_size % tp_group.world_size == 0
        num_tensors = 2 if self._sends_residual else 1
        has_input = pp_group.rank > 0
        size = hidden_size // tp_group.world_size if self._is_sliced else hidden_size
        shape = (num_tensors if has_input else 0, max_num_tokens * size)
        self._received = torch.empty(shape, dtype=dtype, device=kernels.device)
        self._hidden_size = hidden_size

    def receive(self, num_tokens: int) -> ResidualStream:
        """What the stage before has sent for a batch; not for the first stage."""
        tensors = [self._receive_one(buffer, num_tokens) for buffer in self._received]
        return ResidualStream(hidden_states=tensors[0], update=tensors[1] if self._keeps_update else None)

    def send(self, stream: ResidualStream) -> None:
        """Hand the stream to the next stage; not for the last one."""
        if not self._sends_residual:
            self._send_one(stream.total(self._kernels))
            return
        update = stream.update
        self._send_one(stream.hidden_states)
        # A normalization after the sum leaves nothing to add.
        self._send_one(torch.zeros_like(stream.hidden_states) if update is None else update)

    def _send_one(self, tensor: Tensor) -> None:
        stage = self._pp_group.rank
        if self._is_sliced:
            tensor = tensor.flatten().chunk(self._tp_group.world_size)[self._tp_group.rank]
        self._pp_group.send(tensor, stage + 1, Site.boundary(stage))

    def _receive_one(self, buffer: Tensor, num_tokens: int) -> Tensor:
        stage = self._pp_group.rank
        size = num_tokens * self._hidden_size
        if not self._is_sliced:
            tensor = buffer[:size]
            self._pp_group.recv_(tensor, stage - 1, Site.boundary(stage - 1))
            return tensor.view(num_tokens, self._hidden_size)
        part = buffer[: size // self._tp_group.world_size]
        self._pp_group.recv_(part, stage - 1, Site.boundary(stage - 1))
        parts = self._tp_group.all_gather(part, Site.boundary(stage - 1))
        return torch.cat(parts).view(num_tokens, self._hidden_size)
