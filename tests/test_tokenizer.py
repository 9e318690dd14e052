"""Tokenizers against transformers, and every way a tokenizer can be missing or broken."""

import json
import sys

import pytest
import tiny_tokenizers
import tokenizers
from tiny_tokenizers import byte_fallback_bpe, byte_level_bpe, load, write_folder

from headrace.errors import CheckpointError
from headrace.tokenizer import Tokenizer

TEXTS = ["hello world!", "中文 🙂", "  spaces  ", "", "<|user|>hello</s>", "line\nline"]


@pytest.fixture(params=["byte_level", "llama", "gemma", "metaspace"])
def folder(request, tmp_path):
    made = byte_level_bpe() if request.param == "byte_level" else byte_fallback_bpe(request.param)
    return write_folder(tmp_path, made)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(folder, text):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for add_special_tokens in (True, False):
        ids = ours.encode(text, add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_facts(tmp_path):
    tokenizer = load(tmp_path, byte_fallback_bpe())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.id_to_token(3) == "<|user|>"
    assert tokenizer.token_to_id("<|user|>") == 3
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(tokenizer.vocab_size - 1) is not None


def test_ids_outside_the_vocabulary_decode_to_nothing(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([-1, *ids, tokenizer.vocab_size, 2**40]) == tokenizer.decode(ids)


def test_an_id_has_a_token_if_it_can_be_spelled(folder):
    tokenizer = Tokenizer.from_folder(folder)
    for token_id in range(-2, tokenizer.vocab_size + 2):
        assert tokenizer.has_token(token_id) == (tokenizer.id_to_token(token_id) is not None)


def test_a_gap_in_the_vocabulary_has_no_tokens(tmp_path):
    vocab = {"a": 0, "b": 1, "far": 7}
    tokenizer = load(tmp_path, tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a")))
    used = {*vocab.values(), *tokenizer.special_ids}
    assert [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.has_token(token_id)] == sorted(used)
    assert not tokenizer.has_token(2)


def test_whole_text_is_what_a_token_adds_to_whole_characters(tmp_path):
    tokenizer = load(tmp_path, byte_level_bpe())
    before = tokenizer.encode("naïve 中", add_special_tokens=False)
    found = [tokenizer.whole_text(token_id) for token_id in range(tokenizer.vocab_size)]
    for token_id, text in enumerate(found):
        joined = tokenizer.decode([*before, token_id], skip_special_tokens=False)
        assert "\ufffd" in joined if text is None else joined == "naïve 中" + text
    assert None in found


def test_whole_text_is_unknown_where_neighbours_change_it(tmp_path):
    tokenizer = load(tmp_path, byte_fallback_bpe())
    assert {tokenizer.whole_text(token_id) for token_id in range(tokenizer.vocab_size)} == {None}


@pytest.mark.parametrize("form", ["string", "object"])
def test_special_tokens_may_be_strings_or_objects(tmp_path, form):
    eos = "</s>" if form == "string" else {"content": "</s>", "lstrip": False, "special": True}
    assert load(tmp_path, byte_fallback_bpe(), eos_token=eos).eos_token_id == 2


def test_special_tokens_map_serves_where_the_configuration_is_silent(tmp_path):
    write_folder(tmp_path, byte_fallback_bpe(), bos_token=None, eos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|user|>"}}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_token_id == 3
    assert tokenizer.bos_token_id is None


@pytest.mark.parametrize("extra", [["<|end|>"], [{"content": "<|end|>"}], {"end_token": "<|end|>"}])
def test_extra_special_tokens_come_in_several_forms(tmp_path, extra):
    tokenizer = load(tmp_path, byte_level_bpe(), extra_special_tokens=extra)
    assert tokenizer.token_to_id("<|end|>") in tokenizer.special_ids


def test_added_tokens_of_the_configuration_get_their_ids(tmp_path):
    base = load(tmp_path / "base", byte_level_bpe()).vocab_size
    added = {
        str(base + 1): {"content": "<|second|>", "special": True},
        str(base): {"content": "<|first|>", "special": False},
    }
    tokenizer = load(tmp_path / "added", byte_level_bpe(), added_tokens_decoder=added)
    assert tokenizer.encode("<|first|><|second|>") == [base, base + 1]
    assert tokenizer.decode([base, base + 1]) == "<|first|>"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, []),
        ({"add_bos_token": False, "add_eos_token": False}, []),
        ({"add_bos_token": True}, ["<s>"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "</s>"]),
    ],
)
def test_add_bos_token_counts_where_the_post_processor_adds_nothing(tmp_path, config, expected):
    tokenizer = load(tmp_path, byte_level_bpe(), **config)
    assert tokenizer.encode("") == [tokenizer.token_to_id(token) for token in expected]
    assert tokenizer.encode("", add_special_tokens=False) == []


@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_the_post_processor_has_the_last_word(tmp_path, add_bos_token):
    tokenizer = load(tmp_path, byte_fallback_bpe(), add_bos_token=add_bos_token)
    assert tokenizer.encode("", add_special_tokens=True) == [1]


def test_truncation_and_padding_stored_in_the_file_are_off(tmp_path):
    made = byte_level_bpe()
    made.enable_truncation(2)
    made.enable_padding(length=50)
    assert len(load(tmp_path, made).encode("hello world! hello world!")) not in (2, 50)


def test_one_bad_byte_does_not_spoil_its_neighbours(tmp_path):
    tokenizer = load(tmp_path, byte_fallback_bpe())
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode() + b"\xff" + "é".encode() + b"\xe4\xb8"]
    assert tokenizer.decode(ids) == "é\ufffdé\ufffd"


class TestErrors:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json and no tokenizer\.model in .*; copy"):
            Tokenizer.from_folder(tmp_path)

    def test_no_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            Tokenizer.from_folder(tmp_path / "absent")

    def test_only_tekken(self, tmp_path):
        (tmp_path / "tekken.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"only Mistral's tekken\.json; use a copy"):
            Tokenizer.from_folder(tmp_path)

    def test_only_an_older_vocabulary(self, tmp_path):
        (tmp_path / "vocab.json").write_text("{}")
        with pytest.raises(CheckpointError, match="save_pretrained"):
            Tokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Unheard"}}'])
    def test_a_broken_tokenizer_json(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read by tokenizers") as caught:
            Tokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("content", "expected"), [("{", "cannot be read as JSON"), ("[]", "expected an object")])
    def test_a_broken_configuration(self, tmp_path, content, expected):
        write_folder(tmp_path, byte_level_bpe())
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=expected):
            Tokenizer.from_folder(tmp_path)

    def test_sentencepiece_without_the_extra(self, tmp_path, monkeypatch):
        (tmp_path / "tokenizer.model").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(CheckpointError, match=r"pip install sentencepiece"):
            Tokenizer.from_folder(tmp_path)


class TestSentencePiece:
    @pytest.fixture(autouse=True)
    def library(self):
        return pytest.importorskip("sentencepiece", reason="the extra is not installed")

    def test_llama_surrounds_a_text_with_bos(self, tmp_path, library):
        tokenizer = Tokenizer.from_folder(tiny_tokenizers.write_sentencepiece_folder(tmp_path))
        plain = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        assert tokenizer.encode("hello world") == [1, *plain.encode("hello world")]
        assert tokenizer.encode("<s>hello", add_special_tokens=False) == [1, *plain.encode("hello")]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.special_ids == {1, 2}

    @pytest.mark.parametrize("text", ["hello world", "中文 🙂", "  two spaces", "", "naïve"])
    def test_round_trip(self, tmp_path, text):
        tokenizer = Tokenizer.from_folder(tiny_tokenizers.write_sentencepiece_folder(tmp_path))
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_added_tokens(self, tmp_path):
        folder = tiny_tokenizers.write_sentencepiece_folder(
            tmp_path, add_bos_token=False, add_eos_token=True, added_tokens_decoder={"380": {"content": "<|end|>"}}
        )
        tokenizer = Tokenizer.from_folder(folder)
        ids = tokenizer.encode("hello<|end|>")
        assert ids[-2:] == [380, 2]
        assert tokenizer.vocab_size == 381
        assert tokenizer.decode(ids) == "hello"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "hello<|end|></s>"

    @pytest.mark.parametrize(("legacy", "expected"), [(True, "▁hello"), (False, "hello")])
    def test_a_text_after_a_special_token_begins_with_a_space_in_legacy_mode(self, tmp_path, legacy, expected):
        tokenizer = Tokenizer.from_folder(tiny_tokenizers.write_sentencepiece_folder(tmp_path, legacy=legacy))
        _, *ids = tokenizer.encode("<s>hello", add_special_tokens=False)
        assert "".join(tokenizer.id_to_token(token_id) for token_id in ids) == expected

    def test_chatglm_prefix_lies_after_the_vocabulary(self, tmp_path, library):
        folder = tiny_tokenizers.write_sentencepiece_folder(tmp_path, tokenizer_class="ChatGLMTokenizer")
        tokenizer = Tokenizer.from_folder(folder)
        plain = library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        size = plain.vocab_size()
        gmask, sop, user, assistant = size + 1, size + 3, size + 6, size + 7
        assert tokenizer.encode("hello") == [gmask, sop, *plain.encode("hello")]
        assert tokenizer.vocab_size == size + 9
        rendered = "[gMASK]sop<|user|> \n hello<|assistant|>"
        message = [user, *plain.encode("\n"), *plain.encode("hello"), assistant]
        assert tokenizer.encode(rendered, add_special_tokens=False) == [gmask, sop, *message]
        assert tokenizer.decode(tokenizer.encode("hello")) == "hello"

    def test_chatglm_reads_sop_inside_a_word_as_text(self, tmp_path):
        folder = tiny_tokenizers.write_sentencepiece_folder(tmp_path, tokenizer_class="ChatGLMTokenizer")
        tokenizer = Tokenizer.from_folder(folder)
        ids = tokenizer.encode("philosophy", add_special_tokens=False)
        assert not set(ids) & tokenizer.special_ids

    def test_a_broken_model(self, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(b"not a model")
        with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
            Tokenizer.from_folder(tmp_path)
