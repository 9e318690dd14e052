"""Rotary position embedding."""

from torch import Tensor


def rotary_table(positions: Tensor, inv_freq: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """amplitude * cos and sin of position * inv_freq, the product rounded to float32.

    Shapes:
        positions: [num_tokens] int64
        inv_freq:  [half] float32
        returns:   two tensors [num_tokens, half] float32
    """
    angles = positions.float()[:, None] * inv_freq
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> None:
    """Rotate pairs of the first 2 * half entries of each head, in place (RoFormer, arXiv:2104.09864).

    (a, b) becomes (a cos - b sin, b cos + a sin), for the pairs (x[i], x[i + half]), or (x[2i], x[2i + 1]) if
    interleaved; entries past 2 * half stay.

    Shapes:
        x:        [num_tokens, num_heads, head_dim]
        cos, sin: [num_tokens, half] float32
    """
    half = cos.shape[-1]
    rotated = x[..., : 2 * half]
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = first.float(), second.float()
    # Both products before either write: a and b may be views of x.
    rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
    first.copy_(rotated_a)
    second.copy_(rotated_b)
