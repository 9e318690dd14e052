"""Which softmax each layer's attention uses: what the user asked for, with what is known of the model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from headrace.config import KvCacheFormat, Softmax, SoftmaxScheme
from headrace.errors import ConfigError
from headrace.kernels import AttentionSpec, Kernels, KvCache, SoftmaxCounts, SoftmaxSpec
from headrace.models.softmax_calibration import FILE_NAME, choose_layers, load_calibration


def resolve_softmax(
    choice: Softmax,
    kernels: Kernels,
    folder: Path,
    *,
    num_layers: int,
    max_model_len: int,
    cache_format: KvCacheFormat,
) -> tuple[SoftmaxSpec, ...]:
    """For each layer. Asynchronized without a calibration subtracts 0, which rows it does not suit make up for.

    Raises:
        ConfigError: a scheme that these kernels lack.
        CheckpointError: a calibration that cannot be used.
    """
    scheme = SoftmaxScheme.SYNCHRONIZED if choice is Softmax.AUTO else SoftmaxScheme(choice.value)
    if scheme not in kernels.softmax_schemes:
        allowed = ", ".join(known.value for known in kernels.softmax_schemes)
        raise ConfigError(f"softmax is '{scheme.value}', which these kernels lack; allowed: auto, {allowed}")
    if scheme is SoftmaxScheme.ASYNCHRONIZED:
        layers = load_calibration(folder / FILE_NAME, num_layers=num_layers)
        if layers is not None:
            choices = choose_layers(layers, max_model_len=max_model_len, cache_format=cache_format)
            return tuple(layer.softmax for layer in choices)
    return (SoftmaxSpec(scheme=scheme),) * num_layers


class SwitchableAttention:
    """The attention op of one model, whose softmax can be changed while the model is in use.

    Layers are told apart by their KV caches, and in order because a first pass meets them so. A recorded step keeps
    the softmax it was recorded with.

    softmax: for each layer; None leaves each what its model was built with.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._layer_of: dict[int, int] = {}
        self._kv_caches: list[KvCache] = []
        self.softmax: Sequence[SoftmaxSpec] | None = None

    def __call__(
        self,
        query: Tensor,
        kv_cache: KvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        spec: AttentionSpec,
    ) -> Tensor:
        layer = self._layer(kv_cache)
        if self.softmax is not None:
            spec = replace(spec, softmax=self.softmax[layer])
        return self._kernels.attention(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec)

    def counts(self) -> tuple[SoftmaxCounts, ...]:
        """For each layer met so far."""
        return tuple(cache.softmax_counts() for cache in self._kv_caches)

    def _layer(self, kv_cache: KvCache) -> int:
        layer = self._layer_of.setdefault(id(kv_cache), len(self._kv_caches))
        if layer == len(self._kv_caches):
            self._kv_caches.append(kv_cache)
        return layer
