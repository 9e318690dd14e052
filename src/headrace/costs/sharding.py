"""Which part of a dimension each rank holds. Pure arithmetic, tested as a partition for every size."""

from headrace.errors import ParallelismError


def shard_range(num_units: int, rank: int, world_size: int) -> range:
    """Units [start, stop) of rank `rank`: contiguous, in rank order, sizes differing by at most one (larger first)."""
    base, extra = divmod(num_units, world_size)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


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
