"""One rank's part of a model: from a folder to a decoder stage, and what ranks need to work together."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from headrace.config import AllReduceDtype, EngineConfig, KvCacheFormat, ModelConfig
from headrace.costs.exchanges import Layout, rules_of
from headrace.engine.device_memory import explaining_out_of_memory
from headrace.engine.devices import resolve_device
from headrace.engine.engine_plan import resolve_max_model_len
from headrace.engine.kv_cache_spec import RankShape, kv_block_bytes, resolve_kv_cache_format
from headrace.engine.loaded_rank import LoadedRank
from headrace.engine.rank_exchanges import later_bytes, make_rank_exchanges
from headrace.engine.softmax import ChosenSoftmax, resolve_softmax
from headrace.engine.step_memory import measure_step_bytes
from headrace.engine.tune import LinearWeights, look_up, prepare_dataflow
from headrace.engine.tune_attention import attention_shape
from headrace.kernels import KernelChoice, Kernels, Recording, kernel_choice_from, resolve_kernels
from headrace.kernels.attention_tuning import ATTENTION
from headrace.kernels.prefill_tuning import PREFILL
from headrace.layers.context import LayerContext
from headrace.machine import cpu_limits
from headrace.models.boundary import Boundary
from headrace.models.decoder import Decoder
from headrace.models.loading import WeightFormats
from headrace.models.progress import bytes_progress
from headrace.models.source import ModelSource, load_decoder, open_model, resolve_formats
from headrace.parallel.captured import captured, counting_record
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.world import World

T = TypeVar("T")


def default_num_threads(config: EngineConfig, num_ranks_on_host: int) -> int:
    """Threads of one rank: those asked for, else this rank's share of the CPUs this process may use."""
    return config.num_threads or cpu_limits().threads_per_rank(num_ranks_on_host)


def rank_device(config: EngineConfig, world: World, choice: KernelChoice) -> torch.device:
    """The rank's own, which becomes that of this thread: Triton launches on no other.

    Raises:
        BackendUnavailable: a GPU was asked for that is not there.
    """
    chosen = resolve_device(config.device, choice, local_rank=world.local_rank, num_local_ranks=world.num_ranks_on_host)
    if chosen.device.type == "cuda":
        torch.cuda.set_device(chosen.device)
    return chosen.device


def load_rank(
    config: EngineConfig, folder: Path, world: World, *, change_kernels: Callable[[Kernels], Kernels] | None = None
) -> LoadedRank:
    """Read this rank's share of the weights. Sets the thread count of the kernels for this process.

    change_kernels: what the model calls instead of the ops themselves, to watch it at work.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: settings that do not fit the model.
    """
    started_s = time.monotonic()
    choice = kernel_choice_from()
    device = rank_device(config, world, choice)
    with explaining_out_of_memory("there is no room to begin", device):
        kernels = resolve_kernels(choice, device=device, batch_invariant=config.batch_invariant)
    if not config.graphs:
        kernels = replace(kernels, record=_run_unrecorded, pads_steps=False)
    if change_kernels is not None:
        kernels = change_kernels(kernels)
    place, show_progress = world.place, config.load.show_progress
    source = open_model(folder)
    shape = RankShape.of(source.config, place)
    formats = resolve_formats(source, config.load)
    max_model_len = resolve_max_model_len(config.scheduler, source.config)
    num_threads = default_num_threads(config, world.num_ranks_on_host)
    kernels.set_num_threads(num_threads)

    cache_format = resolve_kv_cache_format(config.cache, formats)
    softmax = resolve_softmax_of(config, kernels, folder, source.config, shape, cache_format, num_threads)
    if kernels.dataflow is not None:
        kernels.dataflow.max_pieces_from = softmax.max_pieces
        prefill = look_up(PREFILL, kernels, config.dataflow, num_threads).get(attention_shape(shape, cache_format))
        kernels.dataflow.prefill_library_from = None if prefill is None else prefill.min_library_tokens
    tp_group = world.fabric.make_group("tp", place.tp_ranks, kernels)
    pp_group = world.fabric.make_group("pp", place.pp_ranks, kernels)
    kv_group: Group = OneRankGroup("kv")
    if shape.share is not None:
        kv_group = world.fabric.make_group("kv", place.kv_ranks(source.config.attention.num_kv_heads), kernels)
    groups = (tp_group, pp_group, kv_group)
    kernels = replace(kernels, record=counting_record(kernels.record, groups))
    context = LayerContext(
        kernels=kernels,
        tp_group=tp_group,
        kv_group=kv_group,
        softmax=softmax.layers,
        partial_dtype=_partial_dtype(config.parallel.all_reduce_dtype),
        parallel=config.parallel,
    )
    with explaining_out_of_memory("the model does not fit", kernels.device):
        decoder = _load_with_progress(
            source, context, formats, max_model_len, shape.layers, world, show_progress=show_progress
        )
    linear_weights = LinearWeights.of_parameters(
        decoder.linear_parameters(with_experts=not kernels.has_expert_tiles), formats.dtype
    )
    with explaining_out_of_memory("there is no room to measure linear layers", kernels.device):
        prepare_dataflow(kernels, linear_weights, config.dataflow, num_threads, show_progress=show_progress)
    boundary = Boundary(
        config.parallel,
        kernels,
        tp_group,
        pp_group,
        hidden_size=source.config.hidden_size,
        dtype=formats.dtype,
        max_num_tokens=config.scheduler.max_num_batched_tokens,
        placement=source.config.norm.placement,
    )
    with explaining_out_of_memory("the model leaves no room for a step", kernels.device), captured(groups):
        step_bytes = measure_step_bytes(
            decoder,
            boundary,
            shape,
            cache_format,
            config.scheduler,
            max_model_len=max_model_len,
            block_size=config.cache.block_size,
        )
    exchanges = None
    if config.parallel.world_size > 1:
        layout = Layout(
            model=source.config,
            parallel=config.parallel,
            activation_bytes=formats.dtype.itemsize,
            rules=rules_of(config.parallel.transport),
        )
        with explaining_out_of_memory("there is no room for what ranks exchange", kernels.device), captured(groups):
            exchanges = make_rank_exchanges(layout, place, context, groups, config.scheduler, dtype=formats.dtype)
        world.check()
        step_bytes += later_bytes(groups, kernels.device)
    return LoadedRank(
        config=config,
        rank=place.rank,
        source=source,
        shape=shape,
        kernels=kernels,
        decoder=decoder,
        boundary=boundary,
        groups=groups,
        parallel=config.parallel,
        exchanges=exchanges,
        formats=formats,
        kv_cache_format=cache_format,
        softmax=softmax,
        linear_weights=linear_weights,
        num_threads=num_threads,
        max_model_len=max_model_len,
        block_bytes=kv_block_bytes(kernels, shape, cache_format, config.cache.block_size),
        weight_bytes=sum(parameter.num_bytes for parameter in decoder.parameters()),
        step_bytes=step_bytes,
        load_s=time.monotonic() - started_s,
    )


def resolve_softmax_of(
    config: EngineConfig,
    kernels: Kernels,
    folder: Path,
    model: ModelConfig,
    shape: RankShape,
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
        tuned=look_up(ATTENTION, kernels, config.dataflow, num_threads).get(attention_shape(shape, cache_format)),
    )


def _run_unrecorded(forward: Callable[[], T]) -> tuple[T, Recording]:
    return forward(), Recording(obstacle="graphs are switched off")


def _partial_dtype(choice: AllReduceDtype) -> torch.dtype | None:
    match choice:
        case AllReduceDtype.FLOAT32:
            return torch.float32
        case AllReduceDtype.BFLOAT16:
            return torch.bfloat16
        case AllReduceDtype.AUTO | AllReduceDtype.INT8:
            return None


def _load_with_progress(
    source: ModelSource,
    context: LayerContext,
    formats: WeightFormats,
    max_model_len: int,
    layers: range,
    world: World,
    *,
    show_progress: bool,
) -> Decoder:
    # About what one rank reads: a bar need not know which tensors are not cut.
    total_bytes = source.checkpoint_bytes // world.place.config.world_size
    with bytes_progress("loading weights", total_bytes, show_progress) as show:

        def progress(num_bytes: int) -> None:
            # Loading takes minutes: where another rank is lost, there is no point in going on.
            world.check()
            show(num_bytes)

        return load_decoder(
            source, context, formats, max_model_len=max_model_len, progress=progress, layer_range=layers
        )
