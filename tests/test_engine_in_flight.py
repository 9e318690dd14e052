"""The engine over executors that answer late: the tokens of one plan at a time, whatever happens meanwhile."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_engine import copy_model, edit_json

from headrace import LLM, RequestOutput, SamplingParams
from headrace.demo_model import demo_model_path
from headrace.engine.engine import Engine
from headrace.engine.load import LoadedModel
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.worker import Worker

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)


class LateExecutor:
    """A pipeline of max_in_flight stages: plans are run in order, when they are submitted (is_eager) or when their
    result is asked for.

    occupancy: how many plans were open whenever a result was asked for.
    """

    def __init__(self, worker: Worker, max_in_flight: int, *, is_eager: bool = True) -> None:
        self.worker, self.max_in_flight, self.is_eager = worker, max_in_flight, is_eager
        self.open: deque[StepPlan | StepResult] = deque()
        self.occupancy: list[int] = []
        self.num_resets = 0
        worker.reset()

    def submit(self, plan: StepPlan) -> None:
        assert len(self.open) < self.max_in_flight
        self.open.append(self.worker.execute(plan) if self.is_eager else plan)

    def collect(self) -> StepResult:
        self.occupancy.append(len(self.open))
        oldest = self.open.popleft()
        return oldest if isinstance(oldest, StepResult) else self.worker.execute(oldest)

    def reset(self) -> None:
        self.num_resets += 1
        self.open.clear()
        self.worker.reset()


@cache
def demo_model() -> LoadedModel:
    return LLM(str(demo_model_path()), dtype="float32", num_threads=1, max_num_batched_tokens=256).engine.model


def make_engine(executor: LateExecutor, num_blocks: int = 200) -> Engine:
    model = demo_model()
    return Engine(replace(model, executor=executor, plan=replace(model.plan, num_blocks=num_blocks)))


def late_executor(max_in_flight: int, *, is_eager: bool = True) -> LateExecutor:
    return LateExecutor(demo_model().executor.worker, max_in_flight, is_eager=is_eager)  # type: ignore[attr-defined]


def drain(engine: Engine) -> dict[str, RequestOutput]:
    finished: dict[str, RequestOutput] = {}
    for _ in range(10_000):
        if not engine.has_unfinished:
            break
        for update in engine.step():
            if update.finished is not None:
                assert update.request_id not in finished
                finished[update.request_id] = update.finished
        engine.check_integrity()
    assert not engine.has_unfinished
    return finished


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@dataclass(frozen=True)
class Load:
    """A request, the step before which it arrives and the one before which its client leaves."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrives_at: int
    leaves_at: int | None


def alone(prompt: tuple[int, ...], params: SamplingParams) -> RequestOutput:
    """The oracle: the request alone, one plan at a time, with room for everything."""
    engine = Engine(demo_model())
    demo_model().executor.reset()
    engine.add_request("alone", prompt, params)
    return drain(engine)["alone"]


loads = st.builds(
    Load,
    prompt=st.builds(
        lambda stem, length, first: (*range(20, 20 + stem), first, *range(200, 200 + length)),
        st.sampled_from([0, 16, 40, 150]),
        st.integers(0, 40),
        st.integers(400, 403),
    ),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0, 0, 1.0]),
        seed=st.integers(0, 2),
        n=st.sampled_from([1, 1, 1, 3]),
        max_tokens=st.integers(1, 40),
        ignore_eos=st.just(True),
        presence_penalty=st.sampled_from([0, 0, 0.7]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
    ),
    arrives_at=st.integers(0, 8),
    leaves_at=st.none() | st.none() | st.integers(0, 40),
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    loads=st.lists(loads, min_size=2, max_size=8),
    max_in_flight=st.integers(1, 4),
    is_eager=st.booleans(),
    num_blocks=st.integers(15, 20),
)
def test_tokens_are_those_of_one_plan_at_a_time(
    loads: list[Load], max_in_flight: int, is_eager: bool, num_blocks: int
) -> None:
    """A cache for one to two of the longest requests: others are preempted, or wait."""
    expected = [alone(load.prompt, load.params) for load in loads]
    executor = late_executor(max_in_flight, is_eager=is_eager)
    engine = make_engine(executor, num_blocks)
    finished: dict[str, RequestOutput] = {}
    for step in count():
        for index, load in enumerate(loads):
            if load.arrives_at == step:
                engine.add_request(str(index), load.prompt, load.params)
            if load.leaves_at == step:
                update = engine.abort(str(index))
                if update is not None and update.finished is not None:
                    finished[update.request_id] = update.finished
        if step > 60 and not engine.has_unfinished:
            break
        for update in engine.step():
            if update.finished is not None:
                finished[update.request_id] = update.finished
        engine.check_integrity()
    for index, (load, oracle) in enumerate(zip(loads, expected, strict=True)):
        if str(index) not in finished:
            assert load.leaves_at is not None
            assert load.leaves_at <= load.arrives_at
            continue
        output = finished[str(index)]
        for mine, theirs in zip(output.outputs, oracle.outputs, strict=True):
            is_whole = mine.finish_reason != "abort"
            assert mine.token_ids == (theirs.token_ids if is_whole else theirs.token_ids[: len(mine.token_ids)])
        if all(completion.finish_reason != "abort" for completion in output.outputs):
            assert output.prompt_logprobs == oracle.prompt_logprobs
    assert engine.metrics().kv_cache_usage == 0


@pytest.mark.parametrize("max_in_flight", [1, 2, 3, 4])
def test_preempted_outputs_go_on_where_they_were(max_in_flight: int) -> None:
    prompts = [tuple(range(20 + index, 60 + index)) for index in range(8)]
    params = replace(GREEDY, max_tokens=50)
    engine = make_engine(late_executor(max_in_flight), num_blocks=16)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    finished = drain(engine)
    assert engine.metrics().num_preemptions > 0
    for index, prompt in enumerate(prompts):
        assert tokens_of(finished[str(index)]) == tokens_of(alone(prompt, params))


class TestOccupancy:
    @pytest.mark.parametrize("max_in_flight", [1, 2, 3, 4])
    def test_decodes_keep_every_stage_at_work(self, max_in_flight: int) -> None:
        executor = late_executor(max_in_flight)
        engine = make_engine(executor)
        for index in range(8):
            engine.add_request(str(index), [20 + index, 7, 8], replace(GREEDY, max_tokens=20))
        drain(engine)
        # All prompts fit into the first step, and 19 tokens of each are decoded, in as many plans as there are stages.
        assert executor.occupancy[1:-max_in_flight] == [max_in_flight] * (18 * max_in_flight)

    def test_one_long_prompt_keeps_every_stage_at_work(self) -> None:
        executor = late_executor(2)
        engine = make_engine(executor)
        engine.add_request("long", list(range(5, 905)), replace(GREEDY, max_tokens=1))
        drain(engine)
        assert executor.occupancy == [2] * 7 + [1]

    def test_one_request_has_one_plan_in_flight(self) -> None:
        executor = late_executor(3)
        engine = make_engine(executor)
        engine.add_request("one", [5, 6, 7], GREEDY)
        drain(engine)
        assert executor.occupancy == [1] * 8


class TestFaults:
    @pytest.mark.parametrize("place", ["submit", "collect"])
    @pytest.mark.parametrize("at_call", [1, 2, 5])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_step_that_fails_ends_its_requests_and_nothing_else(
        self, place: str, at_call: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        executor = late_executor(3)
        engine = make_engine(executor)
        works, calls = getattr(executor, place), count(1)

        def fail(*args: object) -> object:
            if next(calls) == at_call:
                raise error("injected")
            return works(*args)

        monkeypatch.setattr(executor, place, fail)
        for index in range(4):
            engine.add_request(str(index), [20 + index, 7, 8], GREEDY)
        with pytest.raises(error, match="injected"):
            drain(engine)
        assert executor.num_resets == 1
        failed = drain(engine)
        assert len(failed) == 4
        assert all("injected" in (output.outputs[0].error or "") for output in failed.values())
        engine.add_request("again", (20, 7, 8), GREEDY)
        assert tokens_of(drain(engine)["again"]) == tokens_of(alone((20, 7, 8), GREEDY))

    def test_clients_that_leave_with_everything_in_flight(self) -> None:
        """Results that nobody waits for are taken from the ranks, or they would come where others are awaited."""
        executor = late_executor(3)
        engine = make_engine(executor)
        for index in range(6):
            engine.add_request(str(index), [20 + index, 7, 8], GREEDY)
        engine.step()
        engine.step()
        for index in range(6):
            assert executor.open
            assert engine.abort(str(index)) is not None
        assert not executor.open
        assert not engine.has_unfinished
        engine.add_request("next", (30, 7, 8), GREEDY)
        assert tokens_of(drain(engine)["next"]) == tokens_of(alone((30, 7, 8), GREEDY))

    def test_prompt_that_fails_while_the_rest_of_it_is_in_flight(self, poisoned: LoadedModel) -> None:
        """Each of its chunks fails; its outputs fail once each, and the request ends once."""
        executor = LateExecutor(poisoned.executor.worker, 3)  # type: ignore[attr-defined]
        engine = Engine(replace(poisoned, executor=executor))
        good = (5, 6, 7)
        engine.add_request("good", good, replace(GREEDY, max_tokens=20))
        engine.add_request("bad", [5, 77, *range(100, 500)], replace(GREEDY, n=2, prompt_logprobs=0))
        finished = drain(engine)
        assert [output.finish_reason for output in finished["bad"].outputs] == ["error", "error"]
        assert finished["good"].outputs[0].finish_reason == "length"
        assert len(tokens_of(finished["good"])[0]) == 20
        assert engine.metrics().num_finished_requests == 2

    def test_last_prompt_that_fails_leaves_nothing_in_flight(self, poisoned: LoadedModel) -> None:
        executor = LateExecutor(poisoned.executor.worker, 3)  # type: ignore[attr-defined]
        engine = Engine(replace(poisoned, executor=executor))
        engine.add_request("bad", [5, 77, *range(100, 500)], replace(GREEDY, prompt_logprobs=0))
        assert drain(engine)["bad"].outputs[0].finish_reason == "error"
        assert executor.occupancy == [3, 2, 1]
        assert not executor.open

    def test_client_that_leaves_among_others(self) -> None:
        """Its token is still on the way, and is passed over."""
        engine = make_engine(late_executor(2))
        for index in range(4):
            engine.add_request(str(index), (20 + index, 7, 8), GREEDY)
        engine.step()
        engine.step()
        assert engine.abort("3") is not None
        finished = drain(engine)
        for index in range(3):
            assert tokens_of(finished[str(index)]) == tokens_of(alone((20 + index, 7, 8), GREEDY))

    def test_rank_that_fails_when_nobody_waits_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executor = late_executor(3)
        engine = make_engine(executor)
        engine.add_request("long", list(range(5, 605)), GREEDY)
        engine.step()

        def fail() -> StepResult:
            raise RuntimeError("injected")

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="injected"):
            patch.setattr(executor, "collect", fail)
            engine.abort("long")
        assert (executor.num_resets, engine.has_unfinished) == (1, False)
        engine.add_request("next", (30, 7, 8), GREEDY)
        assert tokens_of(drain(engine)["next"]) == tokens_of(alone((30, 7, 8), GREEDY))


@pytest.fixture
def poisoned(tmp_path: Path) -> Iterator[LoadedModel]:
    """Whatever has seen token 77 is NaN."""
    folder = copy_model(tmp_path)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][77] = float("nan")
    weights["lm_head.weight"] = torch.nan_to_num(weights["model.embed_tokens.weight"], nan=0.0).clone()
    save_file(weights, file)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    yield LLM(str(folder), dtype="float32", num_threads=1, max_num_batched_tokens=256).engine.model
