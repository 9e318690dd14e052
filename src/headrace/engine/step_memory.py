"""What steps take of a GPU's memory beside weights and cache: measured, by running the largest ones."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from headrace.cache.kv_pool import KvPool
from headrace.config import KvCacheFormat, SchedulerConfig
from headrace.costs.memory import num_blocks_for
from headrace.engine.device_memory import peak_bytes
from headrace.engine.kv_cache_spec import RankShape, kv_cache_spec
from headrace.engine.prompt_scores import PROMPT_LOGITS_ROWS
from headrace.engine.rows import Row
from headrace.engine.runner import ModelRunner
from headrace.engine.step_sizes import StepSizes, bucket_sizes
from headrace.models.boundary import Boundary
from headrace.models.decoder import Decoder

_FILLED_UP_TO = (64, 16)

_GRAPH_BYTES = 16 * 2**20
"""For each size that is recorded: what the driver keeps of two graphs, generously."""


def measure_step_bytes(
    decoder: Decoder,
    boundary: Boundary,
    shape: RankShape,
    cache_format: KvCacheFormat,
    scheduler: SchedulerConfig,
    *,
    max_model_len: int,
    block_size: int,
) -> int:
    """Memory of the largest prefill, and of graphs of all decode steps, if steps are recorded; 0 on the CPU, where
    pages are claimed as they are touched.

    Runs steps: all ranks that work together do so.
    """
    device = decoder.kernels.device
    if device.type == "cpu":
        return 0
    run = partial(run_largest_step, decoder, boundary, shape, cache_format, block_size=block_size)
    for rows in warm_up_rows(scheduler, max_model_len, block_size):
        run(rows, num_logits=1)
    num_logits = max(scheduler.max_num_seqs, PROMPT_LOGITS_ROWS)
    largest = (prompt_rows(scheduler, max_model_len, block_size), mixed_rows(scheduler, max_model_len, block_size))
    step_bytes = max(peak_bytes(device, partial(run, rows, num_logits=num_logits)) for rows in largest)
    if not decoder.kernels.pads_steps:
        return step_bytes
    decodes = decode_rows(scheduler.max_num_seqs, max_model_len, block_size)
    # Graphs have a pool of their own; what comes out of each stays there.
    graph_bytes = peak_bytes(device, lambda: run(decodes, num_logits=scheduler.max_num_seqs))
    sizes = bucket_sizes(scheduler.max_num_seqs).buckets
    return step_bytes + graph_bytes + len(sizes) * _GRAPH_BYTES + sum(sizes) * _output_bytes(decoder)


def prompt_rows(scheduler: SchedulerConfig, max_model_len: int, block_size: int) -> list[Row]:
    """As many prompt tokens as a step may have, in as few sequences as may hold them. All lie in block 0."""
    rows: list[Row] = []
    left = scheduler.max_num_batched_tokens
    while left and len(rows) < scheduler.max_num_seqs:
        num_tokens = min(left, max_model_len)
        left -= num_tokens
        table = np.zeros(num_blocks_for(num_tokens, block_size), np.int32)
        rows.append(Row([0] * num_tokens, 0, table))
    return rows


def decode_rows(num_seqs: int, max_model_len: int, block_size: int) -> list[Row]:
    """With tables as wide as those of a recorded step, for whose length attention keeps partial results."""
    return [Row([0], 0, np.zeros(num_blocks_for(max_model_len, block_size), np.int32))] * num_seqs


def mixed_rows(scheduler: SchedulerConfig, max_model_len: int, block_size: int) -> list[Row]:
    """As many sequences as a step may have, all but one of which decode."""
    decodes = decode_rows(scheduler.max_num_seqs - 1, max_model_len, block_size)
    num_tokens = min(scheduler.max_num_batched_tokens - len(decodes), max_model_len)
    return [*decodes, Row([0] * num_tokens, 0, np.zeros(num_blocks_for(max_model_len, block_size), np.int32))]


def warm_up_rows(scheduler: SchedulerConfig, max_model_len: int, block_size: int) -> Iterator[list[Row]]:
    """Steps whose kernels no largest step needs: of as many tokens as flat GEMM fills batches up to, with a prompt
    beside a sequence that decodes. So nothing is compiled while a request waits."""
    for num_tokens in _FILLED_UP_TO:
        num_tokens = min(num_tokens, scheduler.max_num_batched_tokens, max_model_len)
        table = np.zeros(num_blocks_for(num_tokens, block_size), np.int32)
        rows = [Row([0] * max(1, num_tokens - 1), 0, table), Row([0], 0, table)]
        yield rows[: scheduler.max_num_seqs]


def run_largest_step(
    decoder: Decoder,
    boundary: Boundary | None,
    shape: RankShape,
    cache_format: KvCacheFormat,
    rows: list[Row],
    *,
    block_size: int,
    num_logits: int,
) -> None:
    """With a cache of one block: what it computes is of no use."""
    num_blocks = 1 if shape.share is None else shape.share.world_size
    spec = kv_cache_spec(shape, cache_format, num_blocks=num_blocks, block_size=block_size)
    pool = KvPool(decoder.kernels, spec, num_layers=len(shape.layers))
    runner = ModelRunner(decoder, pool, block_size, boundary, shape.share, StepSizes(largest=0))
    hidden_states = runner.run(rows)
    if runner.has_head:
        with torch.inference_mode():
            runner.logits(hidden_states[:num_logits])


def _output_bytes(decoder: Decoder) -> int:
    """Of one row of a recorded step."""
    logits = 0 if decoder.lm_head is None else 4 * decoder.lm_head.matrix.local_rows
    return logits + 4 * decoder.config.hidden_size
