"""Ranks over NCCL. Without a GPU their groups run on gloo, which torch offers through the same interface."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from checkpoints import BY_NAME
from gloo_as_nccl import HostEvent, make_fabrics, on_all
from layout_cases import (
    CROWDED,
    GREEDY,
    LAYOUTS,
    ORDER,
    PROMPTS,
    as_prompts,
    closing,
    make_subject,
    tokens_of,
)
from planned_run import assert_ledgers_as_predicted, record_plans
from recorded_kernels import with_recordings, without_recordings
from test_layouts import sampled
from thread_world import thread_llm
from torch._C._distributed_c10d import HashStore

from headrace import LLM
from headrace.config import AllReduceDtype, Device, EngineConfig, LoadConfig, ParallelConfig, Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import rules_of
from headrace.costs.sites import Phase
from headrace.engine.devices import Gpu, GpuFacts
from headrace.engine.plan import NewSequence, ScheduledChunk, StepPlan, StepResult
from headrace.engine.ranked_executor import RankedExecutor
from headrace.engine.start import resolve_transport
from headrace.engine.worker import Worker
from headrace.errors import BackendUnavailable, EngineStopped, ParallelismError, RankError, ShapeError
from headrace.parallel import nccl_fabric
from headrace.parallel.exchange_events import ExchangeEvents
from headrace.parallel.fabric import NoFabric
from headrace.parallel.nccl_fabric import NcclFabric
from headrace.parallel.nccl_group import NcclGroup
from headrace.parallel.place import Place
from headrace.parallel.world import World

__all__ = ["make_fabrics"]


def tensor_of(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def group_of(fabric, name="tp", num_ranks=2):
    return fabric.make_group(name, range(num_ranks))


class TestGroup:
    @pytest.mark.parametrize("num_ranks", [2, 3, 4])
    def test_sums(self, make_fabrics, num_ranks) -> None:
        def run(fabric, rank):
            group = group_of(fabric, num_ranks=num_ranks)
            summand = tensor_of(rank, 3, 7)
            total = group.all_reduce(summand, "a", out_dtype=torch.bfloat16)
            return group.all_reduce(tensor_of(rank, 3, 7), "a"), total

        expected = sum(tensor_of(rank, 3, 7).double() for rank in range(num_ranks))
        for total, rounded in on_all(make_fabrics(num_ranks), run):
            torch.testing.assert_close(total.double(), expected, atol=1e-6, rtol=1e-6)
            assert rounded.dtype == torch.bfloat16
            torch.testing.assert_close(rounded.double(), expected, atol=1e-3, rtol=1e-2)

    def test_parts_of_different_sizes(self, make_fabrics) -> None:
        sizes = [5, 4, 0]
        fabrics = make_fabrics(3)
        found = on_all(fabrics, lambda f, r: group_of(f, num_ranks=3).all_gather(tensor_of(r, 2, sizes[r]), "a", sizes))
        for parts in found:
            for rank, part in enumerate(parts):
                assert torch.equal(part, tensor_of(rank, 2, sizes[rank]))
                assert part.is_contiguous()

    def test_scattered_sums_are_added_in_rank_order_and_rounded_once(self, make_fabrics) -> None:
        def run(fabric, rank):
            rows = tensor_of(rank, 3, 11, dtype=torch.bfloat16)
            return group_of(fabric, "kv", 3).reduce_scatter(rows, "a")

        for rank, row in enumerate(on_all(make_fabrics(3), run)):
            total = tensor_of(0, 3, 11, dtype=torch.bfloat16)[rank].float()
            for other in (1, 2):
                total += tensor_of(other, 3, 11, dtype=torch.bfloat16)[rank]
            assert torch.equal(row, total.bfloat16())

    def test_messages_from_stage_to_stage(self, make_fabrics) -> None:
        def run(fabric, rank):
            group = group_of(fabric, "pp", 3)
            received = torch.full((2, 5), float("nan"))
            if rank > 0:
                group.recv_(received, rank - 1, "a")
            if rank < 2:
                group.send(tensor_of(rank, 2, 5), rank + 1, "a")
            return received

        found = on_all(make_fabrics(3), run)
        assert torch.equal(found[1], tensor_of(0, 2, 5))
        assert torch.equal(found[2], tensor_of(1, 2, 5))

    def test_bytes_by_the_formulas_and_nothing_for_connecting(self, make_fabrics) -> None:
        """S bytes of payload among 3 ranks; 7 elements of a sum do not divide evenly."""
        sizes = [5, 4, 1]

        def run(fabric, rank):
            group, kv = group_of(fabric, num_ranks=3), group_of(fabric, "kv", 3)
            assert not group.ledger_rows()
            group.all_reduce(torch.ones(7), "sum")
            group.all_gather(torch.ones(2, sizes[rank]), "parts", sizes)
            kv.reduce_scatter(torch.ones(3, 4), "rows")
            rows = [*group.ledger_rows(), *kv.ledger_rows()]
            return {row.site: (row.algorithm, row.count, row.payload_bytes, row.wire_bytes) for row in rows}

        found = on_all(make_fabrics(3), run)
        for rank, by_site in enumerate(found):
            assert by_site["parts"] == ("ring", 1, 8 * sizes[rank], 2 * 8 * 5)
            assert by_site["rows"] == ("direct", 1, 48, 32)
        sums = [by_site["sum"] for by_site in found]
        assert {row[:3] for row in sums} == {("ring", 1, 28)}
        assert sum(row[3] for row in sums) == 2 * 2 * 28

    def test_what_does_not_fit_is_refused(self, make_fabrics) -> None:
        def run(fabric, rank):
            group = group_of(fabric)
            for call in (group.all_reduce, group.all_gather):
                with pytest.raises(ShapeError, match="contiguous"):
                    call(torch.ones(4, 4)[:, :2], "a")
            with pytest.raises(ShapeError, match=r"one row for each of 2 ranks, not \[3, 4\]"):
                group.reduce_scatter(torch.ones(3, 4), "a")

        on_all(make_fabrics(2), run)

    def test_a_failed_exchange_names_its_place(self) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("remote process exited")

        process_group = SimpleNamespace(rank=lambda: 0, size=lambda: 2, allreduce=fail)
        group = NcclGroup("tp", process_group, ExchangeEvents(HostEvent))
        message = r"^all_reduce at layers\.3\.mlp of group tp failed: remote process exited; NCCL_DEBUG=WARN says more$"
        with pytest.raises(RankError, match=message):
            group.all_reduce(torch.ones(4), "layers.3.mlp")
        assert not group.ledger_rows()


class SlowEvent(HostEvent):
    """Of a stream that stands still until it is let go."""

    stands_still = False

    def query(self) -> bool:
        return not SlowEvent.stands_still


@pytest.fixture
def stream():
    SlowEvent.stands_still = False
    yield SlowEvent
    SlowEvent.stands_still = False


class TestTimes:
    def test_calls_have_times_once_they_are_over(self, make_fabrics, stream) -> None:
        fabrics = make_fabrics(2, event=SlowEvent)
        groups = on_all(fabrics, lambda fabric, _: group_of(fabric))
        stream.stands_still = True
        on_all(fabrics, lambda _, rank: groups[rank].all_reduce(torch.ones(4), "a"))
        for group in groups:
            [row] = group.ledger_rows()
            assert (row.count, row.wait_s, row.transfer_s) == (1, None, 0.0)
        stream.stands_still = False
        for group in groups:
            first, again = (group.ledger_rows()[0].transfer_s for _ in range(2))
            assert 0 < first == again

    def test_replays_count_without_times(self, make_fabrics) -> None:
        def run(fabric, rank):
            group = group_of(fabric)
            with group.captured() as calls:
                group.all_reduce(torch.ones(4), "a")
            group.set_phase(Phase.DECODE)
            for _ in range(600):
                group.count(calls)
            assert len(group.events) < 300
            return group.ledger_rows()

        for [row] in on_all(make_fabrics(2), run):
            assert (row.phase, row.count, row.payload_bytes, row.transfer_s) == (Phase.DECODE, 600, 9600, 0.0)

    def test_a_trace_has_calls_and_counts_replays_as_dropped(self, make_fabrics) -> None:
        def run(fabric, rank):
            group = group_of(fabric)
            group.all_reduce(torch.ones(4), "before")
            started_ns = time.monotonic_ns()
            group.start_trace(2)
            for site in ("a", "b", "c"):
                group.all_reduce(torch.ones(4), site)
            with group.captured() as calls:
                group.all_reduce(torch.ones(4), "d")
            group.count(calls)
            return started_ns, group.drain_trace(), time.monotonic_ns(), group.num_dropped_events, group.drain_trace()

        for started_ns, events, ended_ns, num_dropped, again in on_all(make_fabrics(2), run):
            assert [event.site for event in events] == ["a", "b"]
            assert (num_dropped, again) == (2, [])
            for event in events:
                assert started_ns - 10_000 <= event.start_ns <= event.end_ns <= ended_ns + 10_000
                assert event.arrival_ns is None


class TestEnd:
    def test_an_abort_ends_everything_with_its_reason(self, make_fabrics) -> None:
        fabrics = make_fabrics(2)
        groups = on_all(fabrics, lambda fabric, _: group_of(fabric))
        with groups[0].captured() as calls:
            pass
        fabrics[0].check()
        fabrics[0].abort("rank 1 has gone")
        fabrics[0].abort("and something else")
        for call in (
            fabrics[0].check,
            lambda: groups[0].all_reduce(torch.ones(4), "a"),
            lambda: groups[0].recv_(torch.ones(4), 1, "a"),
            lambda: groups[0].count(calls),
        ):
            with pytest.raises(RankError, match=r"^exchanges have been ended: rank 1 has gone$"):
                call()
        fabrics[1].check()

    def test_a_rank_that_is_lost_before_it_comes_is_not_waited_for(self, make_fabrics) -> None:
        """NCCL would, and a communicator that is being made cannot be aborted."""
        fabric, _ = make_fabrics(2)
        threading.Timer(0.2, fabric.abort, ("rank 1 has gone",)).start()
        with pytest.raises(RankError, match=r"^exchanges have been ended: rank 1 has gone$"):
            group_of(fabric)

    @pytest.mark.parametrize("is_replayed", [False, True])
    def test_a_stream_that_stands_still_is_noticed(self, make_fabrics, stream, is_replayed) -> None:
        """No exchange of a CUDA graph is known to torch's own watch."""
        fabrics = make_fabrics(2, event=SlowEvent, timeout_s=0.5)

        def run(fabric, rank):
            group = group_of(fabric)
            with group.captured() as calls:
                group.all_reduce(torch.ones(4), "a")
            return group, calls

        ranks = on_all(fabrics, run)
        stream.stands_still = True
        if is_replayed:
            for group, calls in ranks:
                group.count(calls)
        else:
            on_all(fabrics, lambda _, rank: ranks[rank][0].all_reduce(torch.ones(4), "a"))
        for fabric in fabrics:
            fabric._watch.join(20)
            with pytest.raises(RankError, match=r"one of group tp was not over after 0\.5 s"):
                fabric.check()

    def test_nothing_is_asked_of_the_stream_while_a_graph_is_captured(self, make_fabrics, stream) -> None:
        class Asked(SlowEvent):
            is_capturing = False

            def query(self) -> bool:
                assert not Asked.is_capturing
                return super().query()

            def record(self) -> None:
                assert not Asked.is_capturing
                super().record()

        fabrics = make_fabrics(2, event=Asked)
        groups = on_all(fabrics, lambda fabric, _: group_of(fabric))
        stream.stands_still = True
        on_all(fabrics, lambda _, rank: groups[rank].all_reduce(torch.ones(4), "a"))
        assert groups[0].events.oldest_s() > 0
        with groups[0].captured(), groups[1].captured():
            Asked.is_capturing = True
            on_all(fabrics, lambda _, rank: groups[rank].all_reduce(torch.ones(4), "a"))
            assert groups[0].events.oldest_s() == 0
            Asked.is_capturing = False
        assert groups[0].events.oldest_s() > 0

    def test_the_watch_ends_with_its_fabric(self, make_fabrics) -> None:
        fabrics = make_fabrics(2)
        on_all(fabrics, lambda fabric, _: group_of(fabric))
        for fabric in fabrics:
            fabric.close()
            fabric._watch.join(10)
            assert not fabric._watch.is_alive()
            fabric.check()
        assert not [thread for thread in threading.enumerate() if thread.name == "headrace-nccl" and thread.is_alive()]

    def test_a_step_computed_from_what_was_cut_short_is_not_believed(self) -> None:
        """The kernels that waited end, and whatever comes after them runs on what lies in memory."""
        fabric = SimpleNamespace(reason=None, abort=lambda _: None, close=lambda: None)

        def check() -> None:
            if fabric.reason is not None:
                raise RankError(fabric.reason)

        def execute(_plan) -> StepResult:
            fabric.reason = "exchanges have been ended: one of group tp was not over after 30 s"
            return StepResult(sampled=(), prompt_logprobs=(), failed={})

        fabric.check = check
        place = Place(rank=0, config=ParallelConfig())
        world = World(place, fabric, {}, {}, num_ranks_on_host=1, local_rank=0)
        executor = RankedExecutor(world, SimpleNamespace(try_to_execute=execute, knows_of_all=lambda _plan: True))
        plan = StepPlan(step=0, sampled=(), new=(), finished=(), chunks=(), num_decode_tokens=0)
        with pytest.raises(RankError, match=r"^rank 0 failed: exchanges have been ended: one of group tp"):
            executor.submit(plan)
        with pytest.raises(EngineStopped, match="one of group tp was not over"):
            executor.submit(plan)

    def test_what_fails_after_a_loss_is_put_down_to_it(self) -> None:
        """Ids out of what lies in memory may be anything."""

        def execute(_plan) -> StepResult:
            world._lose(1, "has gone")
            raise IndexError("no token 4711")

        place = Place(rank=0, config=ParallelConfig(tensor_parallel_size=2))
        world = World(place, NoFabric(), {}, {}, num_ranks_on_host=1, local_rank=0)
        executor = RankedExecutor(world, SimpleNamespace(try_to_execute=execute, knows_of_all=lambda _plan: True))
        plan = StepPlan(step=0, sampled=(), new=(), finished=(), chunks=(), num_decode_tokens=0)
        with pytest.raises(RankError, match=r"^rank 1 has gone$"):
            executor.submit(plan)


class TestFabric:
    @pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="torch has NCCL")
    def test_a_build_without_nccl_says_so(self) -> None:
        with pytest.raises(BackendUnavailable, match=r"transport is 'nccl', which torch .* was built without"):
            NcclFabric(HashStore(), 0, 30.0)

    def test_a_model_on_the_cpu_is_refused(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        fabric = NcclFabric(HashStore(), 0, 30.0)
        with pytest.raises(ParallelismError, match="joins GPUs, but the model lies on cpu; use shm, mpi or gloo"):
            fabric.make_group("tp", [0, 1], SimpleNamespace(device=torch.device("cpu")))

    def test_torch_is_told_what_it_was_not_told_by_the_user(self) -> None:
        environ = {"A": "1", "HOME": "/"}
        with nccl_fabric.defaults_in(environ, {"A": "0", "B": "0"}):
            assert environ == {"A": "1", "B": "0", "HOME": "/"}
        assert environ == {"A": "1", "HOME": "/"}


def gpus(num_gpus: int) -> GpuFacts:
    found = [Gpu(index=i, name="card", capability="9.0", memory_bytes=2**30) for i in range(num_gpus)]
    return GpuFacts(gpus=tuple(found), obstacle=None if found else "torch sees no GPU", versions={})


def resolved(facts: GpuFacts, device: str = "auto", transport: str = "auto", **parallel) -> tuple[str, str]:
    parallel = {"tensor_parallel_size": 2, "transport": Transport(transport)} | parallel
    config = EngineConfig(
        load=LoadConfig(model="model"), device=Device.parse(device), parallel=ParallelConfig(**parallel)
    )
    config = resolve_transport(config, facts)
    return str(config.device), config.parallel.transport.value


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}
MPIEXEC = {"PMI_RANK": "1", "PMI_SIZE": "2"}


class TestTransport:
    @pytest.mark.parametrize(
        ("num_gpus", "device", "transport", "launcher", "expected"),
        [
            (2, "auto", "auto", {}, ("cuda", "nccl")),
            (1, "auto", "auto", {}, ("cpu", "shm")),
            (2, "auto", "gloo", {}, ("cpu", "gloo")),
            (2, "auto", "nccl", {}, ("cuda", "nccl")),
            (2, "cpu", "auto", {}, ("cpu", "shm")),
            (3, "cuda:1", "auto", {}, ("cuda:1", "nccl")),
            (1, "auto", "auto", TORCHRUN, ("cuda", "nccl")),
            (0, "auto", "auto", TORCHRUN, ("cpu", "gloo")),
            (1, "cuda", "auto", TORCHRUN, ("cuda", "nccl")),
            (8, "auto", "auto", MPIEXEC, ("cpu", "mpi")),
        ],
    )
    def test_follows_the_device(self, monkeypatch, num_gpus, device, transport, launcher, expected) -> None:
        monkeypatch.delenv("HEADRACE_KERNELS", raising=False)
        for name, value in launcher.items():
            monkeypatch.setenv(name, value)
        assert resolved(gpus(num_gpus), device, transport) == expected

    @pytest.mark.parametrize(
        ("num_gpus", "given", "launcher", "error", "message"),
        [
            (1, ("cuda",), {}, BackendUnavailable, "2 ranks on this host have 1 GPUs; use fewer ranks"),
            (2, ("cuda:1",), {}, BackendUnavailable, "there is no GPU 2; there are: 0, 1"),
            (0, ("auto", "nccl"), {}, BackendUnavailable, "device is 'cuda', but torch sees no GPU"),
            (
                2,
                ("cpu", "nccl"),
                {},
                ParallelismError,
                "joins ranks on GPUs, but device is 'cpu'; use shm, mpi",
            ),
            (2, ("cuda", "gloo"), {}, ParallelismError, "joins ranks on CPUs, but device is 'cuda'; use nccl"),
            (2, ("cuda", "shm"), {}, ParallelismError, "joins ranks on CPUs, but device is 'cuda'; use nccl"),
            (8, ("cuda",), MPIEXEC, ParallelismError, "mpiexec or srun has started this rank, but over NCCL"),
        ],
    )
    def test_that_does_not_fit_is_refused(self, monkeypatch, num_gpus, given, launcher, error, message) -> None:
        for name, value in launcher.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(error, match=message):
            resolved(gpus(num_gpus), *given)

    def test_8_bit_sums_are_refused(self) -> None:
        with pytest.raises(ParallelismError, match="'nccl' lacks; allowed on GPUs: auto, float32, bfloat16"):
            resolved(gpus(2), "cuda", all_reduce_dtype=AllReduceDtype.INT8)

    def test_one_rank_needs_none(self) -> None:
        assert resolved(gpus(0), "auto", tensor_parallel_size=1) == ("auto", "auto")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_subject(BY_NAME["llama-gqa"], tmp_path_factory.mktemp("llama-gqa"))


RULES = rules_of(Transport.NCCL)
SEQUENCE, FUSED = ({"kv_sharding": kind} for kind in ("sequence", "sequence_fused"))
LITERAL = dict.fromkeys(("shard_embedding", "send_residual", "slice_boundary", "gather_logits"), True)
RUNS = [
    pytest.param("tp2", {}, with_recordings, id="tp2-replayed"),
    pytest.param("tp4", {}, with_recordings, id="tp4-replayed"),
    pytest.param("pp2", {}, with_recordings, id="pp2-replayed"),
    pytest.param("tp2-pp2", {}, with_recordings, id="tp2-pp2-replayed"),
    pytest.param("tp2-pp2", LITERAL, without_recordings, id="tp2-pp2-literal"),
    pytest.param("tp4", SEQUENCE, without_recordings, id="tp4-sequence"),
    pytest.param("tp4", FUSED, with_recordings, id="tp4-fused-replayed"),
]


@pytest.mark.parametrize(("layout", "how", "change_kernels"), RUNS)
def test_an_engine_exchanges_what_is_predicted(llama, make_fabrics, layout, how, change_kernels) -> None:
    settings = CROWDED | LAYOUTS[layout] | how
    fabrics = make_fabrics(parallel_config(**settings).world_size)
    llm = thread_llm(llama.folder, fabrics=fabrics, transport=Transport.NCCL, change_kernels=change_kernels, **settings)
    with closing(llm):
        plans = record_plans(llm)
        outputs = llm.generate(as_prompts(PROMPTS[i] for i in ORDER), GREEDY)
        assert tokens_of(outputs) == [llama.tokens[i] for i in ORDER]
        executor, model = llm.engine.model.executor, llm.engine.model.config
        assert_ledgers_as_predicted(executor.ledger_rows(), plans, model, parallel_config(**settings), RULES)
        assert [worker.exchange_differences() for worker in executor.workers] == [[]] * len(fabrics)


@pytest.mark.parametrize(("dtype", "sums"), [("bfloat16", "float32"), ("bfloat16", "auto"), ("float32", "bfloat16")])
def test_bytes_of_sums_in_another_type(llama, make_fabrics, dtype, sums) -> None:
    """Summands travel in that type, and so do their sums."""
    settings = CROWDED | LAYOUTS["tp2"] | {"all_reduce_dtype": sums}
    how = {"fabrics": make_fabrics(2), "transport": Transport.NCCL, "change_kernels": without_recordings}
    llm = thread_llm(llama.folder, dtype=dtype, **how, **settings)
    with closing(llm):
        plans = record_plans(llm)
        llm.generate(as_prompts(PROMPTS), GREEDY)
        executor, model = llm.engine.model.executor, llm.engine.model.config
        num_bytes = 4 if dtype == "float32" else 2
        config = parallel_config(**settings)
        assert_ledgers_as_predicted(executor.ledger_rows(), plans, model, config, RULES, activation_bytes=num_bytes)


def test_a_step_runs_on_the_ranks_own_gpu_in_whatever_thread(llama, monkeypatch) -> None:
    """Triton and CUDA's events take the GPU that the thread is set to."""
    worker = LLM(str(llama.folder), device="cpu", num_threads=1, max_model_len=64).engine.model.executor.worker
    worker._needs_device, chosen = True, []
    monkeypatch.setattr(Worker, "device", torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    new = NewSequence(seq_id=0, prompt_token_ids=(5, 6), params=GREEDY, seed=0)
    chunk = ScheduledChunk(0, 0, 2, (0,), False, True)
    worker.execute(StepPlan(step=0, sampled=(), new=(new,), finished=(), chunks=(chunk,), num_decode_tokens=0))
    assert chosen == [torch.device("cuda", 3)]


def test_sampled_requests(llama, make_fabrics) -> None:
    """Candidates, log probabilities and gathered logits, whose parts differ in size."""
    settings = CROWDED | LAYOUTS["tp4"]
    expected = sampled(LLM(str(llama.folder), dtype="float32", num_threads=1, max_model_len=64))
    how = {"fabrics": make_fabrics(4), "transport": Transport.NCCL, "change_kernels": without_recordings}
    with closing(thread_llm(llama.folder, **how, **settings)) as llm:
        plans = record_plans(llm)
        assert sampled(llm) == expected
        executor, model = llm.engine.model.executor, llm.engine.model.config
        assert_ledgers_as_predicted(executor.ledger_rows(), plans, model, parallel_config(**settings), RULES)
