"""What ranks that share a context do with their queries, and with their shares of attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.kernels.ops import AttentionShare


def join_heads(parts: Sequence[Tensor]) -> Tensor:
    """The heads of all parts side by side, those of the first part first.

    Shapes:
        parts:   [num_tokens, part_heads, head_dim] each
        returns: [num_tokens, len(parts) * part_heads, head_dim]
    """
    return torch.cat(list(parts), dim=1)


def weigh_share(
    share: AttentionShare, normalizers: Sequence[Tensor], rank: int, *, dtype: torch.dtype, num_parts: int = 1
) -> Tensor:
    """What this rank adds to softmax(logits) V: the sum over ranks is it.

    2^(m - M) numerator / sum over ranks of 2^(m_i - M) denominator_i, M the largest of the references m_i (the softmax
    state and its merge: FlashDecoding++, arXiv:2311.01282, Eq. 2, over ranks instead of chunks).

    normalizers: of each rank, as `share.normalizers`; this one's is that of `rank`.
    num_parts: heads are dealt out in so many parts, one after another, each for one rank.

    Shapes: returns [num_parts, num_tokens, num_heads / num_parts, head_dim]
    """
    denominators, references = torch.stack(list(normalizers)).unbind(-1)
    largest = references.amax(0)
    # A state without any weight refers to 0: infinity - infinity is not a number.
    weights = torch.exp2(references - largest.masked_fill(largest.isneginf(), 0.0))
    scaled = share.numerators * (weights[rank] / (weights * denominators).sum(0))[..., None]
    num_tokens, _, head_dim = scaled.shape
    return scaled.to(dtype).view(num_tokens, num_parts, -1, head_dim).transpose(0, 1).contiguous()
