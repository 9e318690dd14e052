"""One rank's part of a model in memory: from there to a worker, once all ranks agree on the cache."""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.cache.kv_pool import KvPool
from headrace.config import EngineConfig, KvCacheFormat, ParallelConfig
from headrace.engine.device_memory import explaining_out_of_memory
from headrace.engine.kv_cache_spec import RankShape, kv_cache_spec
from headrace.engine.rank_exchanges import RankExchanges
from headrace.engine.record_steps import record_steps
from headrace.engine.runner import ModelRunner
from headrace.engine.softmax import ChosenSoftmax
from headrace.engine.step_sizes import bucket_sizes, exact_sizes
from headrace.engine.tune import LinearWeights
from headrace.engine.worker import Worker
from headrace.kernels import Kernels
from headrace.models.boundary import Boundary
from headrace.models.decoder import Decoder
from headrace.models.loading import WeightFormats
from headrace.models.source import ModelSource
from headrace.parallel.captured import captured
from headrace.parallel.group import Group


@dataclass(frozen=True, kw_only=True)
class LoadedRank:
    """groups: tp, pp and kv; exchanges: None without other ranks. weight_bytes: weights in memory; step_bytes: what
    steps take of a GPU beside them; block_bytes: of a cache block on all layers of this rank; load_s: so far."""

    config: EngineConfig
    rank: int
    source: ModelSource
    shape: RankShape
    kernels: Kernels
    decoder: Decoder
    boundary: Boundary
    groups: tuple[Group, ...]
    parallel: ParallelConfig
    exchanges: RankExchanges | None
    formats: WeightFormats
    kv_cache_format: KvCacheFormat
    softmax: ChosenSoftmax
    linear_weights: LinearWeights
    num_threads: int
    max_model_len: int
    block_bytes: int
    weight_bytes: int
    step_bytes: int
    load_s: float

    def make_worker(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        all_agree: Callable[[bool], bool],
    ) -> Worker:
        """all_agree: whether all ranks say so."""
        spec = kv_cache_spec(self.shape, self.kv_cache_format, num_blocks=num_blocks, block_size=block_size)
        with explaining_out_of_memory("the KV cache does not fit", self.kernels.device):
            pool = KvPool(self.kernels, spec, num_layers=len(self.shape.layers))
        config = self.config
        sizes = bucket_sizes(config.scheduler.max_num_seqs) if self.kernels.pads_steps else exact_sizes()
        runner = ModelRunner(self.decoder, pool, max_model_len, self.boundary, self.shape.share, sizes)
        # No plan asks for what is exchanged here.
        with (
            explaining_out_of_memory("the KV cache leaves no room for a step", self.kernels.device),
            captured(self.groups),
        ):
            record_steps(
                runner.decode_step,
                config.graph_budget_s,
                show_progress=config.load.show_progress,
                all_agree=all_agree if config.parallel.world_size > 1 else None,
            )
        tp_group, gathers_logits = self.groups[0], self.parallel.gather_logits
        return Worker(
            runner,
            eos_token_ids,
            self.groups,
            tp_group=tp_group,
            gathers_logits=gathers_logits,
            exchanges=self.exchanges,
        )
