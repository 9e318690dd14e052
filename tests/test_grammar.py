"""Which tokens a grammar allows: against `regex`, which can tell a beginning of a match from what never becomes one."""

import json
import sys
from functools import reduce

import numpy as np
import pytest
import regex
import tiny_tokenizers
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_fallback_bpe, byte_level_bpe

from headrace import StructuredOutputs
from headrace.demo_model import demo_model_path
from headrace.engine import grammar as grammar_module
from headrace.engine.grammar import Grammar, GrammarMatcher
from headrace.engine.grammar_compiler import GrammarCompiler
from headrace.engine.json_schema import MAX_MULTIPLE, MAX_PROPERTIES
from headrace.errors import RequestError
from headrace.tokenizer import Tokenizer

DEMO = Tokenizer.from_folder(demo_model_path())
DEMO_COMPILER = GrammarCompiler(DEMO, DEMO.vocab_size + 37, [DEMO.eos_token_id])


def allowed_ids(matcher: GrammarMatcher) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(matcher.mask, np.uint8), bitorder="little")).tolist())


def compiled(**form: object) -> Grammar:
    return DEMO_COMPILER.compile(StructuredOutputs(**form))


@pytest.fixture(scope="module", params=["byte_level", "llama", "gemma", "metaspace", "sentencepiece"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sentencepiece":
        pytest.importorskip("sentencepiece", reason="the extra is not installed")
        return Tokenizer.from_folder(tiny_tokenizers.write_sentencepiece_folder(folder))
    made = byte_level_bpe() if request.param == "byte_level" else byte_fallback_bpe(request.param)
    return tiny_tokenizers.load(folder, made)


def texts_of(tokenizer: Tokenizer) -> dict[int, str]:
    """What each token that is text adds in the middle of one."""
    before = tokenizer.encode("h", add_special_tokens=False)
    length = len(tokenizer.decode(before))
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.has_token(i) and not tokenizer.is_special(i)]
    return {i: tokenizer.decode([*before, i], skip_special_tokens=False)[length:] for i in ids}


PATTERNS = [
    r"[a-z]{3}",
    r"(hello|help|he) ?world!{0,2}",
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?",
    r"[ a-o]+\n(yes|no)",
    r"\{\"a\": ?[0-9]{1,2}\}",
    r"[^a]*z",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_tokenizers_tokens_are_those_that_a_match_begins_with(tokenizer, pattern):
    """At each step of random walks: a token is allowed if the text with it can become a match, and no other one is."""
    eos_token_ids = {1, 2}
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + 70, eos_token_ids)
    compiled = compiler.compile(StructuredOutputs(regex=pattern))
    texts, oracle = texts_of(tokenizer), regex.compile(pattern)
    rng = np.random.default_rng(5)
    for _ in range(3):
        text, matcher = "", compiled.matcher()
        for _ in range(8):
            # A part of a character is spelled with U+FFFD, which cannot be told from others.
            expected = {
                i for i, added in texts.items() if "�" not in added and oracle.fullmatch(text + added, partial=True)
            }
            found = allowed_ids(matcher)
            found_whole = {i for i in found - eos_token_ids if "�" not in texts[i]}
            if found_whole != expected:
                # Where only one text can follow, it is cut into tokens in one way.
                assert len(found_whole) == 1
                assert found_whole < expected
                assert len({texts[i][0] for i in expected}) == 1
            assert (found & eos_token_ids) == (eos_token_ids if oracle.fullmatch(text) else set())
            assert matcher.is_complete == (oracle.fullmatch(text) is not None and not expected)
            if not found_whole:
                break
            token_id = int(rng.choice(sorted(found_whole)))
            text += texts[token_id]
            matcher.accept(token_id)


def test_tokens_that_the_tokenizer_does_not_have_are_never_allowed(tmp_path):
    """Rows of padding, gaps, special tokens."""
    tokenizer = tiny_tokenizers.load(tmp_path, byte_level_bpe())
    size = tokenizer.vocab_size + 1000
    matcher = GrammarCompiler(tokenizer, size, []).compile(StructuredOutputs(regex=r"(?s:.)*")).matcher()
    assert len(matcher.mask) == 4 * -(-size // 32)
    found = allowed_ids(matcher)
    assert max(found) < tokenizer.vocab_size
    assert not found & tokenizer.special_ids
    # All that are text are: a dot is any character, and a part of one begins it or is nothing.
    whole = {i for i, text in texts_of(tokenizer).items() if "�" not in text}
    assert whole <= found


def test_logits_may_be_fewer_than_tokens():
    size = DEMO.vocab_size - 45
    matcher = GrammarCompiler(DEMO, size, [DEMO.eos_token_id]).compile(StructuredOutputs(regex="[a-z ]+")).matcher()
    expected = allowed_ids(compiled(regex="[a-z ]+").matcher())
    assert max(expected) >= size
    assert allowed_ids(matcher) == {i for i in expected if i < size}


def test_ends_of_sequence():
    """All that the model has, those beyond the tokenizer too, where an output may end; none with ignore_eos."""
    size, eos_token_ids = DEMO.vocab_size + 10, {DEMO.eos_token_id, DEMO.vocab_size + 3, 10**6}
    compiled = GrammarCompiler(DEMO, size, eos_token_ids).compile(StructuredOutputs(regex="a*"))
    inside = {i for i in eos_token_ids if i < size}
    assert allowed_ids(compiled.matcher()) & eos_token_ids == inside
    assert not allowed_ids(compiled.matcher(ignore_eos=True)) & eos_token_ids
    for token_id in eos_token_ids:
        compiled.matcher().accept(token_id)
    matcher = compiled.matcher(ignore_eos=True)
    matcher.accept(DEMO.encode("a")[-1])
    assert allowed_ids(matcher)
    assert not allowed_ids(matcher) & eos_token_ids


def test_outputs_of_one_grammar_do_not_touch_each_other():
    grammar = compiled(choice=["abc", "xyz"])
    first, second = grammar.matcher(), grammar.matcher()
    before = second.mask
    first.accept(DEMO.encode("a")[-1])
    assert second.mask == before == grammar.matcher().mask
    assert first.mask != before
    with pytest.raises(RequestError):
        first.accept(DEMO.encode("x")[-1])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=5))
@example(["\x7f", "\0\x1f\u2028", '"\\', "/", "😀"])
@settings(max_examples=40, deadline=None)
def test_any_text_can_be_a_choice(choices):
    grammar = compiled(choice=choices)
    for text in choices:
        matcher = grammar.matcher()
        for token_id in DEMO.encode(text, add_special_tokens=False):
            matcher.accept(token_id)
        assert DEMO.eos_token_id in allowed_ids(matcher)
        # Complete where no other choice goes on.
        assert matcher.is_complete == (not any(c != text and c.startswith(text) for c in choices))


def nested(levels: int) -> dict:
    return reduce(lambda inner, _: {"type": "array", "items": inner}, range(levels), {"type": "null"})


def chained(count: int) -> dict:
    names = [f"d{i}" for i in range(count)]
    links = {name: {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i, name in enumerate(names)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {"type": "null"}}}


REFUSED_SCHEMAS = {
    "misspelled": ({"type": "string", "minLenght": 3}, "'minLenght'.*did you mean 'minLength'"),
    "inside": ({"properties": {"a": {"items": {"anyOf": [{"uniqueItems": True}]}}}}, "'uniqueItems'"),
    "definitions": ({"definitions": {"a": {"not": {}}}, "type": "null"}, "'not'"),
    "lenient": ({"type": "string", "x-guidance": {"lenient": True}}, "'x-guidance'"),
    "nullable": ({"type": "string", "nullable": True}, "'nullable'"),
    "type": ({"type": "strin"}, "strin"),
    "format": ({"type": "string", "format": "color"}, "color"),
    "lookahead": ({"type": "string", "pattern": "^(?=a)"}, "look-ahead"),
    "oneOf": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "anyOf"),
    "elsewhere": ({"$ref": "http://localhost/schema.json"}, "localhost"),
    "file": ({"$ref": "file:///etc/passwd"}, "passwd"),
    "nowhere": ({"$ref": "#/$defs/a"}, "defs/a"),
    "itself": ({"$ref": "#"}, "no token"),
    "circle": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "no token"),
    "impossible": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "no value": ({"enum": []}, "empty"),
    "nested value": ({"const": reduce(lambda inner, _: [inner], range(300), 1)}, "nested|recursion"),
    "nested": (nested(70), "levels deep"),
    "chained": (chained(700), "levels deep"),
    "wide": ({"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}}, "properties"),
    "many": ({"enum": [{"a": [i]} for i in range(1500)]}, "too large"),
    "multiples": ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}], "type": "integer"}, str(MAX_MULTIPLE)),
    "multiple": ({"type": "number", "multipleOf": 1.00003}, str(MAX_MULTIPLE)),
    "repeated": ({"type": "string", "pattern": "^a{1000000}$"}, "expressions"),
    "explodes": (
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(12)]},
        "too large",
    ),
}
UNSUPPORTED = [
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef"),
]


@pytest.mark.parametrize("name", REFUSED_SCHEMAS)
def test_refuses_a_schema_with_the_reason(name):
    schema, reason = REFUSED_SCHEMAS[name]
    assert_refused(reason, json=schema)


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_what_cannot_be_enforced_is_never_read_past(keyword):
    assert_refused(regex.escape(keyword), json={"type": "object", "properties": {"a": {keyword: {}}}})


def test_annotations_and_names_of_others_are_read_past():
    schema = {"type": "integer", "title": "T", "description": "D", "default": 1, "examples": [2], "x-order": 3}
    assert compiled(json=schema | {"properties": {"minLenght": {"const": {"not": 1}}}})


REFUSED_FORMS = {
    "unclosed": ({"regex": "a("}, "unclosed group"),
    "lookahead": ({"regex": "(?=a)b"}, "look-around"),
    "backreference": ({"regex": r"(a)\1"}, "backreferences"),
    "nothing": ({"regex": r"[^\x00-\U0010FFFF]"}, "no token"),
    "empty": ({"regex": "()"}, "empty one"),
    "million": ({"regex": "a{1000000}"}, "expressions"),
    "cube": ({"regex": "((a{100}){100}){100}"}, "expressions"),
    "no start": ({"grammar": 'begin: "a"'}, "no start rule"),
    "no rule": ({"grammar": "start: other"}, "other"),
    "no end": ({"grammar": "start: start"}, "no token"),
    "broken": ({"grammar": "start: ("}, "Expected"),
    "nul": ({"grammar": 'start: "\0"'}, "lexer error"),
    "deep": ({"grammar": "start: " + "(" * 500 + '"a"' + ")" * 500}, "nested"),
    "long": ({"grammar": "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}' for i in range(2000))}, "rules"),
    "doubling": (
        {"grammar": "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(30)) + '\nR30: "a"'},
        "too big",
    ),
    "schema in a grammar": ({"grammar": 'start: %json {"not": {}}'}, "'not'"),
    "large schema in a grammar": ({"grammar": f"start: %json {json.dumps(chained(700))}"}, "levels deep"),
    "no schema in a grammar": ({"grammar": 'start: %json {"a": }'}, "no JSON schema after %json"),
    "rules behind a schema": ({"grammar": "start: a %json {}" + "\na: (a)" * 600}, "rules"),
    "another format": ({"grammar": '{"grammars": [{"json_schema": {"not": {}}}]}'}, "expecting rule"),
    "broken gbnf": ({"grammar": 'root ::= ("a"'}, "GBNF"),
    "deep gbnf": ({"grammar": "root ::= " + "(" * 480 + '"a"' + ")" * 480}, "GBNF|nested"),
}


@pytest.mark.parametrize("name", REFUSED_FORMS)
def test_refuses_a_form_with_the_reason(name):
    form, reason = REFUSED_FORMS[name]
    assert_refused(reason, **form)


REACHES_A_LIMIT = {"regex": "say [ab]a{1000000}"}
"""After the word, which is more than is looked at when it is compiled."""


def assert_refused(reason: str, **form: object) -> None:
    with pytest.raises(RequestError, match=reason) as refusal:
        compiled(**form)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_a_grammar_may_have_schemas_read_leniently_or_not():
    """Their colons and brackets are none of the rules'."""
    schema = {"type": "object", "properties": {f"p{i}": {"enum": [[], ":("]} for i in range(400)}}
    lenient = {"type": "integer", "x-guidance": {"lenient": True}, "frobnicate": [1]}
    grammar = compiled(grammar=f'start: "a" %json {json.dumps(schema)} "b" %json{json.dumps(lenient)} ("c")?')
    matcher = grammar.matcher()
    for token_id in DEMO.encode('a{"p7":[]}b12c', add_special_tokens=False):
        matcher.accept(token_id)
    assert matcher.is_complete


def test_tokens_can_be_named_by_a_grammar():
    special = min(DEMO.special_ids - {DEMO.eos_token_id})
    matcher = compiled(grammar=f'start: "a" <[{special}]> "b"').matcher()
    for token_id in (DEMO.encode("a")[-1], special, DEMO.encode("b")[-1]):
        assert allowed_ids(matcher) == {token_id}
        matcher.accept(token_id)
    assert matcher.is_complete


def test_what_is_large_but_allowed_compiles():
    assert compiled(json={"properties": {f"p{i}": {"type": "integer"} for i in range(MAX_PROPERTIES)}})
    assert compiled(json=nested(50))
    assert compiled(json=chained(200))
    assert compiled(json={"enum": [f"value {i}" for i in range(5000)]})
    assert compiled(choice=[f"value {i}" for i in range(10_000)])
    assert compiled(regex="[a-z]{8000}")


def test_without_the_library_a_form_is_refused_and_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "headrace.engine.grammar")
    with pytest.raises(RequestError, match=r"structured outputs need llguidance .*; pip install llguidance"):
        compiled(regex="a")


@pytest.fixture
def slow_clock(monkeypatch) -> None:
    """Says that each token has taken a tenth of a second."""
    clock = iter(np.arange(0, 1000, 0.1))
    monkeypatch.setattr(grammar_module.time, "thread_time", lambda: float(next(clock)))


def accepted_tokens(matchers: list[GrammarMatcher], most: int) -> int:
    """How many they take in turn, up to `most`, before one takes no more as all of them have taken too long."""
    token_id = DEMO.encode("a")[-1]
    for num_tokens in range(most):
        try:
            matchers[num_tokens % len(matchers)].accept(token_id)
        except RequestError as error:
            assert "too long" in str(error)
            return num_tokens
    return most


def test_an_output_whose_form_takes_too_long_ends(slow_clock):
    """At 100 ms for a token: 1.2 s > 1 s + 12 * 10 ms after twelve."""
    assert accepted_tokens([compiled(regex="a+").matcher()], 100) == 12


def test_outputs_of_one_request_share_their_time(slow_clock):
    """All outputs of a form end, whether they have taken long themselves or not; another request's do not."""
    grammar, other = compiled(regex="a+"), compiled(regex="a+").matcher()
    siblings = [grammar.matcher() for _ in range(100)]
    # 1.1 s > 1 s + 9 ms + 11 * 1 ms
    assert accepted_tokens(siblings, 100) == 11
    assert accepted_tokens(siblings[50:], 100) == accepted_tokens([grammar.matcher()], 100) == 0
    assert accepted_tokens([other], 5) == 5


def test_a_token_that_fails_has_taken_its_time(slow_clock):
    """A thousand outputs that each reach a limit at once take a second together, not a hundred."""
    grammar = compiled(regex="a{1,3}")
    wrong_id = DEMO.encode("b")[-1]
    for _ in range(11):
        with pytest.raises(RequestError, match=r"^(?!.*too long)"):
            grammar.matcher().accept(wrong_id)
    with pytest.raises(RequestError, match="too long"):
        grammar.matcher().accept(wrong_id)


def test_a_limit_reached_on_the_way():
    matcher = compiled(**REACHES_A_LIMIT).matcher()
    with pytest.raises(RequestError, match="states"):
        for token_id in DEMO.encode("say baaa", add_special_tokens=False):
            matcher.accept(token_id)


def test_without_a_tokenizer_or_its_bytes(tmp_path):
    with pytest.raises(RequestError, match="tokenizer"):
        GrammarCompiler(None, 100, [0]).compile(StructuredOutputs(regex="a"))
    words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizer = tiny_tokenizers.load(tmp_path, tokenizers.Tokenizer(words))
    with pytest.raises(RequestError, match="tokenizer"):
        GrammarCompiler(tokenizer, 100, [0]).compile(StructuredOutputs(regex="a"))


def test_json_is_on_one_line():
    """One space after a comma or a colon, or none, and none elsewhere: so that no output is endless white space."""
    grammar = compiled(json={"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]})
    value = {"a": 1, "b": [1, {"c": None}]}
    for separators, is_allowed in (
        ((", ", ": "), True),
        ((",", ":"), True),
        ((",  ", ": "), False),
        ((" ,", ":"), False),
    ):
        matcher = grammar.matcher()
        try:
            for token_id in DEMO.encode(json.dumps(value, separators=separators), add_special_tokens=False):
                matcher.accept(token_id)
            assert is_allowed
            assert matcher.is_complete
        except RequestError:
            assert not is_allowed
    assert DEMO.encode("\n", add_special_tokens=False)[0] not in allowed_ids(grammar.matcher())
