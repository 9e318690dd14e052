"""Streamed text against decoding everything at once."""

import time

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.tokenizer import IncrementalDetokenizer, Tokenizer

KINDS = ["byte_level", "llama", "gemma", "metaspace", "sentencepiece"]
TEXTS = ["hello the hello", "中文 🙂 e\u0301 ok", "  four    spaces\n\n", "🙂🚀👩‍👩‍👧", "ÿ naïve"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    made = {"byte_level": tiny_tokenizers.byte_level_bpe()} | {
        kind: tiny_tokenizers.byte_fallback_bpe(kind) for kind in ("llama", "gemma", "metaspace")
    }
    return {kind: tiny_tokenizers.load(tmp_path_factory.mktemp(kind), made[kind]) for kind in made}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        return tiny_tokenizers.load(folder, tiny_tokenizers.byte_level_bpe())
    if request.param == "sentencepiece":
        pytest.importorskip("sentencepiece", reason="the extra is not installed")
        return Tokenizer.from_folder(tiny_tokenizers.write_sentencepiece_folder(folder))
    return tiny_tokenizers.load(folder, tiny_tokenizers.byte_fallback_bpe(request.param))


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.append(token_id) for token_id in output), detokenizer.finish()]


def continuation(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> str:
    """What the output adds to the prompt's text; a U+FFFD that the output completes is output."""
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip)
    if not whole.startswith(before):
        before = before[:-1]
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.parametrize("text", TEXTS)
def test_text_streams_as_it_was(tokenizer, text):
    prompt, ids = tokenizer.encode("hello"), tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, prompt, ids)
    assert "".join(pieces) == continuation(tokenizer, prompt, ids)
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""


def test_the_first_word_keeps_its_space(tmp_path):
    tokenizer = tiny_tokenizers.load(tmp_path, tiny_tokenizers.byte_fallback_bpe())
    prompt, the = tokenizer.encode("hello"), tokenizer.token_to_id("▁the")
    assert "".join(stream(tokenizer, prompt, [the, the])) == " the the"
    assert "".join(stream(tokenizer, [], [the, the])) == "the the"
    assert "".join(stream(tokenizer, [1], [the, the])) == "the the"


def test_half_a_character_is_held(tmp_path):
    tokenizer = tiny_tokenizers.load(tmp_path, tiny_tokenizers.byte_fallback_bpe())
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    assert stream(tokenizer, tokenizer.encode("hello"), ids) == ["", "", "", "🚀", ""]


def test_bytes_that_never_make_a_character_are_held_for_one_token(tmp_path):
    tokenizer = tiny_tokenizers.load(tmp_path, tiny_tokenizers.byte_fallback_bpe())
    bad, half = tokenizer.token_to_id("<0xFF>"), tokenizer.token_to_id("<0xE4>")
    assert stream(tokenizer, [], [bad, bad, bad]) == ["", "\ufffd", "\ufffd", "\ufffd"]
    assert stream(tokenizer, [], [half, tokenizer.token_to_id("o")]) == ["", "\ufffdo", ""]
    assert stream(tokenizer, [], [half]) == ["", "\ufffd"]


def test_a_character_begun_by_the_prompt_is_output(tmp_path):
    tokenizer = tiny_tokenizers.load(tmp_path, tiny_tokenizers.byte_fallback_bpe())
    first, *rest = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🚀".encode()]
    assert "".join(stream(tokenizer, [*tokenizer.encode("hello"), first], rest)) == "🚀"


def test_special_tokens_are_skipped_or_shown(tmp_path):
    tokenizer = tiny_tokenizers.load(tmp_path, tiny_tokenizers.byte_fallback_bpe())
    the = tokenizer.token_to_id("▁the")
    assert "".join(stream(tokenizer, [the], [the, 2, the], skip=True)) == " the the"
    assert "".join(stream(tokenizer, [the], [the, 2, the], skip=False)) == " the</s> the"


def test_ids_outside_the_vocabulary_are_silent(tokenizer):
    ids = tokenizer.encode("hello", add_special_tokens=False)
    strange = [-1, *ids, tokenizer.vocab_size, 2**40]
    assert "".join(stream(tokenizer, [], strange)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_cost_per_token_does_not_grow(tokenizers, kind):
    """Ten thousand tokens in well under the time that decoding everything each time would take (minutes)."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("hello the 🚀 ", add_special_tokens=False) * 700
    start = time.perf_counter()
    assert "".join(stream(tokenizer, [], ids)) == tokenizer.decode(ids)
    assert time.perf_counter() - start < 5


def test_random_ids_stream_to_the_full_decode(tokenizer):
    @settings(max_examples=150, deadline=None)
    @given(data=st.data(), skip=st.booleans())
    def check(data: st.DataObject, skip: bool) -> None:
        token_ids = st.integers(0, tokenizer.vocab_size + 3)
        prompt = data.draw(st.lists(token_ids, max_size=12))
        output = data.draw(st.lists(token_ids, max_size=60))
        pieces = stream(tokenizer, prompt, output, skip)
        assert "".join(pieces) == continuation(tokenizer, prompt, output, skip)

    check()


def test_random_bytes_stream_to_the_full_decode(tokenizer):
    """Few distinct bytes, so that valid, cut and invalid sequences all come up."""
    names = [
        "<0xF0>",
        "<0x9F>",
        "<0x99>",
        "<0x82>",
        "<0xE4>",
        "<0xB8>",
        "<0xFF>",
        "▁",
        "▁▁",
        "o",
        "ð",
        "Ł",
        "Ļ",
        "ģ",
        "Ġ",
    ]
    token_ids = [token_id for name in names if (token_id := tokenizer.token_to_id(name)) is not None]

    @settings(max_examples=150, deadline=None)
    @given(
        prompt=st.lists(st.sampled_from(token_ids), max_size=12),
        output=st.lists(st.sampled_from(token_ids), max_size=60),
    )
    def check(prompt: list[int], output: list[int]) -> None:
        pieces = stream(tokenizer, prompt, output)
        assert "".join(pieces) == continuation(tokenizer, prompt, output)

    check()
