"""Which softmax each layer's attention uses: what the user asked for, with what is known of the model and machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from headrace.config import KvCacheFormat, Softmax, SoftmaxScheme
from headrace.errors import ConfigError
from headrace.kernels import AttentionSpec, Kernels, KvCache, SoftmaxCounts, SoftmaxSpec
from headrace.kernels.attention_tuning import ChosenAttention, TunedAttention
from headrace.models.softmax_calibration import (
    LayerChoice,
    asynchronized_spec,
    calibration_file,
    choose_layers,
    load_calibration,
)

DEFAULT_SCHEME = SoftmaxScheme.SYNCHRONIZED
"""What `auto` stands for: it suits every model, and what the others gain on some is little (docs/benchmarks.md)."""


@dataclass(frozen=True, kw_only=True)
class ChosenSoftmax:
    """layers: one for each; max_pieces: of a context, by batch (`ChosenAttention`); reason: one line for people."""

    layers: tuple[SoftmaxSpec, ...]
    max_pieces: Mapping[int, int | None]
    reason: str


def resolve_softmax(
    choice: Softmax,
    kernels: Kernels,
    folder: Path,
    *,
    num_layers: int,
    max_model_len: int,
    cache_format: KvCacheFormat,
    tuned: TunedAttention | None = None,
) -> ChosenSoftmax:
    """A scheme asked for is taken; `auto` is the synchronized one, and `measured` the fastest of those measured.

    Asked for, asynchronized without a calibration subtracts 0, which rows it does not suit make up for. A measurement
    alone never chooses it: it takes a calibration, and layers that this switches off stay synchronized.

    Raises:
        ConfigError: a scheme that these kernels lack, or a measurement that there is none of.
        CheckpointError: a calibration that cannot be used.
    """
    _check(choice, kernels, tuned)
    layers = None
    if choice in (Softmax.ASYNCHRONIZED, Softmax.MEASURED):
        ranges = load_calibration(calibration_file(folder), num_layers=num_layers)
        if ranges is not None:
            layers = choose_layers(ranges, max_model_len=max_model_len, cache_format=cache_format)
    schemes = _allowed(choice, kernels, layers)
    found = ChosenAttention(scheme=schemes[0], max_pieces={1: None}) if tuned is None else tuned.choice(schemes)
    reason = f"{found} ({_grounds(choice, tuned)})"
    if found.scheme is not SoftmaxScheme.ASYNCHRONIZED or layers is None:
        specs = (SoftmaxSpec(scheme=found.scheme),) * num_layers
        return ChosenSoftmax(layers=specs, max_pieces=found.max_pieces, reason=reason)
    num_off = sum(layer.reason is not None for layer in layers)
    if num_off:
        reason += f"; the calibration keeps {num_off} of {num_layers} layers synchronized"
    return ChosenSoftmax(layers=tuple(layer.softmax for layer in layers), max_pieces=found.max_pieces, reason=reason)


def _check(choice: Softmax, kernels: Kernels, tuned: TunedAttention | None) -> None:
    if choice is Softmax.MEASURED:
        if tuned is None:
            raise ConfigError(
                "softmax is 'measured', and no measurement of this model's attention on so many threads is in use; run "
                "`headrace tune --model MODEL` first, and leave --dataflow as 'measured'"
            )
    elif choice is not Softmax.AUTO and SoftmaxScheme(choice.value) not in kernels.softmax_schemes:
        allowed = ", ".join(known.value for known in kernels.softmax_schemes)
        raise ConfigError(f"softmax is '{choice.value}', which these kernels lack; allowed: auto, {allowed}")


def _allowed(choice: Softmax, kernels: Kernels, layers: tuple[LayerChoice, ...] | None) -> list[SoftmaxScheme]:
    if choice is Softmax.AUTO:
        return [DEFAULT_SCHEME]
    if choice is not Softmax.MEASURED:
        return [SoftmaxScheme(choice.value)]
    can_be_asynchronized = layers is not None and any(layer.reason is None for layer in layers)
    return [s for s in kernels.softmax_schemes if s is not SoftmaxScheme.ASYNCHRONIZED or can_be_asynchronized]


def _grounds(choice: Softmax, tuned: TunedAttention | None) -> str:
    if choice is Softmax.MEASURED:
        assert tuned is not None, "checked above"
        return f"measured on {tuned.measured_on}"
    scheme = "the default softmax" if choice is Softmax.AUTO else "softmax as asked for"
    return f"{scheme}, pieces " + ("not measured here" if tuned is None else f"measured on {tuned.measured_on}")


@dataclass(frozen=True, kw_only=True)
class ForcedSoftmax:
    """softmax: asynchronized, for each layer.

    num_layers_off: of them the calibration would have left synchronized; None without a calibration, and then all
        subtract 0.
    """

    softmax: tuple[SoftmaxSpec, ...]
    num_layers_off: int | None


def force_asynchronized(
    folder: Path, *, num_layers: int, max_model_len: int, cache_format: KvCacheFormat
) -> ForcedSoftmax:
    """The asynchronized softmax for every layer, also for those whose rows it does not suit, to measure it.

    Raises:
        CheckpointError: a calibration that cannot be used.
    """
    layers = load_calibration(calibration_file(folder), num_layers=num_layers)
    if layers is None:
        return ForcedSoftmax(
            softmax=(SoftmaxSpec(scheme=SoftmaxScheme.ASYNCHRONIZED),) * num_layers, num_layers_off=None
        )
    choices = choose_layers(layers, max_model_len=max_model_len, cache_format=cache_format)
    return ForcedSoftmax(
        softmax=tuple(
            asynchronized_spec(layer, max_model_len=max_model_len, cache_format=cache_format) for layer in layers
        ),
        num_layers_off=sum(choice.reason is not None for choice in choices),
    )


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

    def forget_caches(self) -> None:
        """Tell layers apart anew: what a model was loaded with has run on caches that are gone."""
        self._layer_of.clear()
        self._kv_caches.clear()

    def counts(self) -> tuple[SoftmaxCounts, ...]:
        """For each layer met so far."""
        return tuple(cache.softmax_counts() for cache in self._kv_caches)

    def _layer(self, kv_cache: KvCache) -> int:
        layer = self._layer_of.setdefault(id(kv_cache), len(self._kv_caches))
        if layer == len(self._kv_caches):
            self._kv_caches.append(kv_cache)
        return layer
