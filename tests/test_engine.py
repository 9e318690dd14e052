"""The engine from prompts to outputs, on the shipped model (text) and on poisoned copies of it (faults)."""

import gc
import json
import shutil
import weakref
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace import LLM, RequestOutput, SamplingParams
from headrace.demo_model import demo_model_path
from headrace.engine.plan import SampledToken, StepPlan, StepResult
from headrace.engine.rows import Row
from headrace.engine.sampler import SamplingRow
from headrace.engine.wire import decode_plan, encode_plan
from headrace.errors import CheckpointError, ConfigError, ContextLengthError, EngineStopped, RequestError

GREEDY = {"temperature": 0.0, "ignore_eos": True}
PROMPTS = ["The largest ocean is", "Hello", "What is 12 + 30?", "Once upon a time there was a small", "a b c d e f g"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(demo_model_path()), dtype="float32", num_threads=1, max_num_batched_tokens=64)


def text_of(output: RequestOutput) -> str:
    return output.outputs[0].text


class TestGenerate:
    def test_results_come_in_the_order_given(self, llm: LLM) -> None:
        params = [SamplingParams(**GREEDY, max_tokens=n) for n in (9, 1, 5, 7, 3)]
        outputs = llm.generate(PROMPTS, params)
        assert [o.prompt for o in outputs] == PROMPTS
        assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 1, 5, 7, 3]
        assert all(o.outputs[0].finish_reason == "length" for o in outputs)

    def test_token_ids_give_what_the_text_gives(self, llm: LLM) -> None:
        params = SamplingParams(**GREEDY, max_tokens=8)
        [by_text] = llm.generate(PROMPTS[0], params)
        [by_ids] = llm.generate({"prompt_token_ids": by_text.prompt_token_ids}, params)
        assert by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids
        assert text_of(by_ids) == text_of(by_text)
        assert by_ids.prompt is None

    def test_text_is_the_decoding_of_the_tokens(self, llm: LLM) -> None:
        tokenizer = llm.engine.model.tokenizer
        assert tokenizer is not None
        for output in llm.generate(PROMPTS, SamplingParams(temperature=1.5, seed=3, max_tokens=40, ignore_eos=True)):
            assert text_of(output) == tokenizer.decode(output.outputs[0].token_ids)

    def test_end_of_sequence_stops_and_has_no_text(self, llm: LLM) -> None:
        tokenizer, eos = llm.engine.model.tokenizer, llm.engine.model.eos_token_ids
        assert tokenizer is not None
        [output] = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(temperature=0, max_tokens=60))
        assert output.outputs[0].finish_reason == "stop"
        assert output.outputs[0].stop_reason is None
        assert output.outputs[0].token_ids[-1] in eos
        assert text_of(output) == tokenizer.decode(output.outputs[0].token_ids[:-1])

    def test_ignore_eos_goes_on(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        [output] = llm.chat([{"role": "user", "content": "Hello"}], params)
        assert len(output.outputs[0].token_ids) == 60

    def test_min_tokens_holds_the_end_back(self, llm: LLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=60, min_tokens=45)
        [output] = llm.chat([{"role": "user", "content": "Hello"}], params)
        assert len(output.outputs[0].token_ids) >= 45
        assert not set(output.outputs[0].token_ids[:44]) & llm.engine.model.eos_token_ids

    def test_stop_token_ends_and_is_reported(self, llm: LLM) -> None:
        [whole] = llm.generate(PROMPTS[0], SamplingParams(**GREEDY, max_tokens=12))
        stop = whole.outputs[0].token_ids[5]
        first = whole.outputs[0].token_ids.index(stop)
        [output] = llm.generate(PROMPTS[0], SamplingParams(**GREEDY, max_tokens=12, stop_token_ids=(stop,)))
        assert output.outputs[0].token_ids == whole.outputs[0].token_ids[: first + 1]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)

    @pytest.mark.parametrize("include", [False, True])
    def test_stop_string_may_lie_across_tokens(self, llm: LLM, include: bool) -> None:
        [whole] = llm.generate(PROMPTS[3], SamplingParams(**GREEDY, max_tokens=24))
        text = text_of(whole)
        tokenizer = llm.engine.model.tokenizer
        assert tokenizer is not None
        border = len(tokenizer.decode(whole.outputs[0].token_ids[:12]))
        stop = text[border - 2 : border + 3]
        params = SamplingParams(**GREEDY, max_tokens=24, stop=(stop,), include_stop_str_in_output=include)
        [output] = llm.generate(PROMPTS[3], params)
        end = text.index(stop) + (len(stop) if include else 0)
        assert text_of(output) == text[:end]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)

    def test_length_of_the_model_ends_an_output_without_max_tokens(self) -> None:
        llm = LLM(str(demo_model_path()), num_threads=1, max_model_len=24)
        [output] = llm.generate({"prompt_token_ids": [5] * 20}, SamplingParams(**GREEDY, max_tokens=None))
        assert len(output.outputs[0].token_ids) == 4
        assert output.outputs[0].finish_reason == "length"


class TestSampling:
    def test_seeded_request_is_the_same_alone_and_in_a_batch(self, llm: LLM) -> None:
        params = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=20, ignore_eos=True)
        [alone] = llm.generate(PROMPTS[1], params)
        others = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
        batch = llm.generate(PROMPTS, [others, params, others, others, others])
        assert batch[1].outputs[0].token_ids == alone.outputs[0].token_ids

    def test_outputs_of_one_request_differ_and_repeat_with_the_seed(self, llm: LLM) -> None:
        params = SamplingParams(temperature=1.2, seed=5, n=4, max_tokens=16, ignore_eos=True)
        [first] = llm.generate(PROMPTS[1], params)
        [second] = llm.generate(PROMPTS[1], params)
        tokens = [o.token_ids for o in first.outputs]
        assert tokens == [o.token_ids for o in second.outputs]
        assert len({tuple(t) for t in tokens}) == 4
        assert [o.index for o in first.outputs] == [0, 1, 2, 3]
        assert first.metrics.num_completion_tokens == 64

    def test_unseeded_requests_differ(self, llm: LLM) -> None:
        params = SamplingParams(temperature=1.5, max_tokens=24, ignore_eos=True)
        a, b = (llm.generate(PROMPTS[1], params)[0] for _ in range(2))
        assert a.outputs[0].token_ids != b.outputs[0].token_ids

    def test_logprobs_are_those_of_the_model(self, llm: LLM) -> None:
        """Oracle: transformers on the same float32 weights."""
        transformers = pytest.importorskip("transformers")
        oracle = transformers.AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
        params = SamplingParams(**GREEDY, max_tokens=6, logprobs=3, prompt_logprobs=2)
        [output] = llm.generate(PROMPTS[3], params)
        completion = output.outputs[0]
        ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
        with torch.inference_mode():
            expected = torch.log_softmax(oracle(ids).logits[0].double(), dim=-1)
        num_prompt = len(output.prompt_token_ids)
        assert completion.logprobs is not None
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        rows = [*output.prompt_logprobs[1:], *completion.logprobs]
        assert len(output.prompt_logprobs) == num_prompt
        for position, row in enumerate(rows):
            assert row is not None
            assert int(ids[0, position + 1]) in row
            for token_id, entry in row.items():
                assert entry.logprob == pytest.approx(float(expected[position, token_id]), abs=1e-3)
                assert entry.rank == 1 + int((expected[position] > expected[position, token_id]).sum())

    def test_siblings_share_a_scored_prompt(self) -> None:
        """Each of n outputs used to compute and score the whole prompt again."""
        llm = LLM(str(demo_model_path()), dtype="float32", num_threads=1)
        ids, params = list(range(10, 110)), SamplingParams(**GREEDY, n=4, max_tokens=4, prompt_logprobs=1)
        [output] = llm.generate({"prompt_token_ids": ids}, params)
        assert llm.engine.metrics().num_prefill_tokens == 100 + 3 * (100 % 16)
        assert output.prompt_logprobs is not None
        assert None not in output.prompt_logprobs[1:]
        assert len({tuple(o.token_ids) for o in output.outputs}) == 1

    def test_prompt_logprobs_do_not_come_from_cached_blocks(self, llm: LLM) -> None:
        """Cached blocks have no logits: such a request computes its whole prompt, in chunks of the token budget."""
        ids = list(range(10, 110))
        params = SamplingParams(**GREEDY, max_tokens=2, prompt_logprobs=0)
        first, second = (llm.generate({"prompt_token_ids": ids}, params)[0] for _ in range(2))
        assert second.metrics.num_cached_tokens == 0
        assert first.prompt_logprobs == second.prompt_logprobs
        assert second.prompt_logprobs is not None
        assert None not in second.prompt_logprobs[1:]


class TestStream:
    def test_pieces_join_to_the_text(self, llm: LLM) -> None:
        params = SamplingParams(**GREEDY, max_tokens=30)
        [whole] = llm.generate(PROMPTS[3], params)
        with llm.stream(PROMPTS[3], params) as stream:
            chunks = list(stream)
        assert "".join(chunk.text for chunk in chunks) == text_of(whole)
        assert [i for chunk in chunks for i in chunk.token_ids] == whole.outputs[0].token_ids
        assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"]
        assert stream.output is not None
        assert text_of(stream.output) == text_of(whole)

    def test_leaving_early_stops_the_request_and_keeps_what_it_has(self, llm: LLM) -> None:
        with llm.stream(PROMPTS[3], SamplingParams(**GREEDY, max_tokens=500)) as stream:
            for count, _ in enumerate(stream):
                if count == 3:
                    break
        assert stream.output is not None
        assert stream.output.outputs[0].finish_reason == "abort"
        assert len(stream.output.outputs[0].token_ids) == 4
        assert not llm.engine.has_unfinished
        llm.engine.check_integrity()

    def test_streams_and_batches_share_an_engine(self, llm: LLM) -> None:
        params = SamplingParams(**GREEDY, max_tokens=12)
        alone = [text_of(o) for o in llm.generate(PROMPTS[:3], params)]
        first, second = llm.stream(PROMPTS[0], params), llm.stream(PROMPTS[1], params)
        pieces: list[list[str]] = [[], []]
        a, b = iter(first), iter(second)
        pieces[0].append(next(a).text)
        pieces[1].append(next(b).text)
        assert text_of(llm.generate(PROMPTS[2], params)[0]) == alone[2]
        pieces[0] += [chunk.text for chunk in a]
        pieces[1] += [chunk.text for chunk in b]
        assert ["".join(p) for p in pieces] == alone[:2]

    def test_dropped_stream_does_not_run_on(self, llm: LLM) -> None:
        """A listener that held the stream kept its request running in every later call."""
        for _ in llm.stream(PROMPTS[3], SamplingParams(**GREEDY, max_tokens=900)):
            break
        gc.collect()
        llm.generate(PROMPTS[1], SamplingParams(**GREEDY, max_tokens=2))
        assert not llm.engine.has_unfinished

    def test_stream_whose_request_was_aborted_ends(self, llm: LLM) -> None:
        """It used to wait for ever for an update that could not come."""
        stream = llm.stream(PROMPTS[3], SamplingParams(**GREEDY, max_tokens=50))
        stream.advance()
        assert llm.engine.abort(next(iter(llm.engine._requests._requests))) is not None
        assert list(stream) == []
        assert stream.is_finished


class TestFaults:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
    @pytest.mark.parametrize("at_step", [1, 3])
    def test_step_that_fails_ends_its_requests_and_nothing_else(
        self, error: type[BaseException], at_step: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The scheduler used to refuse every later step: "planned but not updated"."""
        llm = LLM(str(demo_model_path()), dtype="float32", num_threads=1)
        params = SamplingParams(**GREEDY, max_tokens=8)
        expected = text_of(llm.generate(PROMPTS[0], params)[0])
        stream, steps = llm.stream(PROMPTS[1], params), count(1)
        worker = llm.engine.model.executor.worker
        execute = worker.execute

        def fail(plan: StepPlan) -> StepResult:
            if next(steps) == at_step:
                raise error("injected")
            return execute(plan)

        monkeypatch.setattr(worker, "execute", fail)
        with pytest.raises(error, match="injected"):
            llm.generate(PROMPTS[0], params)
        assert text_of(llm.generate(PROMPTS[0], params)[0]) == expected
        assert [chunk.finish_reason for chunk in stream][-1] == "error"
        assert stream.output is not None
        assert "injected" in (stream.output.outputs[0].error or "")
        assert not llm.engine.has_unfinished
        llm.engine.check_integrity()

    @pytest.mark.parametrize("params", [{"temperature": 0}, 5, [SamplingParams(), "x"]])
    def test_params_that_are_none(self, llm: LLM, params: object) -> None:
        with pytest.raises(RequestError, match="give SamplingParams"):
            llm.generate(["a", "b"], params)  # type: ignore[arg-type]

    def test_no_messages(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match="message"):
            llm.chat([])

    def test_text_that_is_not_unicode(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match="surrogate"):
            llm.generate("half an emoji: \ud83d")

    def test_numpy_token_ids_are_integers(self, llm: LLM) -> None:
        params = SamplingParams(**GREEDY, max_tokens=4)
        ids = np.arange(20, 40)
        by_numpy, by_list = (llm.generate({"prompt_token_ids": i}, params)[0] for i in (ids, ids.tolist()))
        assert by_numpy.outputs[0].token_ids == by_list.outputs[0].token_ids

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ({"prompt_token_ids": []}, "0 tokens"),
            ({"prompt_token_ids": [1, 10**6]}, "1000000 is not in the vocabulary; allowed: 0 to"),
            ({"prompt_token_ids": [1, -1]}, "-1 is not in the vocabulary"),
            ({"prompt_token_ids": [1, "x"]}, "'x' is not in the vocabulary"),
            ({"prompt_token_ids": [1, True]}, "token ids are integers"),
            ({"prompt_token_ids": 5}, "give a list of integers"),
            ({"prompt_tokens": [1]}, "give a string or"),
            (None, "give a string or"),
            ({"prompt_token_ids": [1] * 1024}, "1024 tokens"),
        ],
    )
    def test_bad_prompt_is_refused_and_harms_nobody(
        self, llm: LLM, prompt: dict[str, object] | None, message: str
    ) -> None:
        with pytest.raises(RequestError, match=message):
            llm.generate([PROMPTS[0], prompt], SamplingParams(**GREEDY, max_tokens=4))
        assert not llm.engine.has_unfinished
        llm.engine.check_integrity()
        assert len(llm.generate(PROMPTS[0], SamplingParams(**GREEDY, max_tokens=4))) == 1

    def test_unknown_setting_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'block_size'"):
            LLM(str(demo_model_path()), blok_size=16)

    def test_unknown_dtype_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'float32'"):
            LLM(str(demo_model_path()), dtype="float23")

    def test_different_numbers_of_prompts_and_params(self, llm: LLM) -> None:
        with pytest.raises(RequestError, match="2 sampling params for 1 prompts"):
            llm.generate("a", [SamplingParams(), SamplingParams()])

    def test_budget_too_small_for_one_request(self) -> None:
        with pytest.raises(ConfigError, match="too few for one sequence of max_model_len"):
            LLM(str(demo_model_path()), kv_cache_bytes=100_000)

    def test_longer_than_the_positions_reach(self) -> None:
        with pytest.raises(ContextLengthError, match="positions reach 1024"):
            LLM(str(demo_model_path()), max_model_len=2000)

    def test_request_larger_than_the_cache_is_refused(self) -> None:
        llm = LLM(str(demo_model_path()), num_blocks=4, num_threads=1)
        with pytest.raises(ContextLengthError, match="max_tokens to at most"):
            llm.generate({"prompt_token_ids": [5] * 40}, SamplingParams(max_tokens=100))
        assert len(llm.generate({"prompt_token_ids": [5] * 40}, SamplingParams(max_tokens=8))) == 1

    def test_request_whose_logits_are_nan_fails_alone(self, tmp_path: Path) -> None:
        """A poisoned embedding row reaches only the sequences that contain its token, also through reused blocks."""
        folder = copy_model(tmp_path)
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights["model.embed_tokens.weight"][77] = float("nan")
        weights["lm_head.weight"] = torch.nan_to_num(weights["model.embed_tokens.weight"], nan=0.0).clone()
        save_file(weights, file)
        edit_json(folder / "config.json", tie_word_embeddings=False)
        llm = LLM(str(folder), dtype="float32", num_threads=1, num_blocks=6)
        params = SamplingParams(**GREEDY, max_tokens=10, logit_bias={77: -100})
        good = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(3)]
        expected = [o.outputs[0].token_ids for o in llm.generate(good, params)]
        outputs = llm.generate([good[0], {"prompt_token_ids": [5, 77, 9]}, good[1], good[2]], params)
        assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length", "length"]
        assert "NaN" in (outputs[1].outputs[0].error or "")
        assert [outputs[i].outputs[0].token_ids for i in (0, 2, 3)] == expected
        llm.engine.check_integrity()

    def test_missing_tokenizer_is_told_before_weights_are_read(self, tmp_path: Path) -> None:
        folder = copy_model(tmp_path)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
            LLM(str(folder), require_tokenizer=True)
        llm = LLM(str(folder), num_threads=1)
        assert llm.generate({"prompt_token_ids": [5]}, SamplingParams(**GREEDY, max_tokens=2))[0].outputs[0].text == ""
        with pytest.raises(RequestError, match="give prompt_token_ids"):
            llm.generate("text")
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            llm.generate({"prompt_token_ids": [5]}, SamplingParams(stop=("x",)))


class TestMetrics:
    def test_times_are_in_order_and_counted_once(self, llm: LLM) -> None:
        [output] = llm.generate(PROMPTS[0], SamplingParams(**GREEDY, max_tokens=5))
        m = output.metrics
        assert m.scheduled_s is not None
        assert m.first_token_s is not None
        assert m.finished_s is not None
        assert m.arrival_s <= m.scheduled_s <= m.first_token_s <= m.finished_s
        assert m.ttft_s == m.first_token_s - m.arrival_s
        assert m.tpot_s == pytest.approx((m.finished_s - m.first_token_s) / 4)
        assert (m.num_prompt_tokens, m.num_completion_tokens) == (len(output.prompt_token_ids), 5)

    def test_one_token_has_no_interval(self, llm: LLM) -> None:
        [output] = llm.generate(PROMPTS[0], SamplingParams(**GREEDY, max_tokens=1))
        assert output.metrics.tpot_s is None

    def test_engine_counts_tokens_and_hits(self) -> None:
        llm = LLM(str(demo_model_path()), num_threads=1)
        ids = list(range(5, 45))
        params = SamplingParams(**GREEDY, max_tokens=3)
        llm.generate({"prompt_token_ids": ids}, params)
        before = llm.engine.metrics()
        [output] = llm.generate({"prompt_token_ids": ids}, params)
        after = llm.engine.metrics()
        assert output.metrics.num_cached_tokens == 32
        assert after.prefix_hit_tokens - before.prefix_hit_tokens == 32
        assert after.num_prefill_tokens - before.num_prefill_tokens == 8
        assert after.num_decode_tokens - before.num_decode_tokens == 2
        assert (after.num_running, after.num_waiting, after.kv_cache_usage) == (0, 0, 0.0)


def test_plans_are_data_that_any_rank_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second worker follows plans that went through JSON. What it samples is thrown away, as on a rank that has no
    logits, and yet it runs the same rows."""
    llm, second = (
        LLM(str(demo_model_path()), dtype="float32", num_threads=1, max_num_batched_tokens=64) for _ in range(2)
    )
    mine, theirs = record_rows(llm, monkeypatch), record_rows(second, monkeypatch)
    leader, follower = llm.engine.model.executor.worker, second.engine.model.executor.worker
    execute = leader.execute

    def execute_both(plan: StepPlan) -> StepResult:
        follower.execute(decode_plan(encode_plan(plan)))
        return execute(plan)

    monkeypatch.setattr(follower, "_sampler", OnlyZeros())
    monkeypatch.setattr(leader, "execute", execute_both)
    params = SamplingParams(temperature=1.0, seed=9, n=2, max_tokens=12, presence_penalty=0.5, ignore_eos=True)
    llm.generate([{"prompt_token_ids": list(range(10, 110))}, PROMPTS[0]], params)
    assert len(mine) > 10
    assert mine == theirs


class OnlyZeros:
    def sample(self, logits: torch.Tensor, rows: list[SamplingRow], largest: object) -> StepResult:
        return StepResult(sampled=tuple(SampledToken(seq_id=r.seq_id, token_id=0) for r in rows), failed={})


def record_rows(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[object, ...]]]:
    runner = llm.engine.model.executor.worker._runner  # type: ignore[attr-defined]
    recorded = []

    def spy(name: str) -> None:
        run = getattr(runner, name)

        def spied(rows: list[Row]) -> object:
            recorded.append([(row.token_ids, row.start, tuple(row.block_table)) for row in rows])
            return run(rows)

        monkeypatch.setattr(runner, name, spied)

    spy("run")
    spy("next_logits")
    return recorded


def copy_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return folder


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "int8"])
def test_kv_cache_of_another_type_answers_alike(kv_cache_dtype: str) -> None:
    llm = LLM(demo_model_path(), kv_cache_dtype=kv_cache_dtype, num_threads=1)
    output = llm.chat([{"role": "user", "content": "What is the largest ocean?"}], SamplingParams(temperature=0))[0]
    assert text_of(output) == "The largest ocean is the Pacific Ocean."
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int9'; did you mean 'int8'"):
        LLM(demo_model_path(), kv_cache_dtype="int9")


class TestClose:
    def test_a_closed_model_lets_go_of_its_weights_and_says_so(self) -> None:
        llm = LLM(str(demo_model_path()), num_threads=1)
        weights = [weakref.ref(p) for p in llm.engine.model.executor.worker._runner._decoder.parameters()]
        assert all(weight() is not None for weight in weights)
        llm.close()
        llm.close()
        assert all(weight() is None for weight in weights)
        assert not llm.engine.model.linear_weights.by_shape
        for _ in range(2):
            with pytest.raises(EngineStopped, match="the model was closed; load it again"):
                llm.generate(PROMPTS[0])
