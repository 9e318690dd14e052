"""`/metrics` for Prometheus, `/stats` for people and the page."""

from typing import Any

from fastapi import APIRouter, Request, Response

from headrace.server.context import Context
from headrace.server.observability import Observed
from headrace.server.stats import build_stats

router = APIRouter()


_TEXT: dict[str, Any] = {"content": {"text/plain": {}, "application/openmetrics-text": {}}}


@router.get("/metrics", response_class=Response, responses={200: _TEXT})
async def show_metrics(request: Request, observed: Observed) -> Response:
    """Counters, gauges and histograms, in Prometheus' text format or as OpenMetrics: see docs/metrics.md."""
    body, content_type = await observed.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})


@router.get("/stats")
async def show_stats(context: Context, observed: Observed) -> dict[str, Any]:
    """The same for people, with what was chosen when the model was loaded; null is what is not known yet."""
    return build_stats(context, await observed.metrics.look(), observed.metrics.recent)
