"""tokenizer.json, run by the `tokenizers` library."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from headrace.errors import CheckpointError
from headrace.tokenizer.byte_tokens import REPLACEMENT, replace_invalid_bytes, token_bytes
from headrace.tokenizer.tokenizer_files import AddedToken, TokenizerConfig


class FastBackend:
    """Encodes and decodes with tokenizer.json, whatever its algorithm.

    Its post-processor decides which special tokens surround a text, as in transformers 5. Only where it adds none does
    an explicit `add_bos_token: true` (or eos) of tokenizer_config.json count, as it did for Llama and Gemma before.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        self._tokenizer = tokenizer
        _add_missing_tokens(tokenizer, config)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        used_ids = set(tokenizer.get_vocab(with_added_tokens=True).values())
        self.vocab_size = 1 + max(used_ids, default=-1)
        self.unused_ids = frozenset(range(self.vocab_size)) - used_ids
        decoders = _decoder_types(tokenizer)
        self.joins_bytes = decoders == ["ByteLevel"]
        self._has_metaspace = "Metaspace" in decoders
        self._has_byte_tokens = "ByteFallback" in decoders
        self._prefix, self._suffix = self._surrounding_ids(config)

    @classmethod
    def from_file(cls, path: Path, config: TokenizerConfig) -> "FastBackend":
        """Load tokenizer.json.

        Raises:
            CheckpointError: the file is not one that `tokenizers` can read.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(
                f"{path} cannot be read by tokenizers {tokenizers.__version__} ({error}); "
                "download the file again, or update tokenizers"
            ) from error
        return cls(tokenizer, config)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # As a batch, since other threads may run meanwhile: a text of megabytes takes seconds.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if REPLACEMENT in text and self._has_byte_tokens:
            return self._decode_invalid_bytes(ids, skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def vocabulary(self) -> str | list[bytes]:
        """tokenizer.json, with the tokens that only tokenizer_config.json names. Where its decoder is Metaspace, the
        bytes: llguidance takes that one's spaces for the character that spells them."""
        if not self._has_metaspace:
            text: str = self._tokenizer.to_str()
            return text
        added = self._tokenizer.get_added_tokens_decoder()
        tokens = [self.id_to_token(token_id) or "" for token_id in range(self.vocab_size)]
        return [token.encode() if i in added else token_bytes(token) for i, token in enumerate(tokens)]

    def _decode_invalid_bytes(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset()
        tokens = [token for i in ids if i not in skipped and (token := self.id_to_token(i)) is not None]
        text: str = self._tokenizer.decoder.decode(replace_invalid_bytes(tokens))
        return text

    def _surrounding_ids(self, config: TokenizerConfig) -> tuple[list[int], list[int]]:
        """What add_bos_token and add_eos_token still have to add around the post-processor's output."""
        if self._tokenizer.num_special_tokens_to_add(is_pair=False):
            return [], []
        bos = self.token_to_id(config.named_tokens.get("bos_token", ""))
        eos = self.token_to_id(config.named_tokens.get("eos_token", ""))
        return (
            [bos] if config.add_bos_token and bos is not None else [],
            [eos] if config.add_eos_token and eos is not None else [],
        )


def _add_missing_tokens(tokenizer: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
    """Tokens that only tokenizer_config.json names: in the order of their ids, which is how ids are given out."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = [token for _, token in sorted(config.added_tokens.items())]
    named = [AddedToken(content=text) for text in (*config.named_tokens.values(), *config.extra_tokens)]
    for token in listed + named:
        if token.content not in known:
            known.add(token.content)
            tokenizer.add_tokens([_to_tokenizers(token)])


def _to_tokenizers(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        special=token.is_special,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
    )


def _decoder_types(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The steps of decoding, by their names in tokenizer.json."""
    if tokenizer.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return [step["type"] for step in decoder.get("decoders", (decoder,))]
