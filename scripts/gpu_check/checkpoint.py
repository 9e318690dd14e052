"""A checkpoint of random weights in the shapes of a model, for whom speed is all that matters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.bench.kernels import ModelShape
from scripts.gpu_check.context import Context

MAX_LEN = 8192
_STANDARD_DEVIATION = 0.02
"""As transformers draws new weights: logits of random tokens then have a standard deviation of about 1."""


def random_checkpoint(context: Context) -> Path:
    """The folder of it, written if it is not there: one file for each layer, drawn on the device."""
    shape, num_layers = context.scale.shape, context.scale.num_layers
    name = f"{shape.hidden_size}x{num_layers}-{str(context.dtype).removeprefix('torch.')}"
    folder = context.folder / name
    if (folder / "model.safetensors.index.json").exists():
        return folder
    _check_room(context)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(context.device).manual_seed(0)
    places: dict[str, str] = {}
    for i, sizes in enumerate([*(_layer(shape, layer) for layer in range(num_layers)), _ends(shape)]):
        file = f"model-{i + 1:05d}-of-{num_layers + 1:05d}.safetensors"
        tensors = {name: _draw(size, context, generator).cpu() for name, size in sizes}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps(_config(shape, num_layers, context.dtype)))
    # Last, since its presence says that all of it is there.
    index = {"metadata": {"total_size": _num_bytes(context)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _num_bytes(context: Context) -> int:
    shape = context.scale.shape
    sizes = [*_ends(shape), *(size for i in range(context.scale.num_layers) for size in _layer(shape, i))]
    return sum(torch.Size(size).numel() for _, size in sizes) * context.dtype.itemsize


def _check_room(context: Context) -> None:
    context.folder.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(context.folder).free, _num_bytes(context)
    if free < needed:
        raise OSError(f"{context.folder} has {free / 1e9:.1f} GB free, the checkpoint takes {needed / 1e9:.1f} GB")


def _draw(size: tuple[int, ...], context: Context, generator: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=context.dtype, device=context.device)
    drawn = torch.empty(size, dtype=context.dtype, device=context.device)
    return drawn.normal_(0.0, _STANDARD_DEVIATION, generator=generator)


def _ends(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size)
    yield "model.norm.weight", (shape.hidden_size,)
    yield "lm_head.weight", (shape.vocab_size, shape.hidden_size)


def _layer(shape: ModelShape, i: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix, hidden, inner = f"model.layers.{i}", shape.hidden_size, shape.intermediate_size
    kv_size = shape.num_kv_heads * shape.head_dim
    yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
    yield f"{prefix}.self_attn.k_proj.weight", (kv_size, hidden)
    yield f"{prefix}.self_attn.v_proj.weight", (kv_size, hidden)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
    yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
    yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def _config(shape: ModelShape, num_layers: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": MAX_LEN,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "dtype": str(dtype).removeprefix("torch."),
    }
