"""Writes the trained model as a Hugging Face folder: bfloat16 safetensors, configuration and tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from scripts.demo_model.architecture import CausalLM, ModelShape
from scripts.demo_model.tokenizer import BEGIN, CHAT_TEMPLATE, END, PAD, ROLE_TOKENS


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids of the special tokens under the names that configuration files use."""
    names = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    return {name: tokenizer.token_to_id(token) for name, token in names.items()}


def model_config(shape: ModelShape, tokenizer: Tokenizer) -> dict[str, object]:
    """``config.json`` with the rotary base in both the older and the newer place."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **token_ids(tokenizer),
    }


def tokenizer_config(shape: ModelShape) -> dict[str, object]:
    """``tokenizer_config.json``; decoding must not tidy spaces, or text would not round-trip."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": list(ROLE_TOKENS.values()),
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(model: CausalLM, shape: ModelShape, tokenizer: Tokenizer, folder: Path) -> None:
    """Write all files of the package data; the tied output head is not stored a second time."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files that only their owner can read
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", model_config(shape, tokenizer))
    write_json(folder / "generation_config.json", {**token_ids(tokenizer), "do_sample": False, "max_new_tokens": 256})
    write_json(folder / "tokenizer_config.json", tokenizer_config(shape))
