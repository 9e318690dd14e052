"""Whose kernels are measured alone: the sizes of some models, as their kernels see them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a Llama-like model that its kernels see."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of each linear layer: q, k and v fused, gate and up fused."""
        heads = self.num_heads + 2 * self.num_kv_heads
        return {
            "qkv": (heads * self.head_dim, self.hidden_size),
            "o": (self.hidden_size, self.hidden_size),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
            "lm_head": (self.vocab_size, self.hidden_size),
        }


SHAPES = {
    "smollm-135m": ModelShape(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, vocab_size=32000),
    "tinyllama-1.1b": ModelShape(
        hidden_size=2048, intermediate_size=5632, num_heads=32, num_kv_heads=4, vocab_size=32000
    ),
    "llama2-7b": ModelShape(hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, vocab_size=32000),
}
