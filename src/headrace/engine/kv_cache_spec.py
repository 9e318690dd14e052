"""What the KV cache of one layer must hold on one rank, and what a block of it takes there."""

from dataclasses import dataclass

from headrace.cache.kv_share import KvShare
from headrace.config import CacheConfig, KvCacheDtype, KvCacheFormat, ModelConfig
from headrace.costs.sharding import check_heads_divide, shard_kv_heads, stage_layers
from headrace.kernels import Kernels, KvCacheSpec
from headrace.models.loading import WeightFormats
from headrace.parallel.place import Place


@dataclass(frozen=True, kw_only=True)
class RankShape:
    """What of a model one rank holds: its stage's layers, its heads of each.

    share: the cache blocks it has of its KV head, if other ranks have some of them.
    """

    layers: range
    num_heads: int
    num_kv_heads: int
    head_dim: int
    share: KvShare | None = None

    @classmethod
    def of(cls, model: ModelConfig, place: Place) -> "RankShape":
        """
        Raises:
            ParallelismError: a layout that does not divide the model.
        """
        attention, parallel = model.attention, place.config
        size = parallel.tensor_parallel_size
        check_heads_divide(attention.num_heads, attention.num_kv_heads, size)
        stages = stage_layers(model.num_hidden_layers, parallel.pipeline_parallel_size, parallel.pipeline_layers)
        return cls(
            layers=stages[place.stage],
            num_heads=attention.num_heads // size,
            num_kv_heads=len(shard_kv_heads(attention.num_kv_heads, place.tp_rank, size)),
            head_dim=attention.head_dim,
            share=_share(place, attention.num_kv_heads),
        )


def _share(place: Place, num_kv_heads: int) -> KvShare | None:
    ranks = place.kv_ranks(num_kv_heads)
    if not place.config.kv_sharding.splits_contexts or len(ranks) == 1:
        return None
    return KvShare(rank=ranks.index(place.rank), world_size=len(ranks))


def resolve_kv_cache_format(config: CacheConfig, formats: WeightFormats) -> KvCacheFormat:
    if config.kv_cache_dtype is KvCacheDtype.AUTO:
        return KvCacheFormat(formats.dense.value)
    return KvCacheFormat(config.kv_cache_dtype.value)


def kv_cache_spec(shape: RankShape, cache_format: KvCacheFormat, *, num_blocks: int, block_size: int) -> KvCacheSpec:
    """num_blocks: of the whole cache; those of other ranks take no room here."""
    if shape.share is not None:
        num_blocks = shape.share.num_local_blocks(num_blocks)
    return KvCacheSpec(
        cache_format=cache_format,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )


def kv_block_bytes(kernels: Kernels, shape: RankShape, cache_format: KvCacheFormat, block_size: int) -> int:
    """What one block of the whole cache takes on a rank, on all its layers, padding included; on average and rounded up
    where each rank has some of the blocks."""
    num_ranks = 1 if shape.share is None else shape.share.world_size
    spec = kv_cache_spec(shape, cache_format, num_blocks=num_ranks, block_size=block_size)
    return -(-len(shape.layers) * kernels.kv_cache_num_bytes(spec) // num_ranks)
