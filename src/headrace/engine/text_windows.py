"""Long text as prompts that a model can take."""

from collections.abc import Iterator, Sequence

from headrace.engine.load import LoadedModel

_MAX_WINDOW_TOKENS = 2048
"""Who looks at attention logits needs memory that grows with the square of a window."""


def token_windows(model: LoadedModel, texts: Sequence[str]) -> Iterator[list[int]]:
    """Each text cut into pieces that leave room for one new token; special tokens stand where the text begins."""
    assert model.tokenizer is not None, "it was required"
    size = max(1, min(_MAX_WINDOW_TOKENS, model.plan.max_model_len - 1))
    for text in texts:
        token_ids = model.tokenizer.encode(text)
        yield from (token_ids[start : start + size] for start in range(0, len(token_ids), size))
