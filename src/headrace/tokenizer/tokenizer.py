"""One tokenizer for the rest of Headrace, whichever library and file it comes from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from headrace.errors import CheckpointError, RequestError
from headrace.tokenizer.byte_tokens import REPLACEMENT
from headrace.tokenizer.fast_backend import FastBackend
from headrace.tokenizer.sentencepiece_backend import SentencePieceBackend
from headrace.tokenizer.tokenizer_files import TokenizerConfig


class TokenizerBackend(Protocol):
    """What a tokenizer library has to offer; ids given to `decode` and `id_to_token` are inside the vocabulary.

    unused_ids: those below vocab_size that stand for no token; most often there are none.
    joins_bytes: decoding joins the tokens' bytes, and does nothing else with them.
    """

    vocab_size: int
    special_ids: frozenset[int]
    unused_ids: frozenset[int]
    joins_bytes: bool

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def vocabulary(self) -> str | list[bytes]: ...


class Tokenizer:
    """Text to token ids and back.

    Text decoded from the first tokens of a sequence is, but for a character that is still incomplete at its end, the
    beginning of the text decoded from all of them. `IncrementalDetokenizer` rests on that.

    vocab_size: one more than the highest id; the model's embedding may have more rows.
    special_ids: what `skip_special_tokens` leaves out.
    """

    def __init__(self, backend: TokenizerBackend, config: TokenizerConfig) -> None:
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.special_ids
        self._unused_ids = backend.unused_ids
        self._whole_texts: dict[int, str | None] = {}
        self.bos_token_id = self._named_id(config, "bos_token")
        self.eos_token_id = self._named_id(config, "eos_token")

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """Load the tokenizer of a checkpoint: tokenizer.json, or else a SentencePiece tokenizer.model.

        Raises:
            CheckpointError: there is none that Headrace reads, or it is broken.
        """
        config = TokenizerConfig.from_folder(path)
        if (path / "tokenizer.json").is_file():
            return cls(FastBackend.from_file(path / "tokenizer.json", config), config)
        if (path / "tokenizer.model").is_file():
            return cls(SentencePieceBackend.from_file(path / "tokenizer.model", config), config)
        raise CheckpointError(_explain_missing(path))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it become their ids.

        add_special_tokens: surround it as the model expects; a rendered chat template has done so already.

        Raises:
            RequestError: the text holds half of a surrogate pair, which no encoding can express.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: a lone surrogate at character {error.start}; send whole characters"
            ) from None
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary (a model's padding rows) are empty text."""
        return self._backend.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens)

    def whole_text(self, token_id: int) -> str | None:
        """What the token adds to any text of whole characters; None if it is a part of a character, or if the tokens
        beside it change that."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            text = self.decode([token_id], skip_special_tokens=False) if self._backend.joins_bytes else None
            whole_text = self._whole_texts[token_id] = None if text is None or REPLACEMENT in text else text
            return whole_text

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None for an id outside of it."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def has_token(self, token_id: int) -> bool:
        """Whether the id stands for a token: true of every id that `id_to_token` can spell."""
        return 0 <= token_id < self.vocab_size and token_id not in self._unused_ids

    def vocabulary(self) -> str | list[bytes]:
        """For those who need the bytes of each token: tokenizer.json as text, else the bytes by id."""
        return self._backend.vocabulary()

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    def _named_id(self, config: TokenizerConfig, name: str) -> int | None:
        text = config.named_tokens.get(name)
        return self._backend.token_to_id(text) if text else None


def _explain_missing(path: Path) -> str:
    looked_for = f"no tokenizer.json and no tokenizer.model in {path}"
    if (path / "tekken.json").is_file():
        return f"{looked_for}, only Mistral's tekken.json; use a copy of the model converted to tokenizer.json"
    if not path.is_dir():
        return f"{looked_for}: the folder does not exist"
    if (path / "vocab.json").is_file() or list(path.glob("*.tiktoken")):
        return (
            f"{looked_for}; convert its older vocabulary: "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{looked_for}; copy the tokenizer files of the model there"
