"""From settings and a machine to what will run: decided once, then only read."""

from dataclasses import dataclass, replace

from headrace.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from headrace.config.engine import HOST_MEMORY_FRACTION
from headrace.costs.memory import num_blocks_for
from headrace.errors import ConfigError, ContextLengthError


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """scheduler: with max_model_len filled in; num_blocks blocks of cache.block_size tokens, kv_cache_bytes in all.

    remarks: defaults that gave way to the machine.
    """

    scheduler: SchedulerConfig
    cache: CacheConfig
    num_blocks: int
    kv_cache_bytes: int
    num_threads: int
    remarks: tuple[str, ...] = ()

    @property
    def max_model_len(self) -> int:
        assert self.scheduler.max_model_len is not None
        return self.scheduler.max_model_len


def resolve_max_model_len(config: SchedulerConfig, model: ModelConfig) -> int:
    """The longest sequence the engine runs: the model's, or a shorter one, or up to a rotary scaling's factor more.

    Raises:
        ContextLengthError: longer than the model's positions reach.
    """
    limit = model.max_position_embeddings
    scalings = [layer.rope.scaling for layer in model.layers if layer.rope is not None and layer.rope.scaling]
    reach = max([limit, *(int(s.factor * s.original_max_position_embeddings) for s in scalings)])
    wanted = limit if config.max_model_len is None else config.max_model_len
    if wanted > reach:
        raise ContextLengthError(f"max_model_len is {wanted}, but the model's positions reach {reach}")
    return wanted


def resolve_plan(
    config: EngineConfig,
    *,
    max_model_len: int,
    block_bytes: int,
    available_bytes: int,
    num_threads: int,
    memory_fraction: float = HOST_MEMORY_FRACTION,
) -> EnginePlan:
    """Size the KV cache.

    block_bytes: of one block on all layers, as the kernels lay it out.
    available_bytes: memory free for this process after the weights are loaded.
    memory_fraction: of that, where the settings do not say.

    Raises:
        ConfigError: the cache could not hold one sequence of a length that was asked for.
    """
    block_size, fraction = config.cache.block_size, config.cache.memory_fraction or memory_fraction
    num_useful = config.scheduler.max_num_seqs * num_blocks_for(max_model_len, block_size)
    remarks: tuple[str, ...] = ()
    num_blocks = config.cache.num_blocks
    if num_blocks is None:
        budget_bytes = config.cache.kv_cache_bytes or int(available_bytes * fraction)
        num_blocks = min(num_useful, budget_bytes // block_bytes)
        if num_blocks * block_size < max_model_len:
            if num_blocks == 0 or _was_asked_for(config):
                raise ConfigError(_too_small(max_model_len, num_blocks, block_size, block_bytes))
            remarks = (
                f"max_model_len is {num_blocks * block_size} instead of {max_model_len}: the KV cache gets "
                f"{num_blocks * block_bytes} bytes, {fraction:.0%} of the memory that is free",
            )
            max_model_len = num_blocks * block_size
    if num_blocks * block_bytes > available_bytes:
        raise ConfigError(
            f"the KV cache would take {num_blocks * block_bytes} bytes, but {available_bytes} are free; "
            f"give it at most {available_bytes // block_bytes} blocks"
        )
    return EnginePlan(
        scheduler=replace(config.scheduler, max_model_len=max_model_len),
        cache=config.cache,
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * block_bytes,
        num_threads=num_threads,
        remarks=remarks,
    )


def _was_asked_for(config: EngineConfig) -> bool:
    """A length or a budget of the user's own is kept or refused, never bent; a default gives way."""
    return config.scheduler.max_model_len is not None or config.cache.kv_cache_bytes is not None


def _too_small(max_model_len: int, num_blocks: int, block_size: int, block_bytes: int) -> str:
    needed = num_blocks_for(max_model_len, block_size)
    shorter = f" or set --max-model-len to at most {num_blocks * block_size}" if num_blocks else ""
    return (
        f"the KV cache has room for {num_blocks * block_size} tokens ({num_blocks} blocks of {block_bytes} bytes), "
        f"too few for one sequence of max_model_len {max_model_len}; give it {needed * block_bytes} bytes "
        f"(--kv-cache-bytes){shorter}"
    )
