"""The load of `headrace bench serve` on an engine in the same process, without a server: what HTTP costs is the rest.

    python -m bench.engine_load --model MODEL --quantize int4 --concurrency 1 8 16

Requests are those that `headrace bench serve --vocab-size V --seed S` makes, in its closed loop, timed where the engine
hands tokens over. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from headrace import LLM, SamplingParams
from headrace.bench.serve.lengths import RequestMix
from headrace.bench.serve.metrics import LoadMetrics, summarize
from headrace.bench.serve.prompts import TokenIdPrompts
from headrace.bench.serve.records import RequestRecord
from headrace.bench.serve.seeds import draws
from headrace.config.engine import SERVING_STEP_S
from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestUpdate

Request = tuple[list[int], int]


def requests(vocab_size: int, mix: RequestMix, seed: int, purpose: str = "requests") -> Iterator[Request]:
    """Token ids of prompts, and output lengths."""
    prompts, rng = TokenIdPrompts.make(vocab_size, 0, draws(seed, "shared prefix")), draws(seed, purpose)
    while True:
        prompt_tokens, output_tokens = mix.sample(rng)
        yield prompts.next(prompt_tokens, rng), output_tokens


def closed_loop(engine: Engine, source: Iterator[Request], concurrency: int, num_requests: int) -> list[RequestRecord]:
    """`concurrency` requests at a time, until `num_requests` have ended."""
    live: dict[str, RequestRecord] = {}
    records: list[RequestRecord] = []
    num_sent = 0
    while len(records) < num_requests:
        while len(live) < concurrency and num_sent < num_requests:
            request_id, (prompt, output_tokens) = f"request-{num_sent}", next(source)
            now_s = time.perf_counter()
            live[request_id] = RequestRecord(
                scheduled_s=now_s,
                started_s=now_s,
                asked_prompt_tokens=len(prompt),
                asked_output_tokens=output_tokens,
            )
            params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
            engine.add_request(request_id, prompt, params)
            num_sent += 1
        for update in engine.step():
            _take(update, live[update.request_id])
            if update.finished is not None:
                records.append(live.pop(update.request_id))
    return records


def _take(update: RequestUpdate, record: RequestRecord) -> None:
    now_s = time.perf_counter()
    if any(chunk.token_ids for chunk in update.chunks):
        record.chunk_s.append(now_s)
    if update.finished is not None:
        metrics = update.finished.metrics
        record.ended_s = now_s
        record.prompt_tokens, record.output_tokens = metrics.num_prompt_tokens, metrics.num_completion_tokens
        record.cached_tokens = metrics.num_cached_tokens
        record.finish_reason = update.finished.outputs[0].finish_reason


def figures(metrics: LoadMetrics) -> dict[str, Any]:
    """Those that `headrace bench serve --json` gives under the same names."""
    found = asdict(metrics)
    latencies = {
        f"{name}_ms": {f"p{p}": value * 1e3 for p, value in found[name]["percentiles"].items()}
        for name in ("ttft", "tpot", "itl", "e2e")
        if found[name] is not None
    }
    plain = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return plain | latencies | {"num_failed": metrics.num_failed}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dataflow", default="measured")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--request-mix", type=RequestMix.parse, default="128:128")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--waves", type=int, default=2, help="requests of each client (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    settings = {
        "num_threads": args.threads,
        "max_num_seqs": args.max_num_seqs,
        "dataflow": args.dataflow,
        "max_step_s": SERVING_STEP_S,  # as the server has it: shorter steps cost something, and not HTTP does
    }
    with LLM(args.model, quantize=args.quantize, **settings) as llm:
        closed_loop(llm.engine, requests(args.vocab_size, args.request_mix, args.seed, "warm-up"), 1, 1)
        levels = {}
        for index, concurrency in enumerate(args.concurrency):
            source = requests(args.vocab_size, args.request_mix, args.seed + index)
            records = closed_loop(llm.engine, source, concurrency, concurrency * args.waves)
            levels[str(concurrency)] = figures(summarize(records))
    print(json.dumps(levels))


if __name__ == "__main__":
    main()
