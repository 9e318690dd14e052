"""A Llama of few layers with random weights, whose messages are those of a model of some width."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN_SIZE = 2048
_LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM, _INTERMEDIATE, _VOCAB = 4, 8, 4, 64, 512, 512


def write_random_model(folder: Path) -> Path:
    """bfloat16, 4 layers of hidden size 2048: a row of activations has 4 KiB."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16) for name, shape in _shapes().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes() -> dict[str, tuple[int, ...]]:
    width, kv_width = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, HIDDEN_SIZE),
        "self_attn.k_proj": (kv_width, HIDDEN_SIZE),
        "self_attn.v_proj": (kv_width, HIDDEN_SIZE),
        "self_attn.o_proj": (HIDDEN_SIZE, width),
        "mlp.gate_proj": (_INTERMEDIATE, HIDDEN_SIZE),
        "mlp.up_proj": (_INTERMEDIATE, HIDDEN_SIZE),
        "mlp.down_proj": (HIDDEN_SIZE, _INTERMEDIATE),
        "input_layernorm": (HIDDEN_SIZE,),
        "post_attention_layernorm": (HIDDEN_SIZE,),
    }
    layers = {f"model.layers.{i}.{name}": shape for i in range(_LAYERS) for name, shape in layer.items()}
    others = {
        "model.embed_tokens": (_VOCAB, HIDDEN_SIZE),
        "model.norm": (HIDDEN_SIZE,),
        "lm_head": (_VOCAB, HIDDEN_SIZE),
    }
    return {f"{name}.weight": shape for name, shape in (layers | others).items()}
