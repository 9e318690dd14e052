"""Decode steps recorded before the first request, where recording one takes so long that a request would notice."""

import logging

from headrace.engine.decode_step import DecodeStep
from headrace.engine.tune import measuring_progress
from headrace.errors import BackendUnavailable

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


def check_recorded(step: DecodeStep) -> None:
    """One of several ranks: what exchanges in a recording meets no rank that exchanges outside of one (NCCL's user
    guide, "Using NCCL with CUDA Graphs"), so that one that cannot record its steps would keep the others waiting.

    Raises:
        BackendUnavailable: steps that should have been recorded at start are not.
    """
    if step.sizes.buckets and step.obstacle is not None:
        raise BackendUnavailable(
            f"decode steps cannot be recorded: {step.obstacle}; ranks record them all or none: switch recordings off "
            "(--no-graphs, graphs=False)"
        )
