"""One output being generated, as the scheduler sees it: token ids and counters, no tensors."""

from dataclasses import dataclass, field
from enum import Enum

from headrace.config import Pooling, PoolingParams, SamplingParams


class SequenceStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    """STOP: a stop token or stop string, or the embedding is made; LENGTH: max_tokens or the model's length; ABORT: the
    client went away; ERROR: no token could be chosen, or no embedding made (numbers that are none)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
    """One of a request's `params.n` outputs, or a prompt that becomes an embedding.

    seed: names the stream of random draws that belongs to this sequence alone.
    forked_from: the sibling whose prompt this one repeats; it waits for the sibling's prefill and shares its blocks.
    pooling: how the prompt becomes an embedding; such a sequence generates nothing, whatever params say.
    num_tokens: of prompt and output.
    num_scheduled_tokens: tokens that are computed once all plans made so far have run; back to 0 on preemption.
    num_computed_tokens: those whose keys and values are known to be in the cache.
    num_cached_tokens: prompt tokens found in the cache at first admission instead of being computed.
    arrival: its place in line, which stays with it through preemptions.
    last_step: that was planned when it was preempted; chunks of its life before are in no later one.
    """

    seq_id: int
    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    forked_from: "Sequence | None" = None
    pooling: PoolingParams | None = None
    output_token_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    num_tokens: int = field(init=False)
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    arrival: int = 0
    last_step: int = 0
    is_known_to_ranks: bool = False

    def __post_init__(self) -> None:
        self.num_tokens = len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_tokens(self) -> int | None:
        """Tokens to generate; None is as many as fit."""
        return self.params.max_tokens if self.pooling is None else 0

    @property
    def needs_whole_prompt(self) -> bool:
        """Every prompt token's hidden state is asked for, so that none may be taken from the cache."""
        if self.pooling is not None:
            return self.pooling.pooling is Pooling.MEAN
        return self.params.prompt_logprobs is not None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids of positions start to stop, prompt and output as one row."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        output = self.output_token_ids[max(start - num_prompt, 0) : stop - num_prompt]
        return (*self.prompt_token_ids[start:num_prompt], *output)
