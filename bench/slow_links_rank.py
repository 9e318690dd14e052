"""One rank of `bench.slow_links`: what an all-reduce costs between the hosts, then a model's speed, at each rate."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from headrace import LLM
from headrace.bench.rounds import RoundRunner
from headrace.parallel.mpi import import_mpi, make_communicator
from headrace.parallel.native_group import NativeGroup
from scripts.namespaces.network import Network

_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20)
_BATCH_CONTEXT_TOKENS = 4
_NUM_ROUNDS = 2


def all_reduce_s(hosts: Network, mbit_per_s: int) -> dict[int, float]:
    """Seconds of a call by bytes of payload: the median of a few, one after the other."""
    group = NativeGroup(make_communicator(), "tp", range(len(hosts.namespaces)))
    world = import_mpi().COMM_WORLD
    if group.rank == 0:
        hosts.limit(mbit_per_s)
    found = {}
    for num_bytes in _SIZES:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
        times_s = []
        for _ in range(30 if num_bytes < 1 << 18 else 6):
            world.Barrier()
            started_s = time.perf_counter()
            group.all_reduce(x, "bench")
            times_s.append(time.perf_counter() - started_s)
        found[num_bytes] = statistics.median(times_s[1:])
    return found


def model_s(llm: LLM, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds, best of the rounds, by the names of figures; of a decode step for all sequences."""
    runner = RoundRunner(llm.engine)
    found: dict[str, float] = {}

    def keep(name: str, seconds: float) -> None:
        found[name] = min(seconds, found.get(name, float("inf")))

    runner.run(1, _BATCH_CONTEXT_TOKENS, 2)
    for _ in range(_NUM_ROUNDS):
        if "prefill" in settings["figures"]:
            keep(f"prefill {settings['prefill_tokens']}", runner.run(1, settings["prefill_tokens"], 0).prefill_s)
        for num_seqs in settings["batch_sizes"]:
            times = runner.run(num_seqs, _BATCH_CONTEXT_TOKENS, settings["decode_steps"])
            keep(f"decode {num_seqs}", times.step_s)
    return found


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    hosts = Network(tuple(settings["namespaces"]), ())
    torch.set_num_threads(1)
    found: dict[int, Any] = {rate: {} for rate in settings["rates"]}
    if hosts.namespaces:
        for rate in settings["rates"]:
            found[rate]["all_reduce_s"] = all_reduce_s(hosts, rate)
    with LLM(num_threads=1, max_model_len=1024, enable_prefix_caching=False, **settings["model"]) as llm:
        for rate in settings["rates"]:
            if hosts.namespaces:
                hosts.limit(rate)
            found[rate]["model_s"] = model_s(llm, settings)
    Path(settings["output"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
