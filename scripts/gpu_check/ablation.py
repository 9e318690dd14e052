"""The three ideas of FlashDecoding++ in one loaded model: each switched off in turn, none of them, and each on alone;
see `headrace.bench.ablation`."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.bench.ablation import load_switchboard, measure_ablation
from headrace.bench.ablation_variants import VARIANTS
from headrace.bench.model import BATCH_CONTEXT_LEN, BenchSettings
from headrace.config import CacheConfig, Device, Dtype, EngineConfig, LoadConfig, SchedulerConfig
from scripts.gpu_check.checkpoint import random_checkpoint
from scripts.gpu_check.context import Context
from scripts.gpu_check.figures import Figure

_STEPS_OF_A_TURN = 8


def measure(context: Context) -> Iterator[Figure]:
    """Weights as they are stored; int8 and int4 take the same paths with less to read."""
    scale = context.scale
    switchboard = load_switchboard(
        EngineConfig(
            load=LoadConfig(
                model=str(random_checkpoint(context)), dtype=Dtype(str(context.dtype).removeprefix("torch."))
            ),
            cache=CacheConfig(kv_cache_bytes=scale.kv_cache_bytes),
            scheduler=SchedulerConfig(
                max_num_seqs=max([1, *scale.ablation_batches]),
                max_num_batched_tokens=max([*scale.ablation_contexts, 64]),
                max_model_len=max(scale.ablation_contexts) + 1024,
            ),
            device=Device.parse(str(context.device)),
            num_threads=scale.num_threads,
        )
    )
    settings = BenchSettings(
        decode_tokens=min(_STEPS_OF_A_TURN, scale.model_steps),
        context_lens=scale.ablation_contexts,
        batch_sizes=scale.ablation_batches,
        num_rounds=scale.num_rounds,
    )
    speeds = measure_ablation(switchboard, settings, lambda _: None)
    for variant in VARIANTS:
        speed = speeds[variant.key]
        cases = {(1, n): seconds for n, seconds in speed.decode_step_s.items()}
        cases |= {(size, BATCH_CONTEXT_LEN): seconds for size, seconds in speed.batch_step_s.items()}
        for (batch, context_len), seconds in cases.items():
            labels: dict[str, str | int] = {
                "variant": variant.key,
                "label": variant.label,
                "baseline": variant.baseline.key,
                "batch": batch,
                "context": context_len,
            }
            yield Figure(group="ablation", labels=labels, seconds=seconds, num_tokens=batch)
