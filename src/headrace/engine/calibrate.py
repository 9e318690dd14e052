"""Runs text through a model and observes what its attention gives to the softmax."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from headrace.config import EngineConfig, SamplingParams, SoftmaxScheme
from headrace.engine.engine import Engine
from headrace.engine.load import load_model
from headrace.engine.softmax import SwitchableAttention
from headrace.engine.text_windows import token_windows
from headrace.errors import ConfigError
from headrace.kernels import AttentionSpec, Kernels, KvCache, Recording, SoftmaxCounts
from headrace.models.softmax_calibration import LayerChoice, LogitRange, asynchronized_spec, choose_layers

T = TypeVar("T")

_MAX_SCORE_ELEMENTS = 4 * 2**20
"""Logits observed at once (16 MiB of float32)."""

_TAIL = 0.00005
"""Of all logits, outside the 99.99 % interval on either side."""

_STEPS = 1024
_LARGEST_BIN = 92 * _STEPS
"""Logits are counted by asinh(logit) in steps of 1/1024: 0.001 near zero, 0.1 % of large ones, and all of float32."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """layers: what was observed; choices: what follows for the settings of this engine.

    counts: of a second run with the asynchronized softmax in every layer, switched off or not; None if the kernels have
        none. num_checked_tokens: of that run.
    """

    layers: tuple[LogitRange, ...]
    choices: tuple[LayerChoice, ...]
    counts: tuple[SoftmaxCounts, ...] | None
    num_tokens: int
    num_checked_tokens: int


class LogitObserver:
    """Ranges of one layer's logits, over any number of calls."""

    def __init__(self) -> None:
        self._bins = torch.zeros(2 * _LARGEST_BIN + 1, dtype=torch.int64)
        self._least = self._least_row_max = float("inf")
        self._largest = self._largest_row_max = float("-inf")
        self._largest_value = 0.0

    def add(self, scores: Tensor, visible: Tensor, value: Tensor) -> None:
        """Shapes: scores [num_rows, num_queries, num_keys] float32; visible [num_queries, num_keys] bool, a key at
        least for each query; value: any.

        Raises:
            ConfigError: logits or values that are not finite.
        """
        seen = scores[:, visible].flatten()
        row_max = scores.masked_fill(~visible, float("-inf")).amax(-1)
        (least, largest), largest_value = (bound.item() for bound in seen.aminmax()), value.abs().max().item()
        if not all(map(math.isfinite, (least, largest, largest_value))):
            raise ConfigError("the model's attention logits or values are not finite; there is nothing to calibrate")
        self._least, self._largest = min(self._least, least), max(self._largest, largest)
        self._least_row_max = min(self._least_row_max, row_max.min().item())
        self._largest_row_max = max(self._largest_row_max, row_max.max().item())
        self._largest_value = max(self._largest_value, largest_value)
        bins = torch.asinh(seen).mul_(_STEPS).round_().add_(_LARGEST_BIN).int()
        self._bins += torch.bincount(bins, minlength=len(self._bins)).cpu()

    def result(self) -> LogitRange:
        return LogitRange(
            least=self._least,
            low_quantile=self._quantile(_TAIL),
            high_quantile=self._quantile(1 - _TAIL),
            largest=self._largest,
            least_row_max=self._least_row_max,
            largest_row_max=self._largest_row_max,
            largest_value=self._largest_value,
        )

    def _quantile(self, share: float) -> float:
        total = self._bins.cumsum(0)
        rank = torch.tensor(share * (int(total[-1]) - 1)).round().long() + 1
        step = int(torch.searchsorted(total, rank)) - _LARGEST_BIN
        value = torch.sinh(torch.tensor(step / _STEPS, dtype=torch.float64)).item()
        return min(max(value, self._least), self._largest)


class _ObservedAttention(SwitchableAttention):
    """With an eye on its logits as long as no softmax is chosen."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.observers: list[LogitObserver] = []

    def forget_caches(self) -> None:
        super().forget_caches()
        self.observers.clear()

    def __call__(
        self,
        query: Tensor,
        kv_cache: KvCache,
        block_tables: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        spec: AttentionSpec,
    ) -> Tensor:
        if self.softmax is None:
            observer, bounds = self._observer(kv_cache), cu_seqlens_q.tolist()
            for i, context_len in enumerate(context_lens.tolist()):
                rows = query[bounds[i] : bounds[i + 1]]
                _observe(observer, self._kernels, rows, kv_cache, block_tables[i], context_len, spec)
        return super().__call__(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec)

    def _observer(self, kv_cache: KvCache) -> LogitObserver:
        layer = self._layer(kv_cache)
        if layer == len(self.observers):
            self.observers.append(LogitObserver())
        return self.observers[layer]


def calibrate(
    config: EngineConfig,
    texts: Sequence[str],
    *,
    check_texts: Sequence[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Load a model, run the texts to observe it, and then texts with the constants that follow, to count the rows which
    those do not suit.

    check_texts: of the second run; None takes the same texts.
    on_progress: called with windows done and windows in all.

    Raises:
        ConfigError: no text.
        CheckpointError: the model cannot be loaded, or has no tokenizer.
    """
    observed: list[_ObservedAttention] = []

    def observe(kernels: Kernels) -> Kernels:
        attention = _ObservedAttention(kernels)
        observed.append(attention)
        return replace(kernels, attention=attention, record=_run_unrecorded, pads_steps=False)

    config = replace(
        config,
        load=replace(config.load, require_tokenizer=True),
        cache=replace(config.cache, enable_prefix_caching=False),
    )
    model = load_model(config, change_kernels=observe)
    [attention] = observed
    attention.forget_caches()
    windows = list(token_windows(model, texts))
    if not windows:
        raise ConfigError("the calibration text is empty; give one of a thousand words or more")
    can_choose = SoftmaxScheme.ASYNCHRONIZED in model.kernels.softmax_schemes
    check_windows = windows if check_texts is None else list(token_windows(model, check_texts))
    engine, num_windows = Engine(model), len(windows) + (len(check_windows) if can_choose else 0)

    def run(some: Sequence[list[int]], num_done: int) -> None:
        for i, window in enumerate(some, num_done + 1):
            _run_window(engine, window)
            if on_progress is not None:
                on_progress(i, num_windows)

    run(windows, 0)
    layers = tuple(observer.result() for observer in attention.observers)
    max_model_len, cache_format = model.plan.max_model_len, model.kv_cache_format
    counts = None
    if can_choose:
        before = attention.counts()
        attention.softmax = tuple(
            asynchronized_spec(layer, max_model_len=max_model_len, cache_format=cache_format) for layer in layers
        )
        run(check_windows, len(windows))
        counts = tuple(after.since(earlier) for earlier, after in zip(before, attention.counts(), strict=True))
    return Calibration(
        layers=layers,
        choices=choose_layers(layers, max_model_len=max_model_len, cache_format=cache_format),
        counts=counts,
        num_tokens=sum(map(len, windows)),
        num_checked_tokens=sum(map(len, check_windows)),
    )


def _run_window(engine: Engine, token_ids: list[int]) -> None:
    engine.add_request("calibration", token_ids, SamplingParams(temperature=0, max_tokens=1))
    while engine.has_unfinished:
        engine.step()


def _run_unrecorded(forward: Callable[[], T]) -> tuple[T, Recording]:
    return forward(), Recording(obstacle="attention is observed")


def _observe(
    observer: LogitObserver,
    kernels: Kernels,
    query: Tensor,
    kv_cache: KvCache,
    block_table: Tensor,
    context_len: int,
    spec: AttentionSpec,
) -> None:
    """The logits of one sequence's new tokens, computed as the reference's attention does, in tiles of queries."""
    block_size, num_kv_heads = kv_cache.spec.block_size, kv_cache.spec.num_kv_heads
    key_positions = torch.arange(context_len, device=query.device)
    slots = block_table[key_positions // block_size].long() * block_size + key_positions % block_size
    key, value = kernels.read_kv(kv_cache, slots)
    key = key.float().transpose(0, 1)
    positions = torch.arange(context_len - len(query), context_len, device=query.device)
    tile = max(1, _MAX_SCORE_ELEMENTS // (query.shape[1] * context_len))
    for rows, row_positions in zip(torch.split(query, tile), torch.split(positions, tile), strict=True):
        grouped = rows.float().view(len(rows), num_kv_heads, -1, query.shape[2]).permute(1, 2, 0, 3)
        scores = (grouped @ key.transpose(1, 2).unsqueeze(1)).flatten(0, 1) * spec.softmax_scale
        if spec.logit_soft_cap is not None:
            scores = spec.logit_soft_cap * torch.tanh(scores / spec.logit_soft_cap)
        visible = key_positions <= row_positions[:, None]
        if spec.sliding_window is not None:
            visible &= key_positions > row_positions[:, None] - spec.sliding_window
        observer.add(scores, visible, value)
