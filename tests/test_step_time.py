"""An engine whose steps take a known time: how many prompt tokens it lets run beside others that decode."""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine_clock import set_engine_clock

from headrace import LLM, RequestOutput, SamplingParams
from headrace.cli import serve
from headrace.cli.model_options import engine_config
from headrace.config.engine import SERVING_STEP_S
from headrace.demo_model import demo_model_path
from headrace.engine.engine import Engine
from headrace.engine.load import LoadedModel
from headrace.engine.plan import StepPlan, StepResult

TOKEN_S, DECODE_S = 0.001, 0.01
LONG = tuple(20 + i % 300 for i in range(1000))
SHORT = tuple(range(40, 47))


class TimedExecutor:
    """Runs plans as they are, on a clock that plans alone move: 1 ms for a prompt token, 10 ms for a decode."""

    max_in_flight = 1

    def __init__(self, worker) -> None:
        self.worker, self.now_s, self.steps = worker, 0.0, []
        worker.reset()

    def monotonic(self) -> float:
        return self.now_s

    def submit(self, plan: StepPlan) -> None:
        self.plan = plan

    def collect(self) -> StepResult:
        num_decodes = self.plan.num_decode_tokens
        num_prompt_tokens = self.plan.num_tokens - num_decodes
        self.now_s += num_prompt_tokens * TOKEN_S + num_decodes * DECODE_S
        self.steps.append((num_decodes, num_prompt_tokens))
        return self.worker.execute(self.plan)


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with LLM(demo_model_path(), dtype="float32", num_threads=1, max_model_len=1024) as llm:
        yield llm.engine.model


@pytest.fixture
def executor(model, monkeypatch) -> TimedExecutor:
    executor = TimedExecutor(model.executor.worker)
    set_engine_clock(monkeypatch, executor.monotonic)
    return executor


def make_engine(model: LoadedModel, executor: TimedExecutor, max_step_s: float | None) -> Engine:
    scheduler = replace(model.plan.scheduler, max_step_s=max_step_s)
    return Engine(replace(model, executor=executor, plan=replace(model.plan, scheduler=scheduler)))


def run_beside_a_stream(engine: Engine) -> dict[str, RequestOutput]:
    """A short prompt streams when a long one comes, and then another short one."""
    finished: dict[str, RequestOutput] = {}

    def step() -> None:
        finished.update({u.request_id: u.finished for u in engine.step() if u.finished is not None})

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=30)
    engine.add_request("stream", SHORT, params)
    step()
    engine.add_request("long", LONG, replace(params, max_tokens=3))
    step()
    engine.add_request("late", SHORT[::-1], replace(params, max_tokens=3))
    while engine.has_unfinished:
        step()
    engine.check_integrity()
    return finished


def test_a_stream_goes_on_beside_a_long_prompt(model, executor):
    outputs = run_beside_a_stream(make_engine(model, executor, max_step_s=0.1))
    steps = [step for step in executor.steps if step[1]]
    assert steps[:2] == [(0, 7), (1, 32)], "nothing is known at first"
    # 42 ms for 32 prompt tokens and a decode make 76 in 100 ms: four blocks. 74 ms for 64 make 86: five.
    assert steps[2:4] == [(1, 64), (2, 80)]
    assert {num_prompt_tokens for _, num_prompt_tokens in steps[8:-1]} == {80}
    assert all(num_decodes * DECODE_S + n * TOKEN_S <= 0.1 + DECODE_S for num_decodes, n in steps)
    assert outputs["late"].metrics.ttft_s <= 0.1, "it ran beside the long one"
    assert outputs["stream"].metrics.tpot_s <= 0.1


def test_tokens_do_not_depend_on_it(model, executor):
    limited = run_beside_a_stream(make_engine(model, executor, max_step_s=0.05))
    assert len(executor.steps) > 30
    free = run_beside_a_stream(make_engine(model, TimedExecutor(executor.worker), max_step_s=None))
    tokens = [{name: o.outputs[0].token_ids for name, o in outputs.items()} for outputs in (limited, free)]
    assert tokens[0] == tokens[1]


def test_without_a_limit_prompts_take_the_whole_budget(model, executor):
    run_beside_a_stream(make_engine(model, executor, max_step_s=None))
    assert executor.steps[1] == (1, 1000)


def test_alone_a_prompt_takes_the_whole_budget(model, executor):
    engine = make_engine(model, executor, max_step_s=0.05)
    engine.add_request("alone", LONG, SamplingParams(temperature=0, max_tokens=2))
    while engine.has_unfinished:
        engine.step()
    assert executor.steps == [(0, 1000), (1, 0)]


@pytest.mark.parametrize(
    ("given", "max_step_s"),
    [([], SERVING_STEP_S), (["--max-step-time", "0.5"], 0.5), (["--max-step-time", "none"], None)],
)
def test_the_option_of_a_server(given, max_step_s):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert engine_config(parser.parse_args(given), show_progress=False).scheduler.max_step_s == max_step_s


def test_a_time_that_is_none(capsys):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--max-step-time", "soon"])
    assert "'soon' is neither a number of seconds nor 'none'" in capsys.readouterr().err
