"""A Llama checkpoint of Hugging Face as a GGUF file without a vocabulary, for measuring with token ids.

`python -m bench.peers.to_gguf folder model.gguf --type q4_0`. Needs gguf and numpy, no torch.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_STORED_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a safetensors file in float32: a JSON header after its length, then the data."""
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(header_bytes))
    data = np.memmap(file, np.uint8, "r", offset=8 + header_bytes)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        stored = data[begin:end].view(_STORED_TYPES[entry["dtype"]])
        # The bits of a bfloat16 are the upper half of a float32's.
        values = (stored.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else stored
        yield name, values.astype(np.float32).reshape(entry["shape"])


def pair_rotary_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: dimensions i and i + head_dim / 2 side by side."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(folder: Path, output: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise SystemExit(f"{folder} is a {config['model_type']} model; only llama is written here")
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads", num_heads)
    heads = {"q_proj": num_heads, "k_proj": num_kv_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    matrix_type = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(output, "llama")
    _write_facts(writer, config, num_kv_heads)
    for file in sorted(folder.glob("*.safetensors")):
        for name, values in read_tensors(file):
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if values.ndim == 1:
                writer.add_tensor(target, values)
                continue
            projection = name.split(".")[-2]
            if projection in heads:
                values = pair_rotary_rows(values, heads[projection])
            writer.add_tensor(target, gguf.quants.quantize(values, matrix_type), raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_facts(writer: gguf.GGUFWriter, config: dict[str, Any], num_kv_heads: int) -> None:
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", default="q4_0", choices=["q4_0", "q8_0", "bf16"])
    args = parser.parse_args()
    write_gguf(args.folder, args.output, args.type)


if __name__ == "__main__":
    main()
