"""One request from admission to its last update: its outputs, its times, its prompt's log probabilities."""

from collections.abc import Sequence as Sequences

import numpy as np
from numpy.typing import NDArray

from headrace.config import SamplingParams
from headrace.engine.load import LoadedModel
from headrace.engine.metrics import RequestMetrics
from headrace.engine.output_state import OutputState, decode_logprobs
from headrace.engine.outputs import CompletionChunk, RequestOutput, TokenLogprobs
from headrace.engine.plan import Embedding, PromptLogprobs, SampledToken
from headrace.engine.sequence import Sequence


class RequestState:
    """outputs: in the order of their indices. num_unfinished: of those. chunks: what has not been reported of them."""

    __slots__ = (
        "_embedding",
        "_metrics",
        "_prompt",
        "_prompt_logprobs",
        "_tokenizer",
        "chunks",
        "num_unfinished",
        "outputs",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        sequences: Sequences[Sequence],
        params: SamplingParams,
        model: LoadedModel,
        *,
        arrival_s: float,
    ) -> None:
        self.request_id = request_id
        self._prompt = prompt
        self._tokenizer = model.tokenizer
        self.outputs = tuple(
            [
                OutputState(index, sequence, model.tokenizer, model.eos_token_ids, model.plan.max_model_len)
                for index, sequence in enumerate(sequences)
            ]
        )
        self.num_unfinished = len(self.outputs)
        self.chunks: tuple[CompletionChunk, ...] = ()
        self._prompt_logprobs: dict[int, TokenLogprobs] | None = None if params.prompt_logprobs is None else {}
        self._embedding: NDArray[np.float32] | None = None
        num_prompt_tokens = sequences[0].num_prompt_tokens
        self._metrics = RequestMetrics(
            arrival_s=arrival_s, num_prompt_tokens=num_prompt_tokens, num_outputs=len(sequences)
        )

    def mark_scheduled(self, now_s: float) -> bool:
        """True the first time."""
        is_first = self._metrics.scheduled_s is None
        if is_first:
            self._metrics.scheduled_s = now_s
        return is_first

    def append(self, output: OutputState, token: SampledToken, now_s: float, *, is_complete: bool = False) -> None:
        """Take a token of one output. is_complete: nothing may follow it."""
        chunk = output.append(token, now_s, is_complete=is_complete)
        self.chunks += (chunk,)
        if chunk.itl_s is None and self._metrics.first_token_s is None:
            self._metrics.first_token_s = now_s
            chunk.ttft_s = self._metrics.ttft_s
        if chunk.finish_reason is not None:
            self.num_unfinished -= 1

    def take_embedding(self, output: OutputState, found: Embedding) -> None:
        """The prompt has been pooled, which is all that was asked for."""
        self._embedding = np.frombuffer(found.values, dtype=np.float32).copy()
        self.chunks += (output.stop(),)
        self.num_unfinished -= 1

    def fail(self, output: OutputState, error: str) -> None:
        self.chunks += (output.fail(error),)
        self.num_unfinished -= 1

    def fail_unfinished(self, error: str) -> None:
        for output in self.outputs:
            if output.finish_reason is None:
                self.fail(output, error)

    def abort(self) -> None:
        for output in self.outputs:
            if output.finish_reason is None:
                output.abort()
        self.num_unfinished = 0

    def add_prompt_logprobs(self, found: PromptLogprobs) -> None:
        """Keep the first output's: siblings share the prompt. A preempted prompt brings the same rows again."""
        if self._prompt_logprobs is not None and found.seq_id == self.outputs[0].sequence.seq_id:
            for position, row in enumerate(found.rows, start=found.start):
                self._prompt_logprobs[position] = decode_logprobs(row, self._tokenizer)

    def finish(self, *, now_s: float) -> RequestOutput:
        metrics = self._metrics
        metrics.finished_s = now_s
        metrics.num_completion_tokens = sum(len(output.output.token_ids) for output in self.outputs)
        sequences = [output.sequence for output in self.outputs]
        metrics.num_cached_tokens = sequences[0].num_cached_tokens
        metrics.num_preemptions = sum(sequence.num_preemptions for sequence in sequences)
        prompt_token_ids = list(sequences[0].prompt_token_ids)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[output.output for output in self.outputs],
            metrics=metrics,
            prompt_logprobs=self._all_prompt_logprobs(len(prompt_token_ids)),
            embedding=self._embedding,
        )

    def _all_prompt_logprobs(self, num_prompt_tokens: int) -> list[TokenLogprobs | None] | None:
        """One entry per prompt token; the first has nothing before it to be predicted from."""
        if self._prompt_logprobs is None:
            return None
        return [self._prompt_logprobs.get(position) for position in range(num_prompt_tokens)]
