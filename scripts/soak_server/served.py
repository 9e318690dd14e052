"""The server that is soaked: Headrace's own, in a process of its own, which also tells how its cache is.

A line on standard input asks; a line of JSON on standard output answers.
"""

import asyncio
import json
import sys
import threading
from typing import Any

from headrace.config import CacheConfig, EngineConfig, LoadConfig, ParallelConfig, SchedulerConfig
from headrace.config.server import ServerConfig
from headrace.engine.engine import Engine
from headrace.engine.load import load_model
from headrace.server.serve import Serving, listen


def main() -> None:
    model, num_blocks, max_waiting, num_ranks = sys.argv[1], *map(int, sys.argv[2:])
    settings = EngineConfig(
        load=LoadConfig(model=model),
        cache=CacheConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=32),
        parallel=ParallelConfig(tensor_parallel_size=num_ranks),
    )
    config = ServerConfig(port=0, max_waiting_requests=max_waiting, slow_reader_s=5.0, max_restarts=100)
    listener = listen(config)
    serving = Serving(
        lambda: Engine(load_model(settings)),
        config,
        model_name="demo",
        on_ready=lambda: _tell({"port": listener.getsockname()[1]}),
    )
    threading.Thread(target=_answer, args=(serving,), daemon=True).start()
    serving.run(listener)


def _answer(serving: Serving) -> None:
    for _ in sys.stdin:
        asyncio.run_coroutine_threadsafe(_look(serving), serving.engine.loop).result()


async def _look(serving: Serving) -> None:
    def look(engine: Engine) -> dict[str, Any]:
        # Raises if a block is lost, held twice, or counted wrongly.
        engine.check_integrity()
        metrics = engine.metrics()
        return {
            "running": metrics.num_running,
            "waiting": metrics.num_waiting,
            "finished": metrics.num_finished_requests,
            "preemptions": metrics.num_preemptions,
            "kv_cache_usage": metrics.kv_cache_usage,
        }

    try:
        found = await serving.engine.ask(look)
    except AssertionError as error:
        found = {"broken": str(error)}
    admission = serving.engine.admission
    admitted = admission.num_requests + admission.num_tokens + admission.logprob_bytes + admission.body_bytes
    _tell(found | {"open": serving.engine.num_open, "admitted": admitted})


def _tell(data: dict[str, Any]) -> None:
    print(json.dumps(data), flush=True)


if __name__ == "__main__":
    main()
