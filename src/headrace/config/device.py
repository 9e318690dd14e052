"""Where a model runs."""

import re
from dataclasses import dataclass
from enum import Enum

from headrace.errors import ConfigError


class DeviceKind(Enum):
    """AUTO takes a GPU if there is one that the kernels run on. CUDA is also what torch calls AMD's GPUs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, kw_only=True)
class Device:
    """index: of the first GPU that ranks on this host take, one each; None lets them begin with the first there is."""

    kind: DeviceKind = DeviceKind.AUTO
    index: int | None = None

    def __post_init__(self) -> None:
        if self.index is not None and (self.kind is not DeviceKind.CUDA or self.index < 0):
            raise ConfigError(f"device is '{self}'; allowed: {_ALLOWED}")

    @classmethod
    def parse(cls, text: str) -> "Device":
        """
        Raises:
            ConfigError: not the name of a device.
        """
        match = re.fullmatch(r"(auto|cpu|cuda)|cuda:(\d{1,4})", text, re.ASCII)
        if match is None:
            raise ConfigError(f"device is '{text:.80}'; allowed: {_ALLOWED}")
        if match[2] is not None:
            return cls(kind=DeviceKind.CUDA, index=int(match[2]))
        return cls(kind=DeviceKind(match[1]))

    def __str__(self) -> str:
        return self.kind.value if self.index is None else f"{self.kind.value}:{self.index}"


_ALLOWED = "auto, cpu, cuda, or cuda:N for the GPU of that number"
