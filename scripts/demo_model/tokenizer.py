"""The byte-level BPE tokenizer: its training, its special tokens and its chat template.

Digits are split singly, because a model can learn to add column by column only where a column is a token.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scripts.demo_model.corpus import Document, document_text, documents

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (PAD, BEGIN, END, *ROLE_TOKENS.values())

CHAT_TEMPLATE = (
    "{{- '<|begin|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(seed: int, vocab_size: int, document_count: int = 20_000) -> Tokenizer:
    """Train on the first documents of the corpus; the byte alphabet makes every string encodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(map(document_text, documents(seed, document_count)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def segments(document: Document) -> list[tuple[str, float]]:
    """The rendered document in pieces, each with the loss weight of its tokens.

    What the user says counts a little, so that the model has a sensible likelihood for whole conversations; the
    operands of a sum and the names in a question cannot be predicted and would drown the rest at full weight.
    """
    if document.text:
        return [(BEGIN, 0.0), (document.text + END, 1.0)]
    pieces = [(BEGIN, 0.0)]
    for turn in document.turns:
        weight = 1.0 if turn.role == "assistant" else 0.1
        pieces += [(ROLE_TOKENS[turn.role], 0.1), (turn.content + END, weight)]
    return pieces
