"""The object that `/stats` answers with."""

import time
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any

from headrace import __version__
from headrace.engine.choices import dataflow_choice, layout_choice, softmax_choice
from headrace.engine.load import LoadedModel
from headrace.engine.metrics import EngineStatistics, RequestMetrics
from headrace.engine.rank_statistics import ExchangeTotals
from headrace.server.context import ServerContext
from headrace.server.errors import Unavailable


def build_stats(
    context: ServerContext, statistics: EngineStatistics | None, recent: Sequence[RequestMetrics]
) -> dict[str, Any]:
    """
    statistics: None before the engine was ready; then what only it knows is null.
    recent: requests that latencies are taken from, oldest first.
    """
    engine = context.engine
    try:
        model = context.model
    except Unavailable:
        model = None
    return {
        "model": context.model_name,
        "version": __version__,
        "uptime_s": time.time() - context.created_s,
        "state": "draining" if engine.is_draining else engine.state.value,
        "trouble": engine.trouble,
        "ttft_s": _percentiles(recent, lambda metrics: metrics.ttft_s),
        "tpot_s": _percentiles(recent, lambda metrics: metrics.tpot_s),
        **(_NOTHING if statistics is None or model is None else _of_engine(model, statistics)),
    }


_NOTHING = dict.fromkeys(
    (
        *("num_running", "num_waiting", "max_num_seqs", "max_model_len", "kv_blocks", "tokens", "prefix_cache"),
        *("num_preemptions", "time_s", "communication", "softmax", "dataflow", "layout"),
    )
)


def _of_engine(model: LoadedModel, statistics: EngineStatistics) -> dict[str, Any]:
    metrics = statistics.metrics
    return {
        "max_num_seqs": model.plan.scheduler.max_num_seqs,
        "max_model_len": model.plan.max_model_len,
        "num_running": metrics.num_running,
        "num_waiting": metrics.num_waiting,
        "kv_blocks": {
            "total": metrics.num_blocks,
            "used": metrics.num_used_blocks,
            "block_size": model.plan.cache.block_size,
        },
        "tokens": {"prompt": metrics.num_prompt_tokens, "generation": metrics.num_generation_tokens},
        "prefix_cache": {"queried": metrics.prefix_query_tokens, "hit": metrics.prefix_hit_tokens},
        "num_preemptions": metrics.num_preemptions,
        "time_s": {
            "compute": statistics.compute_s,
            "communication": statistics.exchange_s,
            "waiting": statistics.waiting_s,
        },
        "communication": [_exchange(exchange) for exchange in statistics.exchanges],
        "softmax": {
            "schemes": softmax_choice(model),
            "rows": statistics.num_softmax_rows,
            "recomputed_rows": statistics.num_recomputed_rows,
        },
        "dataflow": dataflow_choice(model),
        "layout": layout_choice(model),
    }


def _exchange(exchange: ExchangeTotals) -> dict[str, Any]:
    return {
        "group": exchange.group,
        "operation": exchange.operation,
        "phase": exchange.phase.value,
        "calls": exchange.counted.num_calls,
        "payload_bytes": exchange.counted.payload_bytes,
        "wire_bytes": exchange.counted.wire_bytes,
        "predicted_calls": exchange.predicted.num_calls,
        "predicted_payload_bytes": exchange.predicted.payload_bytes,
        "predicted_wire_bytes": exchange.predicted.wire_bytes,
    }


def _percentiles(
    recent: Sequence[RequestMetrics], seconds_of: Callable[[RequestMetrics], float | None]
) -> dict[str, float | None]:
    """The last one's, the median, and what 95 % of requests stay below."""
    seconds = [value for value in map(seconds_of, recent) if value is not None]
    if not seconds:
        return {"last": None, "p50": None, "p95": None}
    if len(seconds) == 1:
        return dict.fromkeys(("last", "p50", "p95"), seconds[0])
    steps = quantiles(seconds, n=20, method="inclusive")
    return {"last": seconds[-1], "p50": steps[9], "p95": steps[18]}
