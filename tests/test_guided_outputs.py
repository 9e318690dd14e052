"""Outputs of a prescribed form: they have it, whatever else the request asks for, on every layout, and cost nobody else
anything."""

import json
import re
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_cases import closing
from planned_run import assert_ledgers_as_predicted, record_plans
from thread_world import thread_llm
from tiny_model import write_tiny_model

from headrace import LLM, SamplingParams
from headrace.config import Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import rules_of
from headrace.demo_model import demo_model_path
from headrace.engine.plan import NewSequence, StepPlan
from headrace.engine.wire import decode_plan, encode_plan
from headrace.errors import RequestError
from headrace.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
DATE = r"(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]"
TREE = 'start: "(" start? start? ")"'
TEMPERATURES = (0.0, 1.5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Random weights: whatever it says, the form is not its own idea."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(tiny):
    with closing(LLM(str(tiny), num_threads=1, max_model_len=256, num_blocks=64, block_size=16)) as llm:
        yield llm


@pytest.fixture(scope="module")
def demo():
    with closing(LLM(str(demo_model_path()), num_threads=1, max_model_len=256)) as llm:
        yield llm


def guided(form: dict[str, Any], **settings: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=form, **{"max_tokens": 150, "seed": 1, **settings})


def outputs_of(llm: LLM, *params: SamplingParams, prompt: str = "hello") -> list[Any]:
    return [output for result in llm.generate([prompt] * len(params), list(params)) for output in result.outputs]


def assert_person(output) -> None:
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    jsonschema_rs.validate(PERSON, json.loads(output.text))


@pytest.mark.parametrize("model", ["llm", "demo"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_every_form(request, model, temperature):
    llm = request.getfixturevalue(model)
    how = {"temperature": temperature, "n": 3}
    forms = [{"json": PERSON}, {"regex": DATE}, {"choice": ["yes", "no way", "déjà vu"]}, {"grammar": TREE}]
    person, date, choice, tree = llm.generate(["hello"] * 4, [guided(form, **how) for form in forms])
    for output in person.outputs:
        assert_person(output)
    for output in date.outputs:
        assert re.fullmatch(DATE, output.text)
        assert output.finish_reason == "stop"
    for output in choice.outputs:
        assert output.text in forms[2]["choice"]
        assert output.finish_reason == "stop"
    for output in tree.outputs:
        assert has_balance(output.text, is_whole=output.finish_reason == "stop")


def has_balance(text: str, *, is_whole: bool) -> bool:
    depths = [text[:end].count("(") - text[:end].count(")") for end in range(1, len(text) + 1)]
    return set(text) <= {"(", ")"} and min(depths[:-1], default=1) > 0 and (depths[-1] == 0) == is_whole


def test_a_json_object_of_any_content(demo):
    """A model that cannot end says how far it came: its text begins an object."""
    for output in outputs_of(demo, *(guided({"json_object": True}, seed=seed, max_tokens=60) for seed in range(8))):
        if output.finish_reason == "stop":
            assert isinstance(json.loads(output.text), dict)
        else:
            assert output.finish_reason == "length"
            assert output.text.startswith("{")


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
scalars = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.integers(-50, 50).flatmap(
        lambda low: st.integers(0, 100).map(lambda n: {"type": "integer", "minimum": low, "maximum": low + n})
    ),
    st.integers(0, 3).flatmap(
        lambda low: st.integers(0, 3).map(lambda n: {"type": "string", "minLength": low, "maxLength": low + n})
    ),
    st.lists(st.one_of(names, st.integers(-9, 9), st.none(), st.booleans()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(["^[a-c]{2}$", "^(x|yz){1,2}$", "^[^a-y]?$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.sampled_from(["date", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
)


def extend(children):
    objects = st.dictionaries(names, children, max_size=3).flatmap(
        lambda properties: st.lists(st.sampled_from(sorted(properties) or [""]), unique=True).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": [name for name in required if name in properties],
                "additionalProperties": False,
            }
        )
    )
    arrays = st.tuples(children, st.integers(0, 2), st.integers(0, 1)).map(
        lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
    )
    return st.one_of(objects, arrays, st.lists(children, min_size=1, max_size=3).map(lambda s: {"anyOf": s}))


schemas = st.recursive(scalars, extend, max_leaves=5)


@given(schema=schemas, temperature=st.sampled_from(TEMPERATURES), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_outputs_of_any_schema_parse_and_are_valid(llm, schema, temperature, seed):
    [output] = outputs_of(llm, guided({"json": schema}, temperature=temperature, seed=seed))
    assert output.error is None
    if output.finish_reason == "stop":
        jsonschema_rs.validate(schema, json.loads(output.text), validate_formats=True)
    else:
        assert output.finish_reason == "length"
        assert len(output.token_ids) == 150


def test_an_output_that_is_cut_is_a_beginning(llm):
    whole, cut = outputs_of(llm, guided({"json": PERSON}), guided({"json": PERSON}, max_tokens=7))
    assert_person(whole)
    assert cut.finish_reason == "length"
    assert cut.token_ids == whole.token_ids[:7]


def test_a_form_that_is_complete_with_the_last_token_is_not_cut(llm):
    [whole] = outputs_of(llm, guided({"json": PERSON}))
    [exact] = outputs_of(llm, guided({"json": PERSON}, max_tokens=len(whole.token_ids)))
    assert_person(exact)


def test_min_tokens_hold_an_end_back_where_more_may_follow(llm):
    short, long = outputs_of(
        llm,
        guided({"regex": "[ab]*"}, logit_bias={2: 100.0}),
        guided({"regex": "[ab]*"}, logit_bias={2: 100.0}, min_tokens=9),
    )
    assert short.text == ""
    assert len(long.token_ids) == 10
    assert re.fullmatch("[ab]{9,}", long.text)
    # A form that is complete has nothing to go on with.
    [complete] = outputs_of(llm, guided({"choice": ["yes"]}, min_tokens=50))
    assert (complete.text, complete.finish_reason) == ("yes", "stop")


def test_ignore_eos_goes_on_as_long_as_the_form_does(llm):
    endless, complete = outputs_of(
        llm,
        guided({"regex": "[ab]*"}, logit_bias={2: 100.0}, ignore_eos=True, max_tokens=20),
        guided({"json": PERSON}, logit_bias={2: 100.0}, ignore_eos=True),
    )
    assert len(endless.token_ids) == 20
    assert endless.finish_reason == "length"
    assert re.fullmatch("[ab]+", endless.text)
    assert_person(complete)
    assert 2 not in endless.token_ids + complete.token_ids


def test_stop_strings_and_stop_tokens_end_an_output_before_its_form_does(llm):
    [whole] = outputs_of(llm, guided({"json": PERSON}))
    stop_id = whole.token_ids[4]
    by_text, by_token = outputs_of(
        llm, guided({"json": PERSON}, stop='"age'), guided({"json": PERSON}, stop_token_ids=[stop_id])
    )
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", '"age')
    assert by_text.text == whole.text[: whole.text.index('"age')]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", stop_id)
    assert by_token.token_ids == whole.token_ids[: whole.token_ids.index(stop_id) + 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": dict.fromkeys(range(3, 60), 100.0)},
        {"repetition_penalty": 3.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.1},
        {"top_p": 0.999},
        {"min_p": 0.9},
        {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "temperature": 100.0},
        {"logprobs": 3, "prompt_logprobs": 2},
    ],
    ids="+".join,
)
def test_nothing_else_that_a_request_asks_for_breaks_the_form(llm, changes):
    for output in outputs_of(llm, guided({"json": PERSON}, n=2, **{"temperature": 1.5, **changes})):
        assert_person(output)


def test_log_probabilities_are_of_the_raw_logits(llm):
    """Of the first token: what the model would have said, and how likely it thinks what it must say."""
    free, forced = outputs_of(
        llm,
        SamplingParams(temperature=0, max_tokens=1, logprobs=20),
        guided({"choice": ["{"]}, temperature=0, logprobs=20),
    )
    [chosen] = forced.token_ids
    likely, beside = free.logprobs[0], forced.logprobs[0]
    assert chosen not in list(likely)[:1]
    assert {i: beside[i] for i in likely} == likely
    assert beside[chosen].rank >= 1
    assert beside[chosen].logprob <= max(entry.logprob for entry in likely.values())


def test_tokens_are_the_same_alone_and_in_a_batch(llm):
    params = [
        guided({"json": PERSON}, temperature=1.5, seed=3),
        SamplingParams(max_tokens=40, seed=4, ignore_eos=True),
        guided({"regex": DATE}, temperature=0),
        guided({"json": PERSON}, temperature=0.7, seed=5, n=2),
        SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    ]
    alone = [[output.token_ids for output in outputs_of(llm, p)] for p in params]
    together = [[o.token_ids for o in result.outputs] for result in llm.generate(["hello"] * 5, params)]
    assert together == alone


def test_an_output_that_cannot_go_on_fails_alone(llm):
    """A limit reached on the way, and tokens that the form demands and min_tokens forbids."""
    demanded = llm.engine.model.tokenizer.encode("q", add_special_tokens=False)
    limit, forbidden, fine = outputs_of(
        llm,
        guided({"regex": "say [ab]a{1000000}"}, temperature=0),
        guided({"regex": "(xy)?q{3}"}, min_tokens=3, stop_token_ids=[*demanded, *b"x"]),
        guided({"json": PERSON}),
    )
    assert_person(fine)
    assert limit.finish_reason == "error"
    assert "cannot go on" in limit.error
    assert re.match("say [ab]", limit.text)
    # Whatever is allowed first may be a token other than the two.
    assert forbidden.finish_reason in ("error", "stop")


def test_a_row_without_a_token_names_the_form(llm):
    token_ids = llm.engine.model.tokenizer.encode("q", add_special_tokens=False)
    [output] = outputs_of(llm, guided({"regex": "q"}, min_tokens=1, stop_token_ids=token_ids))
    assert output.finish_reason == "error"
    assert "structured_outputs" in output.error


@pytest.mark.parametrize("form", [{"regex": "a("}, {"json": {"not": {}}}, {"grammar": "begin: 'a'"}])
def test_a_refused_form_leaves_nothing_behind(llm, form):
    with pytest.raises(RequestError):
        llm.generate("hello", guided(form))
    assert not llm.engine.has_unfinished
    assert not llm.engine._guides._matchers


def test_nothing_is_kept_of_what_has_ended(llm):
    with llm.stream("hello", guided({"json": PERSON}, n=2)) as stream:
        stream.advance()
        assert llm.engine._guides._matchers
    assert not llm.engine._guides._matchers
    outputs_of(llm, guided({"json": PERSON}), guided({"regex": "[ab]*"}, max_tokens=5))
    assert not llm.engine._guides._matchers


def test_a_grammar_may_be_compiled_before(llm):
    params = guided({"json": PERSON})
    grammar = llm.engine.grammar_compiler.compile(params.structured_outputs)
    for name in ("first", "second"):
        llm.engine.add_request(name, [5, 6], params, grammar=grammar)
    finished = {}
    while llm.engine.has_unfinished:
        finished |= {u.request_id: u.finished for u in llm.engine.step() if u.finished}
    assert finished["first"].outputs[0].token_ids == finished["second"].outputs[0].token_ids
    assert_person(finished["first"].outputs[0])
    with pytest.raises(RequestError, match="structured_outputs"):
        llm.engine.add_request("third", [5, 6], replace(params, structured_outputs=None), grammar=grammar)


def test_a_model_without_a_tokenizer_refuses(tmp_path):
    folder = write_tiny_model(tmp_path / "bare", with_tokenizer=False)
    with (
        closing(LLM(str(folder), num_threads=1, max_model_len=64)) as llm,
        pytest.raises(RequestError, match="tokenizer"),
    ):
        llm.generate({"prompt_token_ids": [5]}, guided({"regex": "a"}))


def test_plans_have_masks_for_those_who_need_them_and_ranks_no_grammar(llm):
    plans = record_plans(llm)
    params = [guided({"json": PERSON}), SamplingParams(max_tokens=20, ignore_eos=True)]
    llm.generate(["hello"] * 2, params)
    for plan in plans:
        assert all(new.params.structured_outputs is None for new in plan.new)
        sampled = {chunk.seq_id for chunk in plan.chunks if chunk.samples}
        assert {seq_id for seq_id, _ in plan.masks} <= sampled
        assert decode_plan(encode_plan(plan)) == plan
    assert sum(len(plan.masks) for plan in plans) > 10
    plans.clear()
    llm.generate("hello", params[1])
    assert {plan.masks for plan in plans} == {()}


def test_masks_survive_the_wire():
    masks = ((3, bytes(range(256))), (5, b""))
    new = NewSequence(seq_id=3, prompt_token_ids=(1,), params=SamplingParams(), seed=0)
    plan = StepPlan(step=1, sampled=(), new=(new,), finished=(), chunks=(), num_decode_tokens=0, masks=masks)
    assert decode_plan(encode_plan(plan)) == plan


CROWD = [
    guided({"json": PERSON}, temperature=0),
    guided({"json": PERSON}, temperature=1.5, seed=2),
    guided({"regex": DATE}, temperature=1.0, top_k=20, seed=3),
    guided({"json": PERSON}, temperature=1.2, top_p=0.9, seed=4, n=2),
    guided({"json": PERSON}, temperature=1.0, min_p=0.05, seed=5, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1, max_tokens=30, ignore_eos=True, seed=6),
]
"""With too few blocks for all, so that some are preempted and start over."""
CROWDED = {"max_model_len": 256, "num_blocks": 24, "block_size": 8, "max_num_batched_tokens": 16, "max_num_seqs": 5}
LAYOUTS = {
    "tp2": {"tensor_parallel_size": 2},
    "tp2-literal": {"tensor_parallel_size": 2, "gather_logits": True},
    "pp2": {"pipeline_parallel_size": 2},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}


def crowd_of(llm: LLM) -> list[list[tuple[list[int], str]]]:
    prompts = ["hello there", "one two three four five six", "the quick brown fox", "a", "b", "dog", "hello there"]
    results = llm.generate(prompts, CROWD)
    for result, params in zip(results, CROWD, strict=True):
        for output in result.outputs:
            if params.structured_outputs is not None and params.structured_outputs.json is not None:
                assert_person(output)
    return [[(output.token_ids, output.finish_reason) for output in result.outputs] for result in results]


@pytest.fixture(scope="module")
def expected(tiny):
    """Of one process with room for all."""
    with closing(LLM(str(tiny), dtype="float32", num_threads=1, max_model_len=256, num_blocks=400)) as llm:
        found = crowd_of(llm)
        assert llm.engine.metrics().num_preemptions == 0
    return found


def test_outputs_that_start_over_say_the_same(tiny, expected):
    with closing(LLM(str(tiny), dtype="float32", num_threads=1, **CROWDED)) as llm:
        assert crowd_of(llm) == expected
        assert llm.engine.metrics().num_preemptions > 0
        llm.engine.check_integrity()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_give_the_tokens_of_one_process_and_the_bytes_predicted(tiny, expected, layout):
    settings = CROWDED | LAYOUTS[layout] | {"num_threads": 1}
    with closing(thread_llm(tiny, **settings)) as llm:
        plans = record_plans(llm)
        assert crowd_of(llm) == expected
        assert llm.engine.metrics().num_preemptions > 0
        executor, model = llm.engine.model.executor, llm.engine.model.config
        assert {worker.fallback_rows for worker in executor.workers} == {0}
        assert any(plan.masks for plan in plans)
        for plan in plans:
            assert {seq_id for seq_id, _ in plan.masks} <= {chunk.seq_id for chunk in plan.chunks if chunk.samples}
        assert_ledgers_as_predicted(
            executor.ledger_rows(), plans, model, parallel_config(**settings), rules_of(Transport.GLOO)
        )


def test_a_llama_tokenizer_says_what_the_form_says(tmp_path):
    """Where a token spells its space in another way, text and form still agree."""
    from tiny_tokenizers import byte_fallback_bpe, write_folder

    folder = write_tiny_model(tmp_path / "llama", with_tokenizer=False)
    write_folder(folder, byte_fallback_bpe("llama"))
    assert Tokenizer.from_folder(folder).vocab_size < 420
    pattern = r"he llo( the)? [a-z]{1,9} é中?\n"
    with closing(LLM(str(folder), num_threads=1, max_model_len=128)) as llm:
        params = [replace(guided({"regex": pattern}, temperature=1.5), seed=seed) for seed in range(6)]
        for output in outputs_of(llm, *params):
            assert re.fullmatch(pattern, output.text)
            assert output.finish_reason == "stop"
