"""What one rank keeps of a sequence, from the plan that brings it to the one that says it has left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from headrace.engine.block_table import BlockTable
from headrace.engine.plan import NewSequence, ScheduledChunk
from headrace.engine.rows import Row
from headrace.engine.sampler import SamplingRow


@dataclass(kw_only=True, slots=True)
class WorkerSequence:
    """What a rank keeps of a live sequence.

    sampling: what the sampler sees of the sequence; its output_token_ids are the list here, which grows.
    """

    new: NewSequence
    num_prompt_tokens: int
    scores_prompt: bool
    output_token_ids: list[int]
    sampling: SamplingRow
    block_table: BlockTable = field(default_factory=BlockTable)

    @classmethod
    def of(cls, new: NewSequence, eos_token_ids: frozenset[int]) -> Self:
        output_token_ids: list[int] = []
        sampling = SamplingRow(
            seq_id=new.seq_id,
            params=new.params,
            seed=new.seed,
            prompt_token_ids=new.prompt_token_ids,
            output_token_ids=output_token_ids,
            eos_token_ids=eos_token_ids,
        )
        return cls(
            new=new,
            num_prompt_tokens=len(new.prompt_token_ids),
            scores_prompt=new.params.prompt_logprobs is not None,
            output_token_ids=output_token_ids,
            sampling=sampling,
        )

    def row(self, chunk: ScheduledChunk) -> Row:
        """The chunk's tokens and the table that it lies in, brought up to date."""
        _, start, num_tokens, new_block_ids, resets_blocks, _ = chunk
        if resets_blocks:
            self.block_table.clear()
        if new_block_ids:
            self.block_table.extend(new_block_ids)
        num_prompt_tokens, stop = self.num_prompt_tokens, start + num_tokens
        token_ids: Sequence[int]
        if start >= num_prompt_tokens:
            token_ids = self.output_token_ids[start - num_prompt_tokens : stop - num_prompt_tokens]
        else:
            output = self.output_token_ids[: max(stop - num_prompt_tokens, 0)]
            token_ids = (*self.new.prompt_token_ids[start:stop], *output)
        return Row(token_ids, start, self.block_table.ids)
