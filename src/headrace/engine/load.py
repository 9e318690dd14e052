"""From a model's name to what an engine runs."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace.config import EngineConfig, KvCacheFormat, ModelConfig, ParallelConfig
from headrace.config.launched import launched_from
from headrace.engine.agreement import agree, announce, tightest_host
from headrace.engine.device_memory import default_memory_fraction
from headrace.engine.engine_plan import EnginePlan, resolve_plan
from headrace.engine.executor import Executor
from headrace.engine.kv_cache_spec import RankShape
from headrace.engine.load_rank import load_rank
from headrace.engine.local_executor import LocalExecutor
from headrace.engine.rank_process import serve_launched
from headrace.engine.ranked_executor import RankedExecutor
from headrace.engine.softmax import ChosenSoftmax
from headrace.engine.start import resolve_transport, start_world
from headrace.engine.tune import LinearWeights
from headrace.engine.tune_mixture import ModelMixtures
from headrace.errors import CheckpointError
from headrace.kernels import Kernels
from headrace.models.config_file import read_config_file
from headrace.models.json_file import read_json
from headrace.models.loading import WeightFormats
from headrace.models.model_folder import resolve_model_folder
from headrace.models.source import ModelSource
from headrace.tokenizer import ChatTemplate, Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What an engine runs.

    shape: what rank 0 holds of the model, which without other ranks is all of it; kernels, linear_weights, mixtures:
        its own.
    tokenizer: None if the folder has none, and then prompts are token ids; tokenizer_error says why.
    weight_bytes: weights in memory, of all ranks; load_s: from opening the folder to ready.
    """

    config: ModelConfig
    shape: RankShape
    plan: EnginePlan
    parallel: ParallelConfig
    executor: Executor
    kernels: Kernels
    formats: WeightFormats
    kv_cache_format: KvCacheFormat
    softmax: ChosenSoftmax
    linear_weights: LinearWeights
    mixtures: ModelMixtures | None
    tokenizer: Tokenizer | None
    tokenizer_error: str | None
    chat_template: ChatTemplate | None
    eos_token_ids: frozenset[int]
    generation_config: dict[str, Any]
    weight_bytes: int
    num_ranks_on_host: int
    load_s: float


def load_model(config: EngineConfig, *, change_kernels: Callable[[Kernels], Kernels] | None = None) -> LoadedModel:
    """Resolve the folder, start the other ranks, load the weights, size the cache.

    change_kernels: what rank 0 calls instead of the ops themselves, to watch it at work.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: settings that do not fit the model or the machine.
        OutOfDeviceMemory: weights or cache that do not fit the GPU.
        RankError: another rank could not load its part.
        SystemExit: in a process that a launcher has started as another rank than 0, once that rank has ended.
    """
    started_s = time.monotonic()
    launched = launched_from() if config.parallel.world_size > 1 else None
    if launched is not None and launched.rank > 0:
        serve_launched(config)
    files = _ModelFiles.read(config)
    config = resolve_transport(replace(config, load=replace(config.load, model=str(files.folder))))
    world = start_world(config)
    try:
        loaded = load_rank(config, files.folder, world, change_kernels=change_kernels)
        reports = agree(world, loaded)
        block_bytes, available_bytes = tightest_host(reports)
        plan = resolve_plan(
            config,
            max_model_len=loaded.max_model_len,
            block_bytes=block_bytes,
            available_bytes=available_bytes,
            num_threads=loaded.num_threads,
            memory_fraction=default_memory_fraction(loaded.kernels.device),
        )
        for remark in plan.remarks:
            logger.warning(remark)
        eos_token_ids = files.eos_token_ids(loaded.source)
        agreement = {
            "num_blocks": plan.num_blocks,
            "block_size": plan.cache.block_size,
            "max_model_len": plan.max_model_len,
        }
        announce(world, agreement | {"eos_token_ids": sorted(eos_token_ids)})
        worker = loaded.make_worker(**agreement, eos_token_ids=eos_token_ids, all_agree=world.all_agree)
    except BaseException as error:
        world.fail(error)
        world.close()
        raise
    return LoadedModel(
        config=loaded.source.config,
        shape=loaded.shape,
        plan=plan,
        parallel=config.parallel,
        executor=LocalExecutor(worker) if config.parallel.world_size == 1 else RankedExecutor(world, worker),
        kernels=loaded.kernels,
        formats=loaded.formats,
        kv_cache_format=loaded.kv_cache_format,
        softmax=loaded.softmax,
        linear_weights=loaded.linear_weights,
        mixtures=ModelMixtures.of(loaded.decoder, loaded.formats.dtype),
        tokenizer=files.tokenizer,
        tokenizer_error=files.tokenizer_error,
        chat_template=ChatTemplate.from_folder(files.folder) if files.tokenizer else None,
        eos_token_ids=eos_token_ids,
        generation_config=files.generation_config,
        weight_bytes=sum(report.weight_bytes for report in reports),
        num_ranks_on_host=world.num_ranks_on_host,
        load_s=time.monotonic() - started_s,
    )


@dataclass(frozen=True, kw_only=True)
class _ModelFiles:
    """What rank 0 alone reads of a model's folder."""

    folder: Path
    tokenizer: Tokenizer | None
    tokenizer_error: str | None
    generation_config: dict[str, Any]

    @classmethod
    def read(cls, config: EngineConfig) -> "_ModelFiles":
        load = config.load
        folder = resolve_model_folder(load.model, load.revision, load.show_progress)
        read_config_file(str(folder))  # a folder that is no model is refused for that, not for its tokenizer
        tokenizer, tokenizer_error = _load_tokenizer(folder, is_required=load.require_tokenizer)
        return cls(
            folder=folder,
            tokenizer=tokenizer,
            tokenizer_error=tokenizer_error,
            generation_config=_optional_json(folder / "generation_config.json"),
        )

    def eos_token_ids(self, source: ModelSource) -> frozenset[int]:
        """All that the model's files call end of sequence: config.json, generation_config.json (one or several each),
        and the tokenizer."""
        ids = _token_ids(source.hf_config, "config.json")
        ids |= _token_ids(self.generation_config, "generation_config.json")
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)


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


def _token_ids(config: Mapping[str, Any], file_name: str) -> set[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"{file_name}: eos_token_id is {value!r:.80}; it must be a token id or a list of them")
    return set(ids)
