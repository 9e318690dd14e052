"""Tiny random checkpoints of every family, written by transformers, whose models are the oracle.

A recipe's weights are drawn so that the model is decisive: a wide initializer, and norms and biases that differ from
their neutral values, so that a forgotten one changes the logits.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headrace.batch import ForwardBatch
from headrace.cache.kv_pool import KvPool
from headrace.config import Dtype, KvCacheFormat, LoadConfig, ParallelConfig, Quantize
from headrace.engine.rows import Row, build_forward_batch
from headrace.kernels import KernelChoice, Kernels, KvCacheSpec, kernel_choice_from, resolve_kernels
from headrace.layers.context import LayerContext
from headrace.models.decoder import Decoder
from headrace.models.loading import Progress
from headrace.models.source import ModelSource, load_decoder, open_model, resolve_formats
from headrace.parallel.group import Group, OneRankGroup

transformers.utils.logging.disable_progress_bar()

VOCAB_SIZE = 211
MAX_LEN = 128
WINDOW = 7
"""Sliding window of every recipe that has one: far shorter than the prompts."""

BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}

OPT_BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LEN,
    "init_std": 0.3,
    "dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """name: the pytest id. kind: the transformers model, X for XConfig and XForCausalLM.

    adapt: changes the oracle model before it is used. finish: rewrites the folder that transformers has written.
    """

    name: str
    architecture: str
    kind: str
    settings: dict[str, Any]
    seed: int = 0
    adapt: Callable[[nn.Module], None] = field(default=lambda model: None)
    finish: Callable[[Path], None] = field(default=lambda folder: None)

    def make_model(self) -> Any:
        """The oracle: a transformers model in float32."""
        config_class = getattr(transformers, _CONFIG_NAMES.get(self.kind, f"{self.kind}Config"))
        torch.manual_seed(self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(transformers, f"{self.kind}ForCausalLM")(config_class(**self.settings)).eval()
        self.adapt(model)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
        return model

    def write(self, folder: Path) -> Any:
        """Write the checkpoint; returns the oracle."""
        model = self.make_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
        self.finish(folder)
        return model


_CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


def _recipe(
    name: str, kind: str, /, *, seed: int = 0, adapt: Callable[[Any], None] = lambda model: None, **changes: Any
) -> Recipe:
    settings = (OPT_BASE if kind == "OPT" else BASE) | changes
    return Recipe(name=name, architecture=f"{kind}ForCausalLM", kind=kind, settings=settings, seed=seed, adapt=adapt)


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}


# ChatGLM2, ChatGLM3 and the first GLM-4 are code that their repositories ship, not a model of transformers. Their
# arithmetic is that of transformers' Glm; names, fused tensors and config keys are those of the published checkpoints.


def _as_chatglm(folder: Path, **published: Any) -> None:
    config = read_config(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = dict(_chatglm_tensors(tensors, config["num_hidden_layers"]))
    # The published files carry the rotary frequencies, which nobody reads.
    renamed["transformer.rotary_pos_emb.inv_freq"] = torch.ones(config["head_dim"] // 4)
    for file in folder.glob("*"):
        file.unlink()
    save_file(renamed, folder / "model.safetensors")
    write_config(folder, _chatglm_config(config) | published)


def _chatglm_tensors(tensors: dict[str, Tensor], num_layers: int) -> list[tuple[str, Tensor]]:
    """(published name, tensor) for each tensor that transformers' Glm has in `tensors`."""
    renamed = [
        ("transformer.embedding.word_embeddings.weight", tensors["model.embed_tokens.weight"]),
        ("transformer.output_layer.weight", tensors["lm_head.weight"]),
    ]
    renamed += _with_prefix(tensors, "model.norm", "transformer.encoder.final_layernorm")
    for i in range(num_layers):
        ours, theirs = f"model.layers.{i}", f"transformer.encoder.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            renamed += _with_prefix(tensors, f"{ours}.{norm}", f"{theirs}.{norm}")
        for suffix in ("weight", "bias"):
            parts = [tensors[f"{ours}.self_attn.{p}_proj.{suffix}"] for p in "qkv"]
            renamed.append((f"{theirs}.self_attention.query_key_value.{suffix}", torch.cat(parts)))
        renamed += _with_prefix(tensors, f"{ours}.self_attn.o_proj", f"{theirs}.self_attention.dense")
        renamed += _with_prefix(tensors, f"{ours}.mlp.gate_up_proj", f"{theirs}.mlp.dense_h_to_4h")
        renamed += _with_prefix(tensors, f"{ours}.mlp.down_proj", f"{theirs}.mlp.dense_4h_to_h")
    return renamed


def _with_prefix(tensors: dict[str, Tensor], ours: str, theirs: str) -> list[tuple[str, Tensor]]:
    names = [f"{ours}.{suffix}" for suffix in ("weight", "bias")]
    return [(name.replace(ours, theirs), tensors[name]) for name in names if name in tensors]


def _chatglm_config(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of the published chatglm3-6b config.json, with this model's sizes."""
    return {
        "_name_or_path": "THUDM/chatglm3-6b",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["ChatGLMModel"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": config["intermediate_size"],
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": config["hidden_size"],
        "kv_channels": config["head_dim"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "model_type": "chatglm",
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "num_attention_heads": config["num_attention_heads"],
        "num_layers": config["num_hidden_layers"],
        "original_rope": True,
        "padded_vocab_size": config["vocab_size"],
        "post_layer_norm": True,
        "pre_seq_len": None,
        "quantization_bit": 0,
        "rmsnorm": True,
        "seq_length": config["max_position_embeddings"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _chatglm(
    name: str,
    *,
    architecture: str = "ChatGLMModel",
    adapt: Callable[[nn.Module], None] = lambda model: None,
    rope: dict[str, Any] | None = None,
    seed: int = 0,
    published: dict[str, Any],
    **changes: Any,
) -> Recipe:
    rope_parameters = _rope("default") | {"partial_rotary_factor": 0.5} | (rope or {})
    settings = BASE | {"head_dim": 16, "attention_bias": True, "rope_parameters": rope_parameters} | changes
    published = {"architectures": [architecture]} | published
    return Recipe(
        name=name,
        architecture=architecture,
        kind="Glm",
        settings=settings,
        seed=seed,
        adapt=adapt,
        finish=partial(_as_chatglm, **published),
    )


def _use_layer_norms_and_biases(model: Any) -> None:
    """What ChatGLM's config can ask for and no published checkpoint does: biases all over, layer norm, no last norm."""
    config = model.config
    for layer in model.model.layers:
        layer.input_layernorm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        layer.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        for module in (layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    model.model.norm = nn.Identity()
    model.lm_head.weight.data.mul_(0.1)


def _shrink_logits(model: Any) -> None:
    model.model.decoder.project_out.weight.data.mul_(0.1)


def _let_sublayers_speak(model: Any) -> None:
    """Scaled, tied embeddings drown random sublayers: such a model repeats its last token whatever came before."""
    model.model.embed_tokens.weight.data.mul_(0.1)
    model.model.norm.weight.data.add_(9.0)


RECIPES = (
    _recipe("llama", "Llama", num_key_value_heads=4),
    _recipe("llama-gqa", "Llama", seed=2),
    _recipe("llama-one-kv-head", "Llama", num_key_value_heads=1),
    _recipe("llama-biases", "Llama", attention_bias=True, mlp_bias=True),
    _recipe("llama-tied", "Llama", seed=4, tie_word_embeddings=True),
    _recipe("llama-head-dim", "Llama", seed=6, head_dim=24),
    _recipe(
        "llama-rope-llama3",
        "Llama",
        seed=1,
        rope_parameters=_rope(
            "llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    _recipe("llama-rope-linear", "Llama", seed=2, rope_parameters=_rope("linear", factor=4.0)),
    _recipe("llama-rope-dynamic", "Llama", seed=2, rope_parameters=_rope("dynamic", factor=4.0)),
    _recipe(
        "llama-rope-yarn",
        "Llama",
        seed=1,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    _recipe("mistral-window", "Mistral", sliding_window=WINDOW),
    _recipe("mistral-head-dim", "Mistral", seed=3, sliding_window=WINDOW, head_dim=24),
    _recipe("mistral-null-window", "Mistral", seed=2, sliding_window=None),
    _recipe("qwen2", "Qwen2"),
    _recipe(
        "qwen2-window",
        "Qwen2",
        seed=5,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        num_hidden_layers=3,
    ),
    _recipe("qwen2-window-off", "Qwen2", use_sliding_window=False, sliding_window=WINDOW, max_window_layers=1),
    _recipe("qwen3", "Qwen3", head_dim=32),
    _recipe("qwen3-tied-biases", "Qwen3", head_dim=24, tie_word_embeddings=True, attention_bias=True),
    _recipe(
        "qwen3-window",
        "Qwen3",
        seed=2,
        head_dim=32,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    _recipe("opt", "OPT", seed=1),
    _recipe(
        "opt-350m",
        "OPT",
        adapt=_shrink_logits,
        seed=1,
        init_std=0.6,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
    ),
    _recipe("opt-no-bias", "OPT", enable_bias=False),
    _chatglm("chatglm2", published={"_name_or_path": "THUDM/chatglm2-6b"}, num_attention_heads=8, head_dim=8),
    _chatglm(
        "chatglm2-32k",
        seed=5,
        rope={"rope_type": "linear", "factor": 4.0},
        published={"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 4},
    ),
    _chatglm("chatglm3", published={}),
    _chatglm("chatglm3-32k", rope={"rope_theta": 500000.0}, published={"rope_ratio": 50}),
    _chatglm(
        "glm-4-9b",
        rope={"rope_theta": 5000000.0},
        published={"_name_or_path": "THUDM/glm-4-9b", "rope_ratio": 500, "num_hidden_layers": 2},
        rms_norm_eps=1.5625e-7,
        num_key_value_heads=1,
    ),
    _chatglm(
        "chatglm-biases-layer-norm",
        adapt=_use_layer_norms_and_biases,
        published={"add_bias_linear": True, "add_qkv_bias": False, "rmsnorm": False, "post_layer_norm": False},
    ),
    _chatglm(
        "chatglm-conditional-generation",
        architecture="ChatGLMForConditionalGeneration",
        published={},
    ),
    _recipe("glm", "Glm", head_dim=16),
    _recipe("glm-no-bias", "Glm", head_dim=32, attention_bias=False),
    _recipe("glm4", "Glm4", head_dim=16, attention_bias=True),
    _recipe("glm4-no-bias", "Glm4", seed=1, head_dim=32, attention_bias=False),
    _recipe(
        "gemma2",
        "Gemma2",
        seed=5,
        adapt=_let_sublayers_speak,
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=7.0,
        num_hidden_layers=3,
    ),
    _recipe(
        "gemma2-no-caps",
        "Gemma2",
        adapt=_let_sublayers_speak,
        head_dim=24,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
    _recipe(
        "gemma3",
        "Gemma3",
        adapt=_let_sublayers_speak,
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        num_hidden_layers=7,
    ),
    _recipe(
        "gemma3-stretched",
        "Gemma3",
        seed=4,
        adapt=_let_sublayers_speak,
        head_dim=24,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        num_hidden_layers=7,
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": _rope("linear", rope_theta=1e6, factor=8.0),
            "sliding_attention": _rope("default", rope_theta=20000.0),
        },
    ),
    _recipe("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    _recipe("mixtral-window", "Mixtral", seed=4, num_local_experts=3, num_experts_per_tok=1, sliding_window=WINDOW),
    _recipe(
        "qwen3-moe",
        "Qwen3Moe",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        num_hidden_layers=3,
    ),
    _recipe(
        "qwen3-moe-raw-probabilities",
        "Qwen3Moe",
        seed=4,
        head_dim=24,
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        decoder_sparse_step=2,
        norm_topk_prob=False,
    ),
)

BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it: other names for dtype and rope, no layer types."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = config.get("dtype") or config.get("torch_dtype")
    if config["architectures"] == ["Qwen3MoeForCausalLM"] and "num_local_experts" in old:
        old["num_experts"] = old.pop("num_local_experts")
    rope = config.get("rope_parameters")
    if rope is None:
        return old
    full = rope.get("full_attention", rope)
    if "sliding_attention" in rope:
        pattern = config["layer_types"].index("full_attention") + 1
        old |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": pattern}
    return old | _old_rope(full)


def _old_rope(rope: dict[str, Any]) -> dict[str, Any]:
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] == "default":
        return old
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "partial_rotary_factor")}
    # The first ones wrote "type", later ones "rope_type".
    name = "rope_type" if rope["rope_type"] == "llama3" else "type"
    return old | {"rope_scaling": {name: rope["rope_type"], **scaling}}


HAS_NATIVE = any(row.implementation == "cpu" for row in resolve_kernels(KernelChoice.AUTO).explain())
EACH_KERNELS = pytest.mark.parametrize(
    "kernels",
    [
        KernelChoice.REFERENCE,
        pytest.param(
            KernelChoice.CPU, marks=pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
        ),
    ],
    ids=lambda choice: choice.value,
)


def load(
    source: ModelSource,
    *,
    dtype: Dtype = Dtype.FLOAT32,
    quantize: Quantize = Quantize.NONE,
    kernels: Kernels | KernelChoice | None = None,
    group: Group | None = None,
    parallel: ParallelConfig | None = None,
    max_model_len: int = MAX_LEN,
    progress: Progress = lambda num_bytes: None,
) -> Decoder:
    """The decoder of a folder that `open_model` has read, as one rank of `group` holds it.

    kernels: those an engine would take if None.
    """
    if not isinstance(kernels, Kernels):
        kernels = resolve_kernels(kernels or kernel_choice_from())
    parallel = parallel or ParallelConfig()
    context = LayerContext(kernels=kernels, tp_group=group or OneRankGroup(), parallel=parallel)
    formats = resolve_formats(source, LoadConfig(model=str(source.folder), dtype=dtype, quantize=quantize))
    return load_decoder(source, context, formats, max_model_len=max_model_len, progress=progress)


def one_rank_context(kernels: Kernels | None = None) -> LayerContext:
    """kernels: those an engine would take if None."""
    return LayerContext(kernels=kernels or resolve_kernels(kernel_choice_from()), tp_group=OneRankGroup())


def load_folder(folder: Path, **settings: Any) -> Decoder:
    return load(open_model(folder), **settings)


def run(decoder: Decoder, batch: ForwardBatch, pool: KvPool) -> Tensor:
    """Logits of every token of a batch."""
    with torch.inference_mode():
        return decoder.compute_logits(decoder.forward(batch, pool.layers))


def make_pool(
    decoder: Decoder, *, num_blocks: int, block_size: int, num_kv_heads: int | None = None, dtype=torch.float32
):
    config = decoder.config
    spec = KvCacheSpec(
        cache_format=KvCacheFormat(str(dtype).removeprefix("torch.")),
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=num_kv_heads or config.attention.num_kv_heads,
        head_dim=config.attention.head_dim,
    )
    kernels = decoder.kernels
    pool = KvPool(kernels, spec, num_layers=config.num_hidden_layers)
    # Whatever is read without having been written shows up in the logits.
    nothing = torch.full((spec.num_slots, spec.num_kv_heads, spec.head_dim), torch.nan)
    for layer in pool.layers:
        kernels.rotary_store_kv_(nothing[:, :0], nothing, nothing, layer, torch.arange(spec.num_slots), None)
    return pool


def prompt_logits(
    decoder: Decoder, token_ids: Sequence[int], *, block_size: int = 16, dtype=torch.float32, num_kv_heads=None
) -> Tensor:
    """[len(token_ids), vocab_size]: one forward pass over a whole prompt, in blocks that lie in no order."""
    num_blocks = -(-len(token_ids) // block_size)
    order = torch.randperm(num_blocks + 3, generator=torch.Generator().manual_seed(0))[:num_blocks].int().numpy()
    pool = make_pool(decoder, num_blocks=num_blocks + 3, block_size=block_size, num_kv_heads=num_kv_heads, dtype=dtype)
    batch = build_forward_batch([Row(token_ids=tuple(token_ids), start=0, block_table=order)], block_size)
    return run(decoder, batch, pool)


def random_tokens(count: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
