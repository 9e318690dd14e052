"""What a model is and what it needs, from its configuration and the headers of its weight files."""

from typing import Any

from headrace.bench.facts import linear_shapes, mixture_shape, weight_facts
from headrace.config import EngineConfig
from headrace.costs.memory import kv_token_bytes
from headrace.engine.device_memory import available_bytes, default_memory_fraction
from headrace.engine.engine_plan import resolve_max_model_len, resolve_plan
from headrace.engine.kv_cache_spec import RankShape, kv_block_bytes, resolve_kv_cache_format
from headrace.engine.load_rank import resolve_softmax_of
from headrace.engine.tune import look_up, look_up_dataflow
from headrace.engine.tune_attention import attention_shape
from headrace.kernels import Kernels
from headrace.kernels.prefill_tuning import PREFILL, explain_prefill
from headrace.machine import cpu_limits
from headrace.models.model_folder import resolve_model_folder
from headrace.models.source import open_model, resolve_formats
from headrace.parallel.place import Place


def dataflow_info(config: EngineConfig, kernels: Kernels) -> list[dict[str, str]]:
    """Which implementation multiplies how many rows, for each shape of the model, which tiles mixtures of experts
    take, and how attention computes its softmax; empty without a choice.

    Raises:
        CheckpointError, ConfigError: as loading the model would.
    """
    if kernels.dataflow is None:
        return []
    folder = resolve_model_folder(config.load.model, config.load.revision, show_progress=False)
    source = open_model(folder)
    formats = resolve_formats(source, config.load)
    num_threads = config.num_threads or cpu_limits().num_threads
    look_up_dataflow(kernels, config.dataflow, num_threads)
    cache_format = resolve_kv_cache_format(config.cache, formats)
    shape = RankShape.of(source.config, Place(rank=0, config=config.parallel))
    softmax = resolve_softmax_of(config, kernels, folder, source.config, shape, cache_format, num_threads)
    shapes = linear_shapes(source.config, formats, kernels)
    heads = attention_shape(shape, cache_format)
    mixture = mixture_shape(source.config, formats, kernels)
    mixtures = (
        [] if mixture is None else [{"mixture": str(mixture), "dataflow": kernels.dataflow.explain_mixture(mixture)}]
    )
    rows = [
        *({"linear": str(linear), "dataflow": kernels.dataflow.explain(linear)} for linear in shapes),
        *mixtures,
        {"attention": str(heads), "dataflow": softmax.reason},
    ]
    if kernels.prefill_library_obstacle is not None:
        prefill = explain_prefill(look_up(PREFILL, kernels, config.dataflow, num_threads).get(heads))
        rows.append({"attention": f"prompts of {heads}", "dataflow": prefill})
    return rows


def model_info(config: EngineConfig, kernels: Kernels) -> dict[str, Any]:
    """Names end in their unit, `_bytes`; the cache is sized as an engine started now would size it, but for what steps
    take of a GPU.

    Raises:
        CheckpointError, ConfigError: as loading the model would.
    """
    folder = resolve_model_folder(config.load.model, config.load.revision, config.load.show_progress)
    source = open_model(folder)
    model, formats = source.config, resolve_formats(source, config.load)
    facts = weight_facts(model, formats, kernels)
    cache_format = resolve_kv_cache_format(config.cache, formats)
    shape = RankShape.of(model, Place(rank=0, config=config.parallel))
    plan = resolve_plan(
        config,
        max_model_len=resolve_max_model_len(config.scheduler, model),
        block_bytes=kv_block_bytes(kernels, shape, cache_format, config.cache.block_size),
        available_bytes=max(0, available_bytes(kernels.device) - facts.weight_bytes),
        num_threads=config.num_threads or cpu_limits().num_threads,
        memory_fraction=default_memory_fraction(kernels.device),
    )
    return {
        "folder": str(folder),
        "architecture": model.architecture,
        "layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "heads": model.attention.num_heads,
        "kv_heads": model.attention.num_kv_heads,
        "head_dim": model.attention.head_dim,
        "vocab_size": model.vocab_size,
        "parameters": facts.num_parameters,
        "linear_weights": formats.linear.value,
        "other_weights": formats.dense.value,
        "checkpoint_bytes": source.checkpoint_bytes,
        "weight_bytes": facts.weight_bytes,
        "kv_cache": cache_format.value,
        "kv_per_token_bytes": kv_token_bytes(model, cache_format),
        "max_model_len": plan.max_model_len,
        "block_size": plan.cache.block_size,
        "blocks": plan.num_blocks,
        "kv_cache_bytes": plan.kv_cache_bytes,
    }
