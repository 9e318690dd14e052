"""Text from a growing sequence of tokens, one token at a time."""

from collections.abc import Sequence

from headrace.tokenizer.byte_tokens import REPLACEMENT
from headrace.tokenizer.tokenizer import Tokenizer

# Tokens decoded with each new one. UTF-8 falls into step again within 3 bytes, and a token in the window is at least
# one, so that a window cut anywhere has the right text at its end; the rest is room for leading white space.
_CONTEXT_TOKENS = 8


class IncrementalDetokenizer:
    """Streams the text of output tokens, as a continuation of the prompt.

    Decodes a short window of the latest tokens again for each new one and releases what has been added: constant cost
    per token, however long the output. Where the tokenizer only joins bytes, a token of whole characters that follows
    whole characters needs no window. A character that is not complete yet ends in U+FFFD; that one character is held
    until the next token completes it or shows that it never will be.

    Invariant: text released so far + `finish()` == decode(prompt + output) without decode(prompt). A character begun by
    the prompt's last tokens and completed by the output counts as output.
    """

    __slots__ = (
        "_incomplete_prompt",
        "_num_released",
        "_skip_special_tokens",
        "_skipped_ids",
        "_text",
        "_tokenizer",
        "_window",
    )

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if self._is_visible(token_id):
                self._window.insert(0, token_id)
            if len(self._window) == _CONTEXT_TOKENS:
                break
        self._text = self._decode()
        self._num_released = len(self._text)
        self._incomplete_prompt = self._text if self._text.endswith(REPLACEMENT) else ""

    def append(self, token_id: int) -> str:
        """Take the next output token and return the text that is now final."""
        if token_id in self._skipped_ids:
            return ""
        if self._num_released == len(self._text) and not self._incomplete_prompt:
            whole_text = self._tokenizer.whole_text(token_id)
            if whole_text is not None:
                self._window, self._text, self._num_released = [token_id], whole_text, len(whole_text)
                return whole_text
        if not self._tokenizer.has_token(token_id):
            return ""
        self._window.append(token_id)
        self._text = self._decode()
        if self._incomplete_prompt:
            self._compare_with_prompt()
        num_final = len(self._text) - self._text.endswith(REPLACEMENT)
        new_text = self._text[self._num_released : num_final]
        self._num_released = max(self._num_released, num_final)
        if len(self._window) > 2 * _CONTEXT_TOKENS:
            self._shorten_window()
        return new_text

    def finish(self) -> str:
        """The output is complete: release what was held."""
        held = self._text[self._num_released :]
        self._num_released = len(self._text)
        return held

    def _is_visible(self, token_id: int) -> bool:
        return token_id not in self._skipped_ids and self._tokenizer.has_token(token_id)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special_tokens)

    def _compare_with_prompt(self) -> None:
        """Find out whether U+FFFD at the prompt's end was the beginning of a character."""
        if not self._text.startswith(self._incomplete_prompt):
            self._num_released -= 1
            self._incomplete_prompt = ""
        elif len(self._text) > len(self._incomplete_prompt):
            self._incomplete_prompt = ""

    def _shorten_window(self) -> None:
        num_held = len(self._text) - self._num_released
        del self._window[:-_CONTEXT_TOKENS]
        self._text = self._decode()
        self._num_released = len(self._text) - num_held
