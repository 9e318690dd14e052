"""One output on its way to the caller: tokens become text, text and tokens meet the stop conditions."""

from collections.abc import Sequence as Tokens

from headrace.config import SamplingParams
from headrace.engine.outputs import CompletionChunk, CompletionOutput, Logprob, TokenLogprobs
from headrace.engine.plan import SampledToken, TokenLogprob
from headrace.engine.sequence import FinishReason, Sequence
from headrace.tokenizer import IncrementalDetokenizer, StopStringMatcher, Tokenizer

_NONE: frozenset[int] = frozenset()


class OutputState:
    """Owns an output's text and decides when it ends. Knows nothing about steps, blocks or other requests.

    output: whole once it has ended, but for logprobs, which grow. Its tokens are the sequence's, which has each before
        `append` is told of it.
    """

    __slots__ = (
        "_detokenizer",
        "_eos_token_ids",
        "_index",
        "_is_watched",
        "_last_token_s",
        "_matcher",
        "_max_tokens",
        "_num_tokens",
        "_params",
        "_stop_token_ids",
        "_texts",
        "_tokenizer",
        "finish_reason",
        "output",
        "sequence",
    )

    def __init__(
        self,
        index: int,
        sequence: Sequence,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        params = sequence.params
        self.sequence = sequence
        self.output = CompletionOutput(index=index, logprobs=None if params.logprobs is None else [])
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._num_tokens = 0
        self._texts: list[str] = []
        self._last_token_s: float | None = None
        self._params: SamplingParams = params
        self._eos_token_ids = _NONE if params.ignore_eos else eos_token_ids
        # One set for all outputs, where they add nothing to it.
        own = params.stop_token_ids
        self._stop_token_ids = self._eos_token_ids.union(own) if own else self._eos_token_ids
        room = max_model_len - sequence.num_prompt_tokens
        self._max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self._tokenizer = tokenizer
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, sequence.prompt_token_ids, params.skip_special_tokens)
            if tokenizer
            else None
        )
        self._matcher = StopStringMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None
        # There is more to each token than its text.
        self._is_watched = self._matcher is not None or params.logprobs is not None

    def append(self, token: SampledToken, now_s: float, *, is_complete: bool = False) -> CompletionChunk:
        """Take a sampled token; the chunk has a finish_reason if it was the last.

        is_complete: nothing may follow it.
        """
        token_id = token.token_id
        self._num_tokens = num_tokens = self._num_tokens + 1
        if self._is_watched or is_complete or num_tokens >= self._max_tokens or token_id in self._stop_token_ids:
            chunk = self._append_and_check(token, is_complete=is_complete)
        else:
            # Most tokens: nothing ends here, and nothing is held back.
            text = "" if self._detokenizer is None else self._detokenizer.append(token_id)
            self._texts.append(text)
            chunk = CompletionChunk(self._index, text, (token_id,))
        if self._last_token_s is not None:
            chunk.itl_s = now_s - self._last_token_s
        self._last_token_s = now_s
        return chunk

    def stop(self) -> CompletionChunk:
        """End an output that no token is sampled for."""
        self._end(FinishReason.STOP)
        return self._chunk(0, ())

    def fail(self, error: str) -> CompletionChunk:
        before = len(self._texts)
        self._flush()
        self.output.error = error
        self._end(FinishReason.ERROR)
        return self._chunk(before, ())

    def abort(self) -> None:
        self._flush()
        self._end(FinishReason.ABORT)

    def _append_and_check(self, token: SampledToken, *, is_complete: bool) -> CompletionChunk:
        before, token_id = len(self._texts), token.token_id
        reason = self._check_token(token_id)
        is_silent = reason is FinishReason.STOP and not self._params.include_stop_str_in_output
        if is_complete:
            # Before "length" too, which would say that something is missing.
            reason = FinishReason.STOP
        if self._take_text(token_id, is_silent=is_silent, is_last=reason is not None):
            reason = FinishReason.STOP
        if reason is not None:
            self._end(reason)
        chunk = self._chunk(before, (token_id,))
        if self.output.logprobs is not None:
            chunk.logprobs = (decode_logprobs(token.logprobs, self._tokenizer),)
            self.output.logprobs.extend(chunk.logprobs)
        return chunk

    def _check_token(self, token_id: int) -> FinishReason | None:
        """Why the token may be the last one, whatever its text."""
        if token_id in self._stop_token_ids and self._num_tokens >= self._params.min_tokens:
            if token_id not in self._eos_token_ids:
                self.output.stop_reason = token_id
            return FinishReason.STOP
        return FinishReason.LENGTH if self._num_tokens >= self._max_tokens else None

    def _take_text(self, token_id: int, *, is_silent: bool, is_last: bool) -> bool:
        """Release the text that is final; true if a stop string ended it. A stop token itself has no text."""
        if self._detokenizer is None:
            return False
        is_stopped = not is_silent and self._release(self._detokenizer.append(token_id))
        return is_stopped or (is_last and self._flush())

    def _release(self, text: str) -> bool:
        """Put text that is final into the output, less what may be part of a stop string; true if one ended it."""
        if self._matcher is None:
            self._texts.append(text)
            return False
        check = self._matcher.append(text, enabled=self._num_tokens >= self._params.min_tokens)
        self._texts.append(check.text)
        if check.stop is not None:
            self.output.stop_reason = check.stop
        return check.stop is not None

    def _flush(self) -> bool:
        """Release what was held back, as nothing follows; true if that completes a stop string."""
        is_stopped = self._detokenizer is not None and self._release(self._detokenizer.finish())
        if self._matcher is not None:
            self._texts.append(self._matcher.flush())
        return is_stopped

    def _end(self, reason: FinishReason) -> None:
        output = self.output
        self.finish_reason, output.finish_reason = reason, reason.value
        output.text = "".join(self._texts)
        output.token_ids = self.sequence.output_token_ids[: self._num_tokens]

    def _chunk(self, before: int, token_ids: tuple[int, ...]) -> CompletionChunk:
        """before: texts that were released earlier."""
        output = self.output
        return CompletionChunk(
            index=output.index,
            text="".join(self._texts[before:]),
            token_ids=token_ids,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )


def decode_logprobs(entries: Tokens[TokenLogprob], tokenizer: Tokenizer | None) -> TokenLogprobs:
    """By token id, with each token's own text."""
    return {
        entry.token_id: Logprob(
            logprob=entry.logprob,
            rank=entry.rank,
            decoded_token=tokenizer.decode([entry.token_id], skip_special_tokens=False) if tokenizer else "",
        )
        for entry in entries
    }
