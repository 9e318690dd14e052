"""Room on the device that a rank runs on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from headrace.config.engine import GPU_MEMORY_FRACTION, HOST_MEMORY_FRACTION
from headrace.errors import OutOfDeviceMemory
from headrace.machine import available_memory_bytes, host_id

T = TypeVar("T")


def default_memory_fraction(device: torch.device) -> float:
    """Of what is free there, for keys and values."""
    return HOST_MEMORY_FRACTION if device.type == "cpu" else GPU_MEMORY_FRACTION


def available_bytes(device: torch.device) -> int:
    """What this process can still take there: of a GPU what no process holds, of the host what its limits leave."""
    if device.type == "cpu":
        return available_memory_bytes()
    release_cached(device)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def release_cached(device: torch.device) -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if device.type != "cpu":
        torch.cuda.empty_cache()


def memory_owner(device: torch.device) -> str:
    """Equal for ranks that share memory: those of one host, or those on one GPU of it."""
    return host_id() if device.type == "cpu" else f"{host_id()}/{device}"


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """What a GPU is asked for while something runs, beyond what it holds already; gaps between pieces included."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    return max(0, peak)


@contextmanager
def explaining_out_of_memory(what: str, device: torch.device) -> Iterator[None]:
    """
    Raises:
        OutOfDeviceMemory: instead of what torch says of it at length.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfDeviceMemory(
            f"{what} on {device}: {what_torch_says(error)}; quantize it (--quantize), shorten --max-model-len, use "
            "more ranks, or end what else uses that GPU"
        ) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Libraries and drivers that find no memory raise no error of its own kind."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text


def what_torch_says(error: RuntimeError) -> str:
    """How much was asked for and how much there is; torch goes on to name settings of its own."""
    return ". ".join(str(error).split(". ")[:3]).removesuffix(".")[:300]


class Retrying(Protocol):
    """Calls what may find no memory."""

    def __call__(self, run: Callable[[], T]) -> T: ...


def call_once(run: Callable[[], T]) -> T:
    return run()


class Reserve:
    """Memory of a device set aside for exchanges that other ranks wait for, which must not fail.

    num_bytes: of the largest one; 0 where ranks need none.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device, self._num_bytes = device, num_bytes
        self._memory = self._make()

    def release(self) -> None:
        """Give back what torch keeps for later, and set the reserve free for what this process allocates next."""
        release_cached(self._device)
        self._memory = None

    def restore(self) -> None:
        """After `release`: what was allocated since is gone, and torch has kept its memory."""
        if self._memory is None and self._num_bytes:
            with suppress(torch.OutOfMemoryError):
                self._memory = self._make()

    def retrying(self, run: Callable[[], T]) -> T:
        """What `run` returns, which is called once more if it finds no memory."""
        try:
            return run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self.release()
        return run()

    def _make(self) -> Tensor | None:
        return torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device) if self._num_bytes else None
