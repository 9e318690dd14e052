"""What holds of a communicator's ranks, whatever carries their messages: functions that every rank of a world runs.

Each rank knows what the others bring, and so what must come of it.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace.config import AllReduceDtype
from headrace.costs.sites import Phase
from headrace.parallel.native_group import NativeGroup, _native

CASES: dict[str, Callable] = {}

DTYPES = (torch.float32, torch.bfloat16)
NATIVE_DTYPES = {torch.float32: _native.DType.FLOAT32, torch.bfloat16: _native.DType.BFLOAT16}
SIZES = (0, 1, 17, 64, 1025, 40_007)
"""Of messages in elements: none, fewer than ranks, odd ones, and some larger than a test's ring."""


def case(function: Callable) -> Callable:
    CASES[function.__name__] = function
    return function


def world_group(communicator, stream=None) -> NativeGroup:
    return NativeGroup(communicator, "tp", range(communicator.world_size), stream)


def brought(rank: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of many magnitudes, whose sum depends on its order."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(shape, generator=generator))).to(dtype)


def rank_order_sum(parts: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(out_dtype)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


@case
def all_reduce_adds_in_rank_order_and_rounds_once(communicator):
    group = world_group(communicator)
    for dtype in DTYPES:
        for out_dtype in (None, *DTYPES):
            for size in SIZES:
                parts = [brought(rank, [size], dtype) for rank in range(group.world_size)]
                actual = group.all_reduce(parts[group.rank].clone(), "here", out_dtype=out_dtype)
                assert_same_bits(actual, rank_order_sum(parts, out_dtype or dtype))
                exact = sum(part.double() for part in parts)
                tolerance = 1e-6 if actual.dtype == torch.float32 else 1 / 256
                bound = tolerance * sum(part.double().abs() for part in parts)
                assert ((actual.double() - exact).abs() <= bound).all()


@case
def algorithms_agree_to_the_bit(communicator):
    world_size, rank = communicator.world_size, communicator.rank
    group = _native.GroupCommunicator(communicator, "tp", list(range(world_size)))
    channel = group.channel(_native.Operation.ALL_REDUCE, "here")
    for dtype in DTYPES:
        for out_dtype in DTYPES:
            for size in SIZES:
                parts = [brought(peer, [size], dtype, seed=1) for peer in range(world_size)]
                for algorithm in (_native.Algorithm.DIRECT, _native.Algorithm.TWO_SHOT):
                    out = torch.full([size], torch.nan, dtype=out_dtype)
                    group.all_reduce(
                        None,
                        channel,
                        algorithm,
                        NATIVE_DTYPES[dtype],
                        1,
                        size,
                        parts[rank].data_ptr(),
                        out.data_ptr(),
                        NATIVE_DTYPES[out_dtype],
                    )
                    assert_same_bits(out, rank_order_sum(parts, out_dtype))


@case
def a_row_of_an_all_reduce_does_not_depend_on_its_batch(communicator):
    """The batch is large enough for the two-shot algorithm, its rows alone for the direct one."""
    group = world_group(communicator)
    for dtype in DTYPES:
        x = brought(group.rank, [601, 500], dtype, seed=2)
        alone = torch.stack([group.all_reduce(row.clone(), "rows") for row in x])
        assert_same_bits(group.all_reduce(x, "batch"), alone)
    algorithms = {(row.site, row.algorithm) for row in group.ledger_rows()}
    assert algorithms == {("rows", "direct"), ("batch", "two_shot")}


@case
def all_gather_returns_the_ranks_tensors(communicator):
    group = world_group(communicator)
    for dtype in (*DTYPES, torch.int64):
        for shape in ([0], [1], [3, 5], [2, 40_007]):
            parts = [brought(rank, shape, torch.float32).to(dtype) for rank in range(group.world_size)]
            for actual, expected in zip(group.all_gather(parts[group.rank], "here"), parts, strict=True):
                assert_same_bits(actual, expected)


@case
def all_gather_takes_unequal_sizes(communicator):
    group = world_group(communicator)
    for sizes in ([5, 3, 0, 9], [0, 1, 30_011, 2]):
        sizes = sizes[: group.world_size]
        parts = [brought(rank, [4, size], torch.bfloat16) for rank, size in enumerate(sizes)]
        for actual, expected in zip(group.all_gather(parts[group.rank], "here", sizes), parts, strict=True):
            assert_same_bits(actual, expected)


@case
def reduce_scatter_gives_each_rank_its_row(communicator):
    group = world_group(communicator)
    for dtype in DTYPES:
        for size in SIZES:
            parts = [brought(rank, [group.world_size, 2, size], dtype, seed=3) for rank in range(group.world_size)]
            actual = group.reduce_scatter(parts[group.rank], "here")
            assert_same_bits(actual, rank_order_sum(parts, dtype)[group.rank])


@case
def messages_arrive_in_the_order_sent(communicator):
    """Each rank sends to the next one, some messages larger than the ring, and the last one only receives."""
    group = world_group(communicator)
    sizes = (5, 0, 40_007, 1, 17, 100_003)
    messages = [[brought(rank, [size], torch.float32, seed=i) for i, size in enumerate(sizes)] for rank in range(4)]
    if group.rank > 0:
        for message in messages[group.rank - 1]:
            received = torch.full_like(message, torch.nan)
            group.recv_(received, group.rank - 1, "hop")
            assert_same_bits(received, message)
    if group.rank + 1 < group.world_size:
        for message in messages[group.rank]:
            sent = message.clone()
            group.send(sent, group.rank + 1, "hop")
            sent.fill_(torch.nan)


@case
def large_messages_cross_without_deadlock(communicator):
    """10 MB each way at once, through rings of a fraction of that."""
    group = world_group(communicator)
    parts = [brought(rank, [2_500_000], torch.float32) for rank in range(group.world_size)]
    for actual, expected in zip(group.all_gather(parts[group.rank], "here"), parts, strict=True):
        assert_same_bits(actual, expected)


@case
def groups_share_a_world(communicator):
    """Ranks in rows and columns, every group in an order of its own, both at work in turn."""
    world_size, rank = communicator.world_size, communicator.rank
    columns = 2 if world_size % 2 == 0 else 1
    row, column = divmod(rank, columns)
    members = {
        "tp": [row * columns + i for i in reversed(range(columns))],
        "pp": list(range(column, world_size, columns)),
    }
    groups = {name: NativeGroup(communicator, name, ranks) for name, ranks in members.items()}
    for seed in range(20):
        for name, group in groups.items():
            assert members[name][group.rank] == rank
            parts = [brought(peer, [300], torch.bfloat16, seed) for peer in members[name]]
            actual = group.all_reduce(parts[group.rank].clone(), "here")
            assert_same_bits(actual, rank_order_sum(parts, torch.bfloat16))


def shard_sizes(count: int, world_size: int) -> list[int]:
    return [len(range(count)[rank::world_size]) for rank in range(world_size)]


def expected_wire_bytes(algorithm: str, count: int, rank: int, world_size: int, sizes: tuple[int, int]) -> int:
    """Message by message: to each other rank its part of the payload, and then this rank's part of the result."""
    in_bytes, out_bytes = sizes
    shards = shard_sizes(count, world_size)
    others = [peer for peer in range(world_size) if peer != rank]
    if algorithm == "direct":
        return sum(count * in_bytes for _ in others)
    return sum(shards[peer] * in_bytes + shards[rank] * out_bytes for peer in others)


@case
def ledger_counts_calls_and_bytes(communicator):
    group = world_group(communicator)
    rank, world_size = group.rank, group.world_size
    expected: dict[tuple, list[int]] = {}

    def expect(operation: str, site: str, phase: Phase, algorithm: str, payload_bytes: int, wire_bytes: int) -> None:
        counts = expected.setdefault((operation, site, phase, algorithm), [0, 0, 0])
        for i, value in enumerate((1, payload_bytes, wire_bytes)):
            counts[i] += value

    for phase in Phase:
        group.set_phase(phase)
        for dtype, out_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
            for count in (0, 1, 17, 1000, 4097, 70_001, 200_003):
                payload = torch.zeros(count, dtype=dtype)
                group.all_reduce(payload, f"sum.{count}", out_dtype=out_dtype)
                algorithm = {
                    _native.Algorithm.DIRECT: "direct",
                    _native.Algorithm.TWO_SHOT: "two_shot",
                }[_native.all_reduce_algorithm(payload.nbytes, world_size, False)]
                item_bytes = (dtype.itemsize, out_dtype.itemsize)
                wire_bytes = expected_wire_bytes(algorithm, count, rank, world_size, item_bytes)
                expect("all_reduce", f"sum.{count}", phase, algorithm, payload.nbytes, wire_bytes)
        sizes = [7 * peer for peer in range(world_size)]
        group.all_gather(torch.zeros(3, sizes[rank]), "gather", sizes)
        expect("all_gather", "gather", phase, "direct", 12 * sizes[rank], 12 * sizes[rank] * (world_size - 1))
        group.reduce_scatter(torch.zeros(world_size, 11, dtype=torch.bfloat16), "scatter")
        expect("reduce_scatter", "scatter", phase, "direct", 22 * world_size, 22 * (world_size - 1))
        if rank > 0:
            group.recv_(torch.zeros(9), rank - 1, "hop")
            expect("recv", "hop", phase, "point_to_point", 36, 0)
        if rank + 1 < world_size:
            group.send(torch.zeros(9), rank + 1, "hop")
            expect("send", "hop", phase, "point_to_point", 36, 36)

    rows = group.ledger_rows()
    assert {
        (row.operation, row.site, row.phase, row.algorithm): [row.count, row.payload_bytes, row.wire_bytes]
        for row in rows
    } == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row.group == "tp"
        assert row.wait_s >= 0
        assert row.transfer_s > 0


@case
def trace_keeps_calls_one_by_one_until_it_is_full(communicator):
    group = world_group(communicator)
    group.all_reduce(torch.ones(7), "before")
    group.start_trace(3)
    group.set_phase(Phase.DECODE)
    began_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    for i in range(4):
        group.all_reduce(torch.ones(400 * i + 5, dtype=torch.bfloat16), f"site.{i}")
    ended_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    events = group.drain_trace()
    assert [(event.site, event.payload_bytes) for event in events] == [
        ("site.0", 10),
        ("site.1", 810),
        ("site.2", 1610),
    ]
    assert group.num_dropped_events == 1
    for event in events:
        assert (event.operation, event.group, event.phase, event.algorithm) == (
            "all_reduce",
            "tp",
            Phase.DECODE,
            "direct",
        )
        assert event.wire_bytes == (group.world_size - 1) * event.payload_bytes
        assert event.arrival_ns is not None
        assert began_ns <= event.start_ns <= event.end_ns <= ended_ns
        assert event.arrival_ns <= event.end_ns
    rows = {row.site: row for row in group.ledger_rows()}
    for event in events:
        row = rows[event.site]
        assert round((row.wait_s + row.transfer_s) * 1e9) == event.end_ns - event.start_ns
        assert round(row.wait_s * 1e9) == max(0, event.arrival_ns - event.start_ns)
    assert group.drain_trace() == []
    group.all_gather(torch.ones(1), "after")
    assert [event.site for event in group.drain_trace()] == ["after"]
    group.start_trace(0)
    group.all_gather(torch.ones(1), "after")
    assert group.drain_trace() == []


# Sums in 8 bits

GROUP = 64


def through_int8(x: Tensor) -> Tensor:
    """What is left of rows of float32 that travel in 8 bits, a scale for each 64 values of a row."""
    num_groups = -(-x.shape[-1] // GROUP)
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).view(x.shape[0], num_groups, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    steps = torch.full_like(largest, 127.0)  # a number divided by a tensor is a product with torch
    values = torch.round(groups * (steps / largest).nan_to_num(posinf=0.0))
    return (values * (largest / steps)).view(x.shape[0], num_groups * GROUP)[:, : x.shape[-1]]


def int8_sum(parts: Sequence[Tensor], out_dtype: torch.dtype) -> Tensor:
    return through_int8(rank_order_sum([through_int8(part.float()) for part in parts], torch.float32)).to(out_dtype)


@case
def int8_sums_are_those_of_their_definition_and_near_the_exact_ones(communicator):
    group = NativeGroup(communicator, "tp", range(communicator.world_size), all_reduce_dtype=AllReduceDtype.INT8)
    for dtype, out_dtype in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, None)):
        for num_rows, row_size in ((40, 1000), (1, 40_007), (700, 65), (33_000, 1), (20, 2048)):
            parts = [brought(rank, [num_rows, row_size], dtype, seed=4) for rank in range(group.world_size)]
            actual = group.all_reduce(parts[group.rank].clone(), "here", out_dtype=out_dtype)
            assert_same_bits(actual, int8_sum(parts, out_dtype or dtype))
            exact = sum(part.double() for part in parts)
            largest = sum(part.double().abs().amax(-1, keepdim=True) for part in parts)
            # Half a step of each summand and of the sum, and the rounding of the result.
            assert ((actual.double() - exact).abs() <= 2.1 * largest / 254 + exact.abs() / 200).all()


@case
def int8_rows_depend_neither_on_their_batch_nor_on_each_other(communicator):
    group = NativeGroup(communicator, "tp", range(communicator.world_size), all_reduce_dtype=AllReduceDtype.INT8)
    x = brought(group.rank, [99, 1000], torch.float32, seed=5)
    expected = group.all_reduce(x.clone(), "whole")
    parts = [group.all_reduce(part.clone(), "parts") for part in x.split([31, 49, 19])]
    assert_same_bits(torch.cat(parts), expected)
    if group.rank == 0:
        x[7, 3], x[50, 999], x[60] = torch.nan, torch.inf, 0.0
    spoilt = group.all_reduce(x, "whole")
    assert spoilt[7, :64].isnan().all()
    assert spoilt[50, 960:].isnan().all()
    spoilt[7, :64], spoilt[50, 960:], spoilt[60] = expected[7, :64], expected[50, 960:], expected[60]
    assert_same_bits(spoilt, expected)


@case
def int8_serves_large_messages_alone_and_counts_its_bytes(communicator):
    group = NativeGroup(communicator, "tp", range(communicator.world_size), all_reduce_dtype=AllReduceDtype.INT8)
    rank, world_size = group.rank, group.world_size
    num_rows, row_size = 131, 999
    group.all_reduce(torch.ones(num_rows, row_size, dtype=torch.bfloat16), "large")
    group.all_reduce(torch.ones(1, row_size, dtype=torch.bfloat16), "small")
    # The groups of each rank, larger shares first, and how many of them end a row and so are shorter.
    sizes = ([GROUP] * (row_size // GROUP) + [row_size % GROUP]) * num_rows
    base, extra = divmod(len(sizes), world_size)
    begins = [peer * base + min(peer, extra) for peer in range(world_size + 1)]
    messages = [sum(4 + size for size in sizes[begins[peer] : begins[peer + 1]]) for peer in range(world_size)]
    expected = sum(messages[peer] + messages[rank] for peer in range(world_size) if peer != rank)
    rows = {row.site: row for row in group.ledger_rows()}
    assert (rows["large"].algorithm, rows["large"].wire_bytes) == ("two_shot_int8", expected)
    assert rows["large"].payload_bytes == 2 * num_rows * row_size
    assert (rows["small"].algorithm, rows["small"].wire_bytes) == ("direct", (world_size - 1) * 2 * row_size)
