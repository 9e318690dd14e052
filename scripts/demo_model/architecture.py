"""A Llama decoder for training, written out in plain PyTorch.

Parameter names and shapes are those of ``transformers.LlamaForCausalLM``, so a ``state_dict`` is a checkpoint: the
inference engine never sees this module, and agreement between the two is tested through the exported files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of the network. The defaults give 3.7 M parameters, 7.3 MB in bfloat16."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02


def rotary_tables(shape: ModelShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position * theta**(-2i / head_dim)``, each ``[length, head_dim]``, halves repeated."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding in the half-split layout of Hugging Face checkpoints."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query causal self-attention."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        query_size = shape.num_attention_heads * shape.head_dim
        key_value_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden_size, bias=False)

    def split_heads(self, states: Tensor, heads: int) -> Tensor:
        return states.view(*states.shape[:2], heads, self.shape.head_dim).transpose(1, 2)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        groups = shape.num_attention_heads // shape.num_key_value_heads
        query = self.split_heads(self.q_proj(hidden), shape.num_attention_heads)
        key = self.split_heads(self.k_proj(hidden), shape.num_key_value_heads)
        value = self.split_heads(self.v_proj(hidden), shape.num_key_value_heads).repeat_interleave(groups, dim=1)
        query = rotate(query, cos, sin).to(value.dtype)
        key = rotate(key, cos, sin).to(value.dtype).repeat_interleave(groups, dim=1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden)))


class DecoderLayer(nn.Module):
    """Pre-normalised residual block."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))


class Decoder(nn.Module):
    """Embedding, the layers and the final norm: everything but the output head."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        cos, sin = rotary_tables(self.shape, input_ids.shape[1])
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return cast(Tensor, self.norm(hidden))


class CausalLM(nn.Module):
    """The decoder with its embedding reused as output head (``tie_word_embeddings``)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.model = Decoder(shape)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=initial_deviation(name, shape))

    def forward(self, input_ids: Tensor) -> Tensor:
        return functional.linear(self.model(input_ids), self.model.embed_tokens.weight)


def initial_deviation(name: str, shape: ModelShape) -> float:
    """Projections that write to the residual stream start smaller by ``sqrt(2 * layers)``, as in GPT-2."""
    writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return shape.initializer_range / ((2 * shape.num_hidden_layers) ** 0.5 if writes_residual else 1.0)
