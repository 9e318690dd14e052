"""How long a sequence may be, so that whatever is admitted can run to its end even alone."""

from dataclasses import dataclass

from headrace.costs.memory import num_blocks_for
from headrace.errors import ContextLengthError, RequestError


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """A model's length, and the blocks of the cache. All of it may be asked from any thread."""

    max_model_len: int
    num_blocks: int
    block_size: int

    @property
    def max_num_tokens(self) -> int:
        """Of one sequence, prompt and output: the model's length, or what the cache holds."""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)

    def check_fits(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse what could not run alone, so that whatever is admitted can end. May be called from any thread.

        max_tokens: 0 for a prompt that nothing is generated from; None for as many as fit.

        Raises:
            RequestError: the prompt is empty.
            ContextLengthError: prompt and output are too long for the model or the cache.
        """
        if num_prompt_tokens == 0:
            raise RequestError("the prompt has 0 tokens; give at least one token to continue from")
        max_prompt_tokens = self.max_model_len - (max_tokens != 0)
        if num_prompt_tokens > max_prompt_tokens:
            what = "prompt and output together" if max_tokens != 0 else "it"
            raise ContextLengthError(
                f"the prompt has {num_prompt_tokens} tokens, but {what} may have "
                f"{self.max_model_len} (max_model_len); shorten the prompt to at most {max_prompt_tokens} tokens"
            )
        max_num_tokens = self.max_model_len
        if max_tokens is not None:
            max_num_tokens = min(max_num_tokens, num_prompt_tokens + max_tokens)
        # The last token is sampled but never run, so it needs no room.
        num_needed = num_blocks_for(max(max_num_tokens - 1, num_prompt_tokens), self.block_size)
        if num_needed > self.num_blocks:
            raise self._does_not_fit(num_prompt_tokens, max_num_tokens, num_needed)

    def _does_not_fit(self, num_prompt_tokens: int, max_num_tokens: int, num_needed: int) -> ContextLengthError:
        num_blocks, block_size = self.num_blocks, self.block_size
        max_output_tokens = num_blocks * block_size + 1 - num_prompt_tokens
        remedy = (
            f"set max_tokens to at most {max_output_tokens}"
            if max_output_tokens >= 1
            else f"shorten the prompt to at most {num_blocks * block_size} tokens"
        )
        return ContextLengthError(
            f"a prompt of {num_prompt_tokens} tokens and up to {max_num_tokens - num_prompt_tokens} output tokens need "
            f"{num_needed} KV cache blocks of {block_size} tokens, but the cache has {num_blocks}; "
            f"{remedy}, or give the cache more memory (kv_cache_bytes)"
        )
