"""A model's tokens as llguidance reads them: tokenizer.json, or else the bytes of each token."""

import llguidance

from headrace.errors import RequestError
from headrace.tokenizer import Tokenizer


class _TokenBytes:
    """What llguidance asks of a tokenizer that is not in tokenizer.json.

    Text that a grammar leaves no choice about is cut into tokens here, so that a model gets long ones: the longest that
    fits, each time. SentencePiece itself would begin the text with a space.
    """

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: frozenset[int], eos_token_id: int) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(special_ids)
        self._ids = {token: i for i, token in reversed(list(enumerate(tokens))) if token and i not in special_ids}
        self._max_length = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(text):
            lengths = range(min(self._max_length, len(text) - start), 0, -1)
            length = next((n for n in lengths if text[start : start + n] in self._ids), 0)
            if not length:
                break
            ids.append(self._ids[text[start : start + length]])
            start += length
        return ids


def make_ll_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> llguidance.LLTokenizer:
    """
    vocab_size: of the logits; the tokenizer may have more tokens or fewer.

    Raises:
        RequestError: llguidance cannot tell the bytes of this tokenizer's tokens.
    """
    source = tokenizer.vocabulary()
    num_tokens = max(vocab_size, tokenizer.vocab_size)
    try:
        if isinstance(source, str):
            return llguidance.LLTokenizer(source, n_vocab=num_tokens, eos_token=eos_token_id)
        tokens = source + [b""] * (num_tokens - len(source))
        wrapper = llguidance.TokenizerWrapper(_TokenBytes(tokens, tokenizer.special_ids, eos_token_id))
        return llguidance.LLTokenizer(wrapper, n_vocab=num_tokens, eos_token=eos_token_id)
    except ValueError as error:
        raise RequestError(
            f"structured outputs need the bytes of each token, which this tokenizer does not tell ({error!s:.200})"
        ) from None
