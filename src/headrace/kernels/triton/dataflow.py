"""A GPU as the dataflow sees it: tiles to choose among, and times taken on the device."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from hashlib import sha256
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from headrace.kernels.capturing import capturing
from headrace.kernels.linear_machine import CpuMachine, Rotation, Stopwatch
from headrace.kernels.mixture_tuning import ExpertLaunch, MixtureShape
from headrace.kernels.triton.expert_tiles import MOST_PAIRS, expert_tile_choices
from headrace.kernels.triton.limits import device_limits
from headrace.kernels.triton.tiles import default_inflections, tile_choices
from headrace.kernels.tuning import Inflections, LinearArm, LinearShape, Tiles
from headrace.kernels.tuning_cache import DeviceTuningKey
from headrace.kernels.weights import Weight

_MIN_LAUNCHES, _MAX_LAUNCHES = 16, 256
"""In one recording: a launch takes microseconds, and the clock of an event ticks in half of one. A weight that so many
copies of fit into the cache costs a launch, wherever it comes from."""

_L2_SIZES = 3
"""Times the L2 cache that is read before a weight is read again."""


class TritonMachine:
    """A GPU, or the CPU that the interpreter runs on."""

    quick_rows = (1, 2, 8, 16, 64, 128)
    """Few of the sizes that batches are filled up to, as each is compiled before it is first run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._limits = device_limits(device)
        self._rotated: WeakKeyDictionary[Rotation, list[Weight]] = WeakKeyDictionary()

    def default_inflections(self, shape: LinearShape) -> Inflections:
        return default_inflections(shape)

    def tiles(self, shape: LinearShape, arm: LinearArm) -> Sequence[Tiles]:
        return tile_choices(shape, arm, self._limits)

    @property
    def expert_block_rows(self) -> Sequence[int]:
        return tuple(MOST_PAIRS)

    def expert_tiles(self, shape: MixtureShape, launch: ExpertLaunch) -> Sequence[Tiles]:
        return expert_tile_choices(shape, launch, self._limits)

    def can_run(self, run: Callable[[], object]) -> bool:
        """Not with tiles that this GPU has no room for, nor with those that this version of Triton cannot compile."""
        try:
            run()
        except (OutOfResources, triton.CompilationError):
            return False
        except RuntimeError as error:
            if "PassManager" not in str(error):
                raise
            return False
        return True

    def stopwatch(self, run: Callable[[Weight], object], rotation: Rotation) -> Stopwatch:
        """On a GPU, launches are recorded as one CUDA graph: a launch from Python takes longer than a small layer."""
        if self.device.type == "cpu":
            return CpuMachine().stopwatch(run, rotation)
        weights = self._weights(rotation)
        num_launches = max(_MIN_LAUNCHES, len(weights))
        if not self.can_run(lambda: run(weights[0])):  # compiles, and lets the library make its workspace
            return lambda: math.inf
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph):
            for i in range(num_launches):
                run(weights[i % len(weights)])
        graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def seconds() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            milliseconds: float = begin.elapsed_time(end)
            return milliseconds / 1e3 / num_launches

        return seconds

    def _weights(self, rotation: Rotation) -> list[Weight]:
        """Those of the rotation, as many as the cache does not hold; copies live as long as it does."""
        found = self._rotated.get(rotation)
        if found is None:
            found = _more_than_cached(rotation.weights, _L2_SIZES * self._limits.l2_bytes)
            self._rotated[rotation] = found
        return found


def _more_than_cached(weights: Sequence[Weight], num_bytes: int) -> list[Weight]:
    """As many of the weights as it takes to read that much, with copies if they are too few."""
    count = min(_MAX_LAUNCHES, max(1, math.ceil(num_bytes / max(1, weights[0].num_bytes))))
    copies = [_copy(weights[i % len(weights)]) for i in range(count - len(weights))]
    return [*weights[:count], *copies]


def _copy(weight: Weight) -> Weight:
    other = copy(weight)
    for name, value in vars(weight).items():
        if isinstance(value, Tensor):
            object.__setattr__(other, name, value.clone())
    return other


def tuning_key(device: torch.device) -> DeviceTuningKey:
    """What measurements on a GPU hold for."""
    toolkit = f"cuda {torch.version.cuda}" if torch.version.hip is None else f"hip {torch.version.hip}"
    name = "Triton's interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return DeviceTuningKey(
        device=name, toolkit=toolkit, torch=torch.__version__, triton=triton.__version__, kernels=_kernels_digest()
    )


@cache
def _kernels_digest() -> str:
    digest = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
