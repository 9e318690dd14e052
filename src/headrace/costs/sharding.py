"""Which part of a dimension each rank holds. Pure arithmetic, tested as a partition for every size."""

from headrace.errors import ParallelismError

FEATURE_GROUP_SIZE = 32
"""Features that share a scale in integer weights; equal to `kernels.QUANTIZATION_GROUP_SIZE`."""

VOCABULARY_UNIT = 16
"""Token ids that are never divided among ranks."""


def shard_range(num_units: int, rank: int, world_size: int) -> range:
    """Units [start, stop) of rank `rank`: contiguous, in rank order, sizes differing by at most one (larger first)."""
    base, extra = divmod(num_units, world_size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


def shard_features(num_features: int, rank: int, world_size: int) -> range:
    """Features of a dimension that weights are summed along: whole groups of 32, which share a quantization scale, as
    long as each rank gets one; so that quantized weights are the same however they are cut."""
    num_groups = num_features // FEATURE_GROUP_SIZE
    if num_groups < world_size:
        return shard_range(num_features, rank, world_size)
    groups = shard_range(num_groups, rank, world_size)
    stop = num_features if rank == world_size - 1 else groups.stop * FEATURE_GROUP_SIZE
    return range(groups.start * FEATURE_GROUP_SIZE, stop)


def shard_vocabulary(vocab_size: int, rank: int, world_size: int) -> range:
    """Token ids whose embedding and logits a rank holds: whole panels of 16, the unit in which weights are packed.

    The largest shard is rank 0's. A vocabulary of fewer panels than ranks leaves the last ranks without tokens.
    """
    panels = shard_range(-(-vocab_size // VOCABULARY_UNIT), rank, world_size)
    return range(min(panels.start * VOCABULARY_UNIT, vocab_size), min(panels.stop * VOCABULARY_UNIT, vocab_size))


def vocabulary_shard_sizes(vocab_size: int, world_size: int) -> list[int]:
    return [len(shard_vocabulary(vocab_size, rank, world_size)) for rank in range(world_size)]


def shard_kv_heads(num_kv_heads: int, rank: int, world_size: int) -> range:
    """KV heads of a rank: split while there are enough of them, else each head is held by several ranks."""
    if world_size <= num_kv_heads:
        return shard_range(num_kv_heads, rank, world_size)
    head = rank * num_kv_heads // world_size
    return range(head, head + 1)


def check_heads_divide(num_heads: int, num_kv_heads: int, world_size: int) -> None:
    """Raise unless query heads split evenly and KV heads split or replicate evenly over `world_size` ranks.

    Raises:
        ParallelismError: names the sizes that work.
    """
    working = [size for size in range(1, num_heads + 1) if _divides(num_heads, num_kv_heads, size)]
    if world_size not in working:
        raise ParallelismError(
            f"tensor_parallel_size {world_size} does not divide {num_heads} attention heads "
            f"and {num_kv_heads} KV heads; sizes that work: {', '.join(map(str, working))}"
        )


def _divides(num_heads: int, num_kv_heads: int, size: int) -> bool:
    return num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)


def stage_layers(num_layers: int, num_stages: int, pipeline_layers: tuple[int, ...] | None = None) -> list[range]:
    """Layers of each pipeline stage, in order; evenly unless their numbers are given.

    Raises:
        ParallelismError: more stages than layers, or numbers that do not add up to num_layers.
    """
    if num_stages > num_layers:
        raise ParallelismError(
            f"pipeline_parallel_size {num_stages} is more than the model's {num_layers} layers; "
            f"sizes that work: 1 to {num_layers}"
        )
    if pipeline_layers is None:
        return [shard_range(num_layers, stage, num_stages) for stage in range(num_stages)]
    if sum(pipeline_layers) != num_layers:
        raise ParallelismError(
            f"pipeline_layers {','.join(map(str, pipeline_layers))} add up to {sum(pipeline_layers)}; "
            f"the model has {num_layers} layers"
        )
    starts = [sum(pipeline_layers[:stage]) for stage in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, pipeline_layers, strict=True)]
