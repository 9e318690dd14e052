"""What sampling asks of rows of logits."""

import torch
from torch import Tensor


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first id of each row's largest logit, and that logit. NaN counts as largest.

    Shapes:
        logits:  [num_rows, vocab_size] float32
        returns: ids [num_rows] int64, values [num_rows] float32
    """
    # torch documents that its argmax gives the first of equals.
    ids = logits.argmax(dim=-1)
    return ids, logits.gather(1, ids.unsqueeze(1)).squeeze(1)


def log_sum_exp(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))) of each row, by way of its largest logit: [num_rows] float32; where that is NaN or
    infinite, so is the result."""
    return torch.logsumexp(logits.double(), dim=-1).float()


def top_k(logits: Tensor, k: int) -> Tensor:
    """Ids of each row's k largest logits, or of all if there are fewer; largest first, equals by id.

    Shapes:
        logits:  [num_rows, vocab_size] float32 without NaN
        returns: [num_rows, min(k, vocab_size)] int64
    """
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
