"""What formats of weights and KV cache cost in quality: log probabilities of text, token by token.

Every token of a text but the first of each window is scored by the engine itself (prompt_logprobs), so that figures are
those of the kernels, caches included, and not of the format on paper. bfloat16 is what the others are compared with.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from headrace.config import (
    DataflowChoice,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    Quantize,
    SamplingParams,
    WeightFormat,
)
from headrace.engine.engine import Engine
from headrace.engine.load import LoadedModel, load_model
from headrace.engine.outputs import RequestOutput
from headrace.engine.text_windows import token_windows
from headrace.errors import ConfigError, RequestError

NUM_LIKELY = 20
"""Tokens of each position whose probabilities are compared one by one."""

_LEAST_REST = 1e-12
"""What probabilities leave to all other tokens, at least: in float32 they may sum to a little more than 1."""


@dataclass(frozen=True, kw_only=True)
class QualityFormat:
    """How weights and KV cache are held; kv_cache AUTO takes the type of the activations."""

    name: str
    dtype: Dtype = Dtype.BFLOAT16
    quantize: Quantize = Quantize.NONE
    kv_cache: KvCacheDtype = KvCacheDtype.AUTO

    @property
    def linear(self) -> WeightFormat:
        return WeightFormat((self.dtype if self.quantize is Quantize.NONE else self.quantize).value)


REFERENCE = QualityFormat(name="bfloat16")
FORMATS = (
    QualityFormat(name="float32", dtype=Dtype.FLOAT32),
    REFERENCE,
    QualityFormat(name="int8", quantize=Quantize.INT8),
    QualityFormat(name="int4", quantize=Quantize.INT4),
    QualityFormat(name="float32-kv-bfloat16", dtype=Dtype.FLOAT32, kv_cache=KvCacheDtype.BFLOAT16),
    QualityFormat(name="bfloat16-kv-int8", kv_cache=KvCacheDtype.INT8),
    QualityFormat(name="int4-kv-int8", quantize=Quantize.INT4, kv_cache=KvCacheDtype.INT8),
)


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """One position. logprob: of the text's token, natural logarithm; likely: of that and the NUM_LIKELY most likely
    tokens, by id; greedy: the most likely one."""

    logprob: float
    likely: dict[int, float]
    greedy: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of the scores of one text with those of the reference.

    loss: nats per token; loss_difference: to the reference's, difference_error: the standard error of its mean.
    agreement: share of positions with the same greedy token.
    divergence: a lower bound of the mean of KL(reference || this), see `divergence`.
    """

    num_tokens: int
    loss: float
    loss_difference: float
    difference_error: float
    agreement: float
    divergence: float


@dataclass(frozen=True, kw_only=True)
class FormatQuality:
    quality_format: QualityFormat
    weight_bytes: int
    comparison: Comparison


def measure_quality(
    config: EngineConfig, texts: Sequence[str], formats: Sequence[QualityFormat], on_start: Callable[[str], None]
) -> Iterator[FormatQuality]:
    """Load the model once for each format, one after another, and score the texts.

    Raises:
        ConfigError: a text too short, or a checkpoint whose weights are quantized already.
        CheckpointError: the model cannot be loaded.
    """
    expected, expected_bytes = _score_texts(config, texts, REFERENCE, on_start)
    for quality_format in formats:
        if quality_format == REFERENCE:
            scores, weight_bytes = expected, expected_bytes
        else:
            scores, weight_bytes = _score_texts(config, texts, quality_format, on_start)
        yield FormatQuality(
            quality_format=quality_format, weight_bytes=weight_bytes, comparison=compare(expected, scores)
        )


def score_windows(
    engine: Engine, windows: Sequence[Sequence[int]], on_start: Callable[[str], None]
) -> list[TokenScore]:
    """Of every token but the first of each window, which has nothing before it to be predicted from.

    Raises:
        RequestError: a window that the engine cannot take.
    """
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=NUM_LIKELY)
    scores = []
    for i, window in enumerate(windows):
        on_start(f"text {i + 1} of {len(windows)}")
        output = _run(engine, window, params)
        assert output.prompt_logprobs is not None
        for token_id, found in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            assert found is not None
            likely = {i: entry.logprob for i, entry in found.items()}
            greedy = min(found, key=lambda i: (found[i].rank, i))
            scores.append(TokenScore(logprob=likely[token_id], likely=likely, greedy=greedy))
    return scores


def compare(reference: Sequence[TokenScore], scores: Sequence[TokenScore]) -> Comparison:
    """Both of the same text, two tokens of it at least."""
    pairs = list(zip(reference, scores, strict=True))
    differences = [expected.logprob - found.logprob for expected, found in pairs]
    return Comparison(
        num_tokens=len(pairs),
        loss=-fmean(score.logprob for score in scores),
        loss_difference=fmean(differences),
        difference_error=stdev(differences) / math.sqrt(len(differences)),
        agreement=fmean(expected.greedy == found.greedy for expected, found in pairs),
        divergence=fmean(divergence(expected.likely, found.likely) for expected, found in pairs),
    )


def divergence(expected: dict[int, float], found: dict[int, float]) -> float:
    """sum p log(p / q) over the tokens that both name, and the rest as if it were one token.

    Merging tokens never makes the Kullback-Leibler divergence larger, so this is a lower bound of it, and close to it
    where the tokens named have most of the probability.
    """
    common = expected.keys() & found.keys()
    rest_p = max(_LEAST_REST, 1 - sum(math.exp(expected[i]) for i in common))
    rest_q = max(_LEAST_REST, 1 - sum(math.exp(found[i]) for i in common))
    named = sum(math.exp(expected[i]) * (expected[i] - found[i]) for i in common)
    return max(0.0, named + rest_p * math.log(rest_p / rest_q))


def _score_texts(
    config: EngineConfig, texts: Sequence[str], quality_format: QualityFormat, on_start: Callable[[str], None]
) -> tuple[list[TokenScore], int]:
    on_start(f"{quality_format.name}: loading")
    model = load_model(_with_format(config, quality_format))
    _check_format(model, quality_format)
    windows = [window for window in token_windows(model, texts) if len(window) > 1]
    if sum(len(window) - 1 for window in windows) < 2:
        raise ConfigError("the text is too short to be scored; give one of a thousand words or more")
    scores = score_windows(Engine(model), windows, lambda part: on_start(f"{quality_format.name}: {part}"))
    return scores, model.weight_bytes


def _with_format(config: EngineConfig, quality_format: QualityFormat) -> EngineConfig:
    """Nothing is looked up or measured: how a layer is computed does not change its result."""
    return replace(
        config,
        dataflow=DataflowChoice.DEFAULT,
        load=replace(
            config.load,
            dtype=quality_format.dtype,
            quantize=quality_format.quantize,
            require_tokenizer=True,
        ),
        cache=replace(config.cache, kv_cache_dtype=quality_format.kv_cache),
    )


def _check_format(model: LoadedModel, quality_format: QualityFormat) -> None:
    if model.formats.linear is not quality_format.linear:
        raise ConfigError(
            f"the checkpoint's weights are {model.formats.linear.value} already; give the one that they were made from"
        )


def _run(engine: Engine, token_ids: Sequence[int], params: SamplingParams) -> RequestOutput:
    engine.add_request("quality", token_ids, params)
    while True:
        for update in engine.step():
            if update.finished is not None:
                [output] = update.finished.outputs
                if output.error is not None:
                    raise RequestError(f"the text cannot be scored: {output.error}")
                return update.finished
