"""Turns documents into fixed-length rows of token ids with a loss weight per token."""

from __future__ import annotations

from itertools import chain, islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from scripts.demo_model.corpus import Corpus, Document, Mix
from scripts.demo_model.tokenizer import segments

DOCUMENTS_PER_PULL = 32


def encode(documents: list[Document], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Token ids and weights of the documents, one after another."""
    pieces = list(chain.from_iterable(segments(document) for document in documents))
    encodings = tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
    ids: list[int] = []
    weights: list[float] = []
    for encoding, (_, weight) in zip(encodings, pieces, strict=True):
        ids += encoding.ids
        weights += [weight] * len(encoding.ids)
    return ids, weights


def batch(
    tokenizer: Tokenizer, seed: int | str, rows: int, length: int, mix: Mix | None = None
) -> tuple[Tensor, Tensor]:
    """``[rows, length + 1]`` ids and weights packed without gaps from the corpus of ``seed``.

    Each step has a seed of its own, so a resumed run needs no reader state. Rows do not mask one document from the
    next: to the model, a row is one more conversation that changes its topic.
    """
    wanted = rows * (length + 1)
    stream = iter(Corpus(seed, mix))
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < wanted:
        more_ids, more_weights = encode(list(islice(stream, DOCUMENTS_PER_PULL)), tokenizer)
        ids += more_ids
        weights += more_weights
    shape = (rows, length + 1)
    return torch.tensor(ids[:wanted]).view(shape), torch.tensor(weights[:wanted]).view(shape)
