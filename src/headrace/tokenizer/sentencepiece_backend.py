"""tokenizer.model, run by the `sentencepiece` library (an extra): ChatGLM2, ChatGLM3 and early Llama checkpoints."""

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError
from headrace.tokenizer.byte_tokens import replace_invalid_bytes, token_bytes
from headrace.tokenizer.tokenizer_files import TokenizerConfig

_CHATGLM_CLASS = "ChatGLMTokenizer"
# In the order of their ids, which follow the SentencePiece vocabulary; ChatGLM2 has only the first five.
_CHATGLM_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
# normalizer_spec { add_dummy_prefix: false }: a protobuf message appended to another is merged into it.
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3 | 0, 0])
# "sop" is also in the middle of ordinary words, so it is a token only right after [gMASK].
_CHATGLM_PATTERN = r"\[gMASK\]|(?<=\[gMASK\])sop|\[s?MASK\]|<\|(?:system|user|assistant|observation)\|>"


class SentencePieceBackend:
    """A SentencePiece vocabulary with special tokens beside it.

    Special tokens are found in the text first; what lies between them is SentencePiece's. A text that follows a
    special token begins with a space of its own only in `legacy` Llama tokenizers, as in transformers; ChatGLM encodes
    every message of a chat by itself, which its template spells out with spaces.

    continued_model: encodes a text that follows a special token.
    """

    joins_bytes = False

    def __init__(self, model: Any, continued_model: Any, config: TokenizerConfig) -> None:
        self._model, self._continued = model, continued_model
        is_chatglm = config.tokenizer_class == _CHATGLM_CLASS
        self._beside = _chatglm_tokens(self._model.vocab_size()) if is_chatglm else _tokens_beside(self._model, config)
        self._texts = {token_id: text for text, token_id in self._beside.items()}
        self._pattern = _special_pattern(self._beside, is_chatglm)
        self.special_ids = frozenset(self._beside.values()) | _control_ids(self._model)
        self.vocab_size = max([self._model.vocab_size(), *(i + 1 for i in self._beside.values())])
        self.unused_ids = frozenset(range(self._model.vocab_size(), self.vocab_size)) - self._texts.keys()
        self._prefix, self._suffix = self._surrounding_ids(config, is_chatglm)

    @classmethod
    def from_file(cls, path: Path, config: TokenizerConfig) -> "SentencePieceBackend":
        """Load tokenizer.model.

        Raises:
            CheckpointError: the extra is not installed, or the file is not a SentencePiece model.
        """
        try:
            library = import_module("sentencepiece")
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"{path.parent} has a SentencePiece tokenizer.model and no tokenizer.json; "
                "reading it needs one more package: pip install sentencepiece"
            ) from error
        try:
            data = path.read_bytes()
            model = library.SentencePieceProcessor(model_proto=data)
            continued_model = library.SentencePieceProcessor(model_proto=data + _NO_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a SentencePiece model ({error}); download the file again") from error
        is_legacy = config.is_legacy and config.tokenizer_class != _CHATGLM_CLASS
        return cls(model, model if is_legacy else continued_model, config)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._encode_text(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Special tokens that are skipped leave no trace; others end a text, and the next one begins without space."""
        if skip_special_tokens:
            ids = [i for i in ids if i not in self.special_ids]
        return "".join(
            "".join(map(self._special_text, run)) if is_special else self._decode_pieces(list(run))
            for is_special, run in groupby(ids, key=self.special_ids.__contains__)
        )

    def token_to_id(self, token: str) -> int | None:
        if token in self._beside:
            return self._beside[token]
        token_id: int = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._texts:
            return self._texts[token_id]
        if not 0 <= token_id < self._model.vocab_size():
            return None
        token: str = self._model.id_to_piece(token_id)
        return token

    def vocabulary(self) -> list[bytes]:
        """The bytes of each token in the middle of a text; none for ids that stand for no token."""
        return [self._bytes_of(token_id) for token_id in range(self.vocab_size)]

    def _bytes_of(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id) or ""
        return token.encode() if token_id in self._texts else token_bytes(token)

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        model, start = self._model, 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            ids += model.encode(text[start : match.start()])
            ids.append(self._beside[match[0]])
            model, start = self._continued, match.end()
        ids += model.encode(text[start:])
        return ids

    def _decode_pieces(self, ids: list[int]) -> str:
        pieces = [piece for i in ids if (piece := self.id_to_token(i)) is not None]
        text: str = self._model.decode_pieces(replace_invalid_bytes(pieces))
        return text

    def _special_text(self, token_id: int) -> str:
        return self.id_to_token(token_id) or ""

    def _surrounding_ids(self, config: TokenizerConfig, is_chatglm: bool) -> tuple[list[int], list[int]]:
        """[gMASK] sop for ChatGLM; else bos unless told not to, and eos if told to (Llama's defaults)."""
        if is_chatglm:
            return [self._beside["[gMASK]"], self._beside["sop"]], []
        bos, eos = self._model.bos_id(), self._model.eos_id()
        return (
            [bos] if config.add_bos_token is not False and bos >= 0 else [],
            [eos] if config.add_eos_token and eos >= 0 else [],
        )


def _chatglm_tokens(first_id: int) -> dict[str, int]:
    return {text: first_id + offset for offset, text in enumerate(_CHATGLM_TOKENS)}


def _tokens_beside(model: Any, config: TokenizerConfig) -> dict[str, int]:
    """Control pieces such as <s>, and the added tokens; ids of the latter are in the checkpoint's files."""
    control = {model.id_to_piece(token_id): token_id for token_id in _control_ids(model)}
    return control | {token.content: token_id for token_id, token in config.added_tokens.items()}


def _control_ids(model: Any) -> frozenset[int]:
    return frozenset(i for i in range(model.vocab_size()) if model.is_control(i))


def _special_pattern(beside: Mapping[str, int], is_chatglm: bool) -> re.Pattern[str] | None:
    """Matches special tokens in text, the longest where one begins with another."""
    if is_chatglm:
        return re.compile(_CHATGLM_PATTERN)
    texts = sorted(beside, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None
