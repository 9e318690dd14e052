"""A chat model of 40 thousand random weights, made in milliseconds without transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_tokenizers import byte_level_bpe, write_folder

_HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM = 32, 64, 2, 4, 2, 8
_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def write_tiny_model(folder: Path, *, chat_template: str | None = _TEMPLATE, with_tokenizer: bool = True) -> Path:
    """A Llama of float32 weights with a context of 8192 tokens."""
    tokenizer = byte_level_bpe()
    folder.mkdir(parents=True, exist_ok=True)
    if with_tokenizer:
        template = {} if chat_template is None else {"chat_template": chat_template}
        write_folder(folder, tokenizer, **template)
    vocab_size = tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "vocab_size": vocab_size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(vocab_size), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def num_parameters(vocab_size: int) -> int:
    return sum(tensor.numel() for tensor in _weights(vocab_size).values())


def _weights(vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (vocab_size, _HIDDEN),
    }
    for i in range(_LAYERS):
        prefix = f"model.layers.{i}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (_HEADS * _HEAD_DIM, _HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (_HIDDEN, _HEADS * _HEAD_DIM),
            f"{prefix}.mlp.gate_proj.weight": (_INTERMEDIATE, _HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (_INTERMEDIATE, _HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (_HIDDEN, _INTERMEDIATE),
            f"{prefix}.input_layernorm.weight": (_HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (_HIDDEN,),
        }
    return {
        name: torch.ones(shape) if len(shape) == 1 else 0.5 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
