"""A model's tokens as llguidance reads them: tokenizer.json, or else the bytes of each token."""

import llguidance

from headrace.errors import RequestError
from headrace.tokenizer import Tokenizer


class _TokenBytes:
    """What llguidance asks of a tokenizer that is not in tokenizer.json."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)


def make_ll_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> llguidance.LLTokenizer:
    """
    vocab_size: of the logits; the tokenizer may have more tokens or fewer.

    Raises:
        RequestError: llguidance cannot tell the bytes of this tokenizer's tokens.
    """
    vocabulary = tokenizer.vocabulary()
    source = (
        vocabulary
        if isinstance(vocabulary, str)
        else llguidance.TokenizerWrapper(_TokenBytes(tokenizer, vocabulary, eos_token_id))
    )
    try:
        return llguidance.LLTokenizer(source, n_vocab=max(vocab_size, tokenizer.vocab_size), eos_token=eos_token_id)
    except ValueError as error:
        raise RequestError(
            f"structured outputs need the bytes of each token, which this tokenizer does not tell ({error!s:.200})"
        ) from None
