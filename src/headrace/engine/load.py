"""From a model's name to a worker that can run plans."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.cache.kv_pool import KvPool
from headrace.config import EngineConfig, KvCacheFormat, ModelConfig
from headrace.engine.engine_plan import EnginePlan, resolve_max_model_len, resolve_plan
from headrace.engine.executor import Executor
from headrace.engine.kv_cache_spec import kv_block_bytes, kv_cache_spec, resolve_kv_cache_format
from headrace.engine.runner import ModelRunner
from headrace.engine.softmax import ChosenSoftmax, resolve_softmax
from headrace.engine.tune import LinearWeights, prepare_dataflow
from headrace.engine.tune_attention import attention_shape, look_up_attention
from headrace.engine.worker import Worker
from headrace.errors import CheckpointError
from headrace.kernels import Kernels, kernel_choice_from, resolve_kernels
from headrace.layers.context import LayerContext
from headrace.machine import available_memory_bytes, cpu_limits
from headrace.models.checkpoint import read_json
from headrace.models.decoder import Decoder
from headrace.models.hub import resolve_model_folder
from headrace.models.loading import WeightFormats
from headrace.models.progress import bytes_progress
from headrace.models.source import ModelSource, load_decoder, open_model, resolve_formats
from headrace.parallel import OneRankGroup
from headrace.tokenizer import ChatTemplate, Tokenizer


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What an engine runs.

    tokenizer: None if the folder has none, and then prompts are token ids; tokenizer_error says why.
    weight_bytes: weights in memory; load_s: from opening the folder to ready.
    """

    config: ModelConfig
    plan: EnginePlan
    executor: Executor
    kernels: Kernels
    formats: WeightFormats
    kv_cache_format: KvCacheFormat
    softmax: ChosenSoftmax
    linear_weights: LinearWeights
    tokenizer: Tokenizer | None
    tokenizer_error: str | None
    chat_template: ChatTemplate | None
    eos_token_ids: frozenset[int]
    generation_config: dict[str, Any]
    weight_bytes: int
    load_s: float


def load_model(config: EngineConfig, *, change_kernels: Callable[[Kernels], Kernels] | None = None) -> LoadedModel:
    """Resolve the folder, load the weights, size the cache. Sets the thread count of the kernels for this process.

    change_kernels: what the model calls instead of the ops themselves, to watch it at work.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: settings that do not fit the model or the machine.
    """
    started_s = time.monotonic()
    kernels = resolve_kernels(kernel_choice_from())
    if change_kernels is not None:
        kernels = change_kernels(kernels)
    folder = resolve_model_folder(config.load.model, config.load.revision, config.load.show_progress)
    source = open_model(folder)
    formats = resolve_formats(source, config.load)
    max_model_len = resolve_max_model_len(config.scheduler, source.config)
    tokenizer, tokenizer_error = _load_tokenizer(folder, is_required=config.load.require_tokenizer)
    generation_config = _optional_json(folder / "generation_config.json")
    num_threads = config.num_threads or cpu_limits().num_threads
    kernels.set_num_threads(num_threads)

    cache_format = resolve_kv_cache_format(config.cache, formats)
    softmax = resolve_softmax_of(config, kernels, folder, source.config, cache_format, num_threads)
    if kernels.dataflow is not None:
        kernels.dataflow.max_pieces = softmax.max_pieces
    context = LayerContext(kernels=kernels, tp_group=OneRankGroup(), softmax=softmax.layers)
    decoder = _load_with_progress(source, context, formats, max_model_len, config.load.show_progress)
    linear_weights = LinearWeights.of((p.weight for p in decoder.linear_parameters()), formats.dtype)
    show_progress = config.load.show_progress
    prepare_dataflow(kernels, linear_weights, config.dataflow, num_threads, show_progress=show_progress)
    plan = resolve_plan(
        config,
        max_model_len=max_model_len,
        block_bytes=kv_block_bytes(kernels, source.config, cache_format, config.cache.block_size),
        available_bytes=available_memory_bytes(),
        num_threads=num_threads,
    )
    eos_token_ids = _eos_token_ids(source, generation_config, tokenizer)
    return LoadedModel(
        config=source.config,
        plan=plan,
        executor=Worker(
            ModelRunner(decoder, _make_kv_pool(kernels, source.config, plan, cache_format), plan.max_model_len),
            eos_token_ids,
        ),
        kernels=kernels,
        formats=formats,
        kv_cache_format=cache_format,
        softmax=softmax,
        linear_weights=linear_weights,
        tokenizer=tokenizer,
        tokenizer_error=tokenizer_error,
        chat_template=ChatTemplate.from_folder(folder) if tokenizer else None,
        eos_token_ids=eos_token_ids,
        generation_config=generation_config,
        weight_bytes=sum(parameter.num_bytes for parameter in decoder.parameters()),
        load_s=time.monotonic() - started_s,
    )


def resolve_softmax_of(
    config: EngineConfig,
    kernels: Kernels,
    folder: Path,
    model: ModelConfig,
    cache_format: KvCacheFormat,
    num_threads: int,
) -> ChosenSoftmax:
    """The softmax that an engine with these settings uses for the model in a folder, see `resolve_softmax`."""
    return resolve_softmax(
        config.softmax,
        kernels,
        folder,
        num_layers=model.num_hidden_layers,
        max_model_len=resolve_max_model_len(config.scheduler, model),
        cache_format=cache_format,
        tuned=look_up_attention(kernels, config.dataflow, attention_shape(model, cache_format), num_threads),
    )


def _load_with_progress(
    source: ModelSource, context: LayerContext, formats: WeightFormats, max_model_len: int, show_progress: bool
) -> Decoder:
    with bytes_progress("loading weights", source.checkpoint_bytes, show_progress) as progress:
        return load_decoder(source, context, formats, max_model_len=max_model_len, progress=progress)


def _make_kv_pool(kernels: Kernels, config: ModelConfig, plan: EnginePlan, cache_format: KvCacheFormat) -> KvPool:
    spec = kv_cache_spec(config, cache_format, num_blocks=plan.num_blocks, block_size=plan.cache.block_size)
    return KvPool(kernels, spec, num_layers=config.num_hidden_layers)


def _load_tokenizer(folder: Path, *, is_required: bool) -> tuple[Tokenizer | None, str | None]:
    """Without a tokenizer token ids still run, and what needs text says why it cannot; a broken one raises."""
    is_missing = not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    try:
        return Tokenizer.from_folder(folder), None
    except CheckpointError as error:
        if is_required or not is_missing:
            raise
        return None, str(error)


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _eos_token_ids(
    source: ModelSource, generation_config: dict[str, Any], tokenizer: Tokenizer | None
) -> frozenset[int]:
    """All that the model's files call end of sequence: config.json, generation_config.json (one or several each),
    and the tokenizer."""
    ids = _token_ids(source.hf_config, "config.json") | _token_ids(generation_config, "generation_config.json")
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def _token_ids(config: Mapping[str, Any], file_name: str) -> set[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"{file_name}: eos_token_id is {value!r:.80}; it must be a token id or a list of them")
    return set(ids)
