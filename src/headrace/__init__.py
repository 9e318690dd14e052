"""Headrace: LLM inference at the machine's limit, with every byte between ranks accounted for.

Names below are loaded on first use, so that `import headrace` and the command line start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headrace._version import __version__
from headrace.config import PoolingParams, SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    from headrace.engine.llm import LLM
    from headrace.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from headrace.models.quantize_checkpoint import quantize

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
    "quantize",
]

_LAZY = {
    "LLM": "headrace.engine.llm",
    "CompletionOutput": "headrace.engine.outputs",
    "Logprob": "headrace.engine.outputs",
    "RequestOutput": "headrace.engine.outputs",
    "quantize": "headrace.models.quantize_checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'headrace' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
