"""One rank of `scripts.namespaces.wire`, started by mpiexec on each host; rank 0 prints what each host has sent."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from headrace import LLM, SamplingParams
from headrace.config import ParallelConfig
from headrace.costs.algorithms import Summands, all_gather_wire_bytes, all_reduce_algorithm, all_reduce_wire_bytes
from headrace.costs.exchanges import Layout
from headrace.costs.steps import RequestShape
from headrace.costs.volume import predict_request
from headrace.engine.ranked_executor import RankedExecutor
from headrace.models.config_file import read_config_file
from headrace.parallel.mpi import import_mpi, make_communicator
from headrace.parallel.native_group import NativeGroup
from scripts.namespaces.meter import Meter

_WORK = {
    "prefill, 384 tokens": RequestShape(prompt_tokens=384, output_tokens=1),
    "decode, 100 tokens": RequestShape(prompt_tokens=1, output_tokens=101),
    "decode, 25 steps of 4": RequestShape(prompt_tokens=1, output_tokens=26, batch_size=4),
}
_CALLS = 50
_SIZES = (8, 4 << 10, 32 << 10, 256 << 10, 2 << 20)

Result = dict[str, Any]
"""work; predicted_bytes and sent, by rank."""


def model(namespaces: list[str], folder: str, tensor_parallel_size: str, pipeline_parallel_size: str) -> list[Result]:
    """Requests of one kind after the other."""
    parallel = ParallelConfig(
        tensor_parallel_size=int(tensor_parallel_size), pipeline_parallel_size=int(pipeline_parallel_size)
    )
    layout = Layout(model=read_config_file(folder).model, parallel=parallel, activation_bytes=2)
    results = []
    with LLM(
        model=folder,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        num_threads=1,
        max_model_len=512,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        dataflow="default",
    ) as llm:
        executor = llm.engine.model.executor
        assert isinstance(executor, RankedExecutor)
        meter = Meter(namespaces, _port(executor))
        for name, request in _WORK.items():
            before, counted_before = meter.read(), _counted_bytes(executor)
            # Reading ledgers is control, too.
            _generate(llm, request)
            after, counted_after = meter.read(), _counted_bytes(executor)
            results.append(
                {
                    "work": name,
                    "predicted_bytes": [
                        sum(row.wire_bytes for row in rows) for rows in predict_request(layout, request, 512)
                    ],
                    "counted_bytes": [b - a for a, b in zip(counted_before, counted_after, strict=True)],
                    "sent": [asdict(b - a) for a, b in zip(before, after, strict=True)],
                }
            )
        assert executor.exchange_differences() == []
    return results


def _generate(llm: LLM, request: RequestShape) -> None:
    prompts = [{"prompt_token_ids": [7 + i] * request.prompt_tokens} for i in range(request.batch_size)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True))


def _counted_bytes(executor: RankedExecutor) -> list[int]:
    return [sum(row.wire_bytes for row in rows) for rows in executor.ledger_rows()]


def _port(executor: RankedExecutor) -> int:
    """Where rank 0 has taken the other ranks' calls."""
    channel = next(iter(executor._world.control.values()))
    with socket.socket(fileno=os.dup(channel.fileno())) as line:
        port: int = line.getsockname()[1]
    return port


def operations(namespaces: list[str], smallest_bytes: str) -> list[Result]:
    """Calls of one kind after the other, without a model. What it takes to begin and end together counts as control."""
    communicator = make_communicator()
    group = NativeGroup(communicator, "tp", range(communicator.world_size))
    meter = Meter(namespaces)
    # The first may connect what is not connected yet.
    nothing = [_metered(meter, lambda: None) for _ in range(3)]
    together_bytes = [min(sent.all_bytes for sent in of_host) for of_host in zip(*nothing, strict=True)]
    results = []
    for name, call, predicted_bytes in _operations(group, int(smallest_bytes)):
        call()
        counted = _counted_of(group)
        sent = _metered(meter, lambda call=call: [call() for _ in range(_CALLS)])
        counted = _counted_of(group) - counted
        everybody = import_mpi().COMM_WORLD.allgather((_CALLS * predicted_bytes, counted))
        results.append(
            {
                "work": f"{_CALLS} x {name}",
                "predicted_bytes": [predicted for predicted, _ in everybody],
                "counted_bytes": [counted for _, counted in everybody],
                "sent": [asdict(s) | {"control_bytes": t} for s, t in zip(sent, together_bytes, strict=True)],
            }
        )
    return results


def _operations(group: NativeGroup, smallest_bytes: int) -> list[tuple[str, Callable[[], object], int]]:
    """Name, call, and the bytes that this rank sends for one."""
    size, rank = group.world_size, group.rank
    sizes = [num_bytes for num_bytes in _SIZES if num_bytes >= smallest_bytes]
    found: list[tuple[str, Callable[[], object], int]] = []
    for num_bytes in sizes:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
        summands = Summands(num_rows=1, row_size=x.numel(), summand_bytes=2, sum_bytes=2)
        algorithm = all_reduce_algorithm(summands, size)
        sent = all_reduce_wire_bytes(summands, algorithm, rank, size)
        found.append((f"all_reduce, {_name(num_bytes)}, {algorithm}", lambda x=x: group.all_reduce(x, "here"), sent))
    for num_bytes in sizes:
        x = torch.zeros(num_bytes, dtype=torch.uint8)
        gathered = all_gather_wire_bytes(num_bytes, size)
        found.append((f"all_gather, {_name(num_bytes)}", lambda x=x: group.all_gather(x, "here"), gathered))
    for num_bytes in sizes:
        x = torch.zeros(num_bytes, dtype=torch.uint8)
        found.append((f"send, {_name(num_bytes)}", lambda x=x: _hop(group, x), num_bytes if rank + 1 < size else 0))
    return found


def _hop(group: NativeGroup, x: torch.Tensor) -> None:
    if group.rank > 0:
        group.recv_(x, group.rank - 1, "hop")
    if group.rank + 1 < group.world_size:
        group.send(x, group.rank + 1, "hop")


def _name(num_bytes: int) -> str:
    units = ((1 << 20, "MiB"), (1 << 10, "KiB"))
    return next((f"{num_bytes // unit} {name}" for unit, name in units if num_bytes >= unit), f"{num_bytes} B")


def _counted_of(group: NativeGroup) -> int:
    return sum(row.wire_bytes for row in group.ledger_rows())


def _metered(meter: Meter, work: Callable[[], object]) -> list[Any]:
    """What each host sends for it; known to rank 0."""
    world = import_mpi().COMM_WORLD
    before = meter.read() if world.Get_rank() == 0 else []
    world.Barrier()
    work()
    world.Barrier()
    after = meter.read() if world.Get_rank() == 0 else []
    return [b - a for a, b in zip(before, after, strict=True)]


def main() -> None:
    kind, output, namespaces, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    programs: dict[str, Callable[..., list[Result]]] = {"model": model, "operations": operations}
    results = programs[kind](namespaces.split(","), *rest)
    if import_mpi().COMM_WORLD.Get_rank() == 0:
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
