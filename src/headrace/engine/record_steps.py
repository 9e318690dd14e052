"""Decode steps recorded before the first request, where recording one takes so long that a request would notice."""

import logging
from collections.abc import Callable, Sequence

from headrace.engine.decode_step import DecodeStep
from headrace.engine.tune import measuring_progress

logger = logging.getLogger(__name__)


def record_steps(
    step: DecodeStep, budget_s: float, *, show_progress: bool, all_agree: Callable[[bool], bool] | None = None
) -> None:
    """Record all sizes of a step, within a time; what cannot be done is said in the log. See `DecodeStep.record`."""
    buckets = step.sizes.buckets
    if not buckets:
        return
    with measuring_progress("recording decode steps", len(buckets), show_progress) as on_start:
        left = step.record(budget_s, lambda size: on_start(f"{size} sequences"), all_agree)
    if not left:
        return
    if step.obstacle is not None:
        logger.warning("decode steps of %s sequences are asked for op by op: %s", _listed(left), step.obstacle)
    else:
        logger.warning(
            "decode steps of %s sequences are %s: %g s were spent on others; raise graph_budget_s (--graph-budget) to "
            "record them all at start",
            _listed(left),
            "recorded when they are first met" if all_agree is None else _what_runs_instead(step),
            budget_s,
        )


def _what_runs_instead(step: DecodeStep) -> str:
    buckets = step.sizes.buckets
    return f"filled up to a size that is recorded ({_listed(buckets)})" if buckets else "asked for op by op"


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
