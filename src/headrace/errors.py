"""The exceptions Headrace raises on purpose.

HeadraceError
├── ConfigError               a setting that cannot be used; says what was given and what is allowed
│   └── ParallelismError      a layout that does not divide the model
├── CheckpointError           a model folder, file or tensor that cannot be loaded
├── KernelError
│   ├── ShapeError            tensors that do not fit an op's contract
│   └── BackendUnavailable    an implementation asked for by name that cannot run here
├── RequestError              one request's fault (HTTP 400); never touches another request
│   └── ContextLengthError    prompt or output longer than the model or the cache can hold
├── OutOfDeviceMemory         the model, its cache or a step does not fit the memory of the device it lies on
├── RankError                 a rank died, stalled or failed; the engine ends with it
├── EndpointError             a server that cannot be reached, or does not answer as OpenAI's API does
└── EngineStopped             the engine no longer takes requests (HTTP 503)

The command line prints any of them as one line and exits with code 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class HeadraceError(Exception):
    pass


class ConfigError(HeadraceError):
    pass


class ParallelismError(ConfigError):
    pass


class CheckpointError(HeadraceError):
    pass


class KernelError(HeadraceError):
    pass


class ShapeError(KernelError):
    pass


class BackendUnavailable(KernelError):
    pass


class RequestError(HeadraceError):
    """param: the field at fault, where it is known."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    pass


class OutOfDeviceMemory(HeadraceError):
    pass


class RankError(HeadraceError):
    pass


class EndpointError(HeadraceError):
    pass


class EngineStopped(HeadraceError):
    pass


def nearest_name(given: str, allowed: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A hint for an unknown name: the closest allowed one if any is close (see difflib), else all of them."""
    names = sorted(allowed)
    close = get_close_matches(given, names, n=1, cutoff=cutoff)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
