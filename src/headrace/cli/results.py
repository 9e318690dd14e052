"""Finished requests as JSON and as lines of figures."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from headrace.cli.terminal import aligned, format_ms, format_rate
from headrace.engine.metrics import RequestMetrics
from headrace.engine.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs


def to_json(index: int, result: RequestOutput) -> Iterator[dict[str, Any]]:
    """One object for each output of prompt number `index`."""
    for output in result.outputs:
        yield {
            "prompt_index": index,
            "output_index": output.index,
            "prompt": result.prompt,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            **({} if output.error is None else {"error": output.error}),
            **({} if output.logprobs is None else {"logprobs": _logprobs_to_json(output, output.logprobs)}),
            "metrics": metrics_to_json(result.metrics),
        }


def metrics_to_json(metrics: RequestMetrics) -> dict[str, Any]:
    return {
        "num_prompt_tokens": metrics.num_prompt_tokens,
        "num_cached_tokens": metrics.num_cached_tokens,
        "num_completion_tokens": metrics.num_completion_tokens,
        "num_preemptions": metrics.num_preemptions,
        "queue_ms": _milliseconds(metrics.queue_s),
        "ttft_ms": _milliseconds(metrics.ttft_s),
        "tpot_ms": _milliseconds(metrics.tpot_s),
        "tokens_per_s": None if metrics.tokens_per_s is None else round(metrics.tokens_per_s, 3),
    }


def summary(results: Sequence[RequestOutput]) -> list[str]:
    """One line for one request; for several a table, the last row of which is all of them together."""
    if len(results) == 1:
        return [summary_line(results[0].metrics)]
    rows = [("prompt", "prompt tokens", "generated tokens", "first token", "per output token", "tokens/s")]
    rows += [(str(i), *_figures(result.metrics)) for i, result in enumerate(results, start=1)]
    return aligned([*rows, _total([result.metrics for result in results])])


def summary_line(metrics: RequestMetrics) -> str:
    prompt, generated, ttft, tpot, rate = _figures(metrics)
    cached = f" ({metrics.num_cached_tokens} from the cache)" if metrics.num_cached_tokens else ""
    return (
        f"{prompt} prompt tokens{cached}, {generated} generated tokens; "
        f"time to first token {ttft}, {tpot} per output token, {rate} tokens/s"
    )


def cut_remark(results: Sequence[RequestOutput], max_tokens: int | None, max_model_len: int) -> str | None:
    """That outputs ended at the model's length, before `max_tokens`; None if none did."""
    left = [
        max_model_len - result.metrics.num_prompt_tokens
        for result in results
        if any(_is_cut(output, max_tokens) for output in result.outputs)
    ]
    if not left:
        return None
    room = f"{left[0]}" if min(left) == max(left) else f"{min(left)} to {max(left)}"
    prompts = (
        f"a prompt of {results[0].metrics.num_prompt_tokens} tokens"
        if len(results) == 1
        else f"{len(left)} of {len(results)} prompts"
    )
    return f"--max-tokens is {max_tokens}, but the model's length of {max_model_len} leaves {room} after {prompts}"


def _is_cut(output: CompletionOutput, max_tokens: int | None) -> bool:
    return max_tokens is not None and output.finish_reason == "length" and len(output.token_ids) < max_tokens


def _figures(metrics: RequestMetrics) -> tuple[str, str, str, str, str]:
    return (
        str(metrics.num_prompt_tokens),
        str(metrics.num_completion_tokens),
        format_ms(metrics.ttft_s),
        format_ms(metrics.tpot_s),
        format_rate(metrics.tokens_per_s),
    )


def _total(metrics: Sequence[RequestMetrics]) -> tuple[str, str, str, str, str, str]:
    """Requests run side by side: their rate is all tokens over the time from first arrival to last finish."""
    num_tokens = sum(m.num_completion_tokens for m in metrics)
    duration_s = max(m.finished_s or m.arrival_s for m in metrics) - min(m.arrival_s for m in metrics)
    rate = num_tokens / duration_s if duration_s > 0 else None
    return ("all", str(sum(m.num_prompt_tokens for m in metrics)), str(num_tokens), "", "", format_rate(rate))


def _logprobs_to_json(output: CompletionOutput, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """For each token its own entry and, under `top`, the most likely ones."""
    return [
        {
            **_logprob_to_json(token_id, entries[token_id]),
            "top": [_logprob_to_json(i, entry) for i, entry in sorted(entries.items(), key=lambda item: item[1].rank)],
        }
        for token_id, entries in zip(output.token_ids, logprobs, strict=True)
    ]


def _logprob_to_json(token_id: int, entry: Logprob) -> dict[str, Any]:
    # JSON has no infinity: a token that cannot be drawn has no log probability.
    logprob = entry.logprob if math.isfinite(entry.logprob) else None
    return {"token_id": token_id, "token": entry.decoded_token, "logprob": logprob, "rank": entry.rank}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
