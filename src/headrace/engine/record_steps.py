"""Decode steps recorded before the first request, where recording one takes so long that a request would notice."""

import logging

from headrace.engine.decode_step import DecodeStep
from headrace.engine.tune import measuring_progress

logger = logging.getLogger(__name__)


def record_steps(step: DecodeStep, budget_s: float, *, show_progress: bool) -> None:
    """Record all sizes of a step, within a time; what cannot be done is said in the log."""
    buckets = step.sizes.buckets
    if not buckets:
        return
    with measuring_progress("recording decode steps", len(buckets), show_progress) as on_start:
        left = step.record(budget_s, lambda size: on_start(f"{size} sequences"))
    if step.obstacle is not None:
        logger.warning("decode steps are asked for op by op: %s", step.obstacle)
    elif left:
        logger.warning(
            "decode steps of %s sequences are recorded when they are first met: %g s were spent on larger ones; raise "
            "graph_budget_s (--graph-budget) to record them all at start",
            ", ".join(map(str, left)),
            budget_s,
        )
