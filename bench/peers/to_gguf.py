"""A Llama checkpoint of Hugging Face as a GGUF file, for measuring with token ids.

`python -m bench.peers.to_gguf folder model.gguf --type q4_0`. Needs gguf and numpy, no torch. The file has no
vocabulary unless `--vocabulary` asks for it: a server needs one to write its answers.
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


def write_gguf(folder: Path, output: Path, kind: str, *, has_vocabulary: bool = False) -> None:
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
    if has_vocabulary:
        _write_vocabulary(writer, config, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    else:
        writer.add_tokenizer_model("no_vocab")
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


def _write_vocabulary(writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """A byte-level BPE of `tokenizers`. llama.cpp cuts texts into words as GPT-2 does, whatever the file says of that:
    to measure with token ids it need not be the same."""
    model, kinds = tokenizer["model"], gguf.TokenType
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(tokenizer["decoder"]):
        raise SystemExit(f"the tokenizer is {model['type']}; only a byte-level BPE is written here")
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    names = {index: text for text, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(index, f"[unused {index}]") for index in range(size)])
    writer.add_token_types(
        [
            kinds.CONTROL if added.get(i, {}).get("special") else kinds.NORMAL if i in names else kinds.UNUSED
            for i in range(size)
        ]
    )
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]])
    writer.add_add_bos_token(False)
    for add, name in ((writer.add_bos_token_id, "bos_token_id"), (writer.add_eos_token_id, "eos_token_id")):
        token_id = config.get(name)
        if isinstance(token_id, int):
            add(token_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", default="q4_0", choices=["q4_0", "q8_0", "bf16"])
    parser.add_argument("--vocabulary", action="store_true", help="of the folder's tokenizer.json, for a server")
    args = parser.parse_args()
    write_gguf(args.folder, args.output, args.type, has_vocabulary=args.vocabulary)


if __name__ == "__main__":
    main()
