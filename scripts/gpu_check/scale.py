"""How large everything is: as on a GPU, or small enough for any CPU to run all of the code."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.bench.kernels import SHAPES, ModelShape


@dataclass(frozen=True, kw_only=True)
class Scale:
    """shape: of the model and of all kernels; grouped: another one, of grouped heads, for attention.

    working_set_bytes: of the copies that calls take turns at; at least 4 times the L2 cache in any case.
    max_cache_bytes: of one cache in attention; what would take more is left out.
    decode, prefill: (batch, context) pairs; chunks: new tokens of a prompt, the last ones of its context.
    flex: the pairs for which FlexAttention is compiled, which takes seconds for each.
    min_s: of each measurement in each round.
    formats, model_formats: of weights, the one that they are not quantized to first.
    num_threads: of the host; None leaves it as it is.
    compile_backend: torch's; flashinfer: the module that is imported as FlashInfer if it is there.
    """

    shape: ModelShape
    grouped: ModelShape
    num_layers: int
    layers: tuple[str, ...]
    rows: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    flex: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int], ...]
    chunks: tuple[tuple[int, int], ...]
    model_prefill: tuple[int, ...]
    model_contexts: tuple[int, ...]
    model_batches: tuple[int, ...]
    model_steps: int
    ablation_contexts: tuple[int, ...]
    ablation_batches: tuple[int, ...]
    working_set_bytes: int
    read_buffer_bytes: int
    max_cache_bytes: int
    kv_cache_bytes: int
    num_rounds: int
    min_calls: int
    min_s: float
    formats: tuple[str, ...] = ("bfloat16", "int8", "int4")
    model_formats: tuple[str, ...] = ("bfloat16", "int8", "int4")
    num_threads: int | None = None
    heads: tuple[str, ...] = ("alike", "grouped")
    compile_backend: str = "inductor"
    flashinfer: str = "flashinfer"


_GROUPED = ModelShape(hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, vocab_size=128256)

FULL = Scale(
    shape=SHAPES["llama2-7b"],
    grouped=_GROUPED,
    num_layers=32,
    layers=("qkv", "o", "gate_up", "down", "lm_head"),
    rows=(1, 2, 4, 8, 16, 32, 64, 128),
    decode=(
        *((1, n) for n in (512, 1024, 2048, 4096, 8192, 16384, 32768)),
        *((8, n) for n in (512, 1024, 4096, 16384)),
        *((32, n) for n in (512, 1024, 4096)),
    ),
    flex=((1, 1024), (1, 4096), (1, 32768), (8, 4096)),
    prefill=((1, 128), (1, 512), (1, 1024), (1, 2048), (1, 4096), (1, 8192), (4, 1024)),
    chunks=((512, 4096), (512, 32768), (2048, 32768)),
    model_prefill=(128, 256, 512, 1024, 2048, 4096),
    model_contexts=(512, 3072),
    model_batches=(1, 2, 4, 8, 16, 32),
    model_steps=48,
    ablation_contexts=(512, 3072),
    ablation_batches=(4, 16),
    working_set_bytes=256 * 2**20,
    read_buffer_bytes=2 * 2**30,
    max_cache_bytes=10 * 2**30,
    kv_cache_bytes=6 * 2**30,
    num_rounds=3,
    min_calls=24,
    min_s=0.01,
)

_TINY = ModelShape(hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=2, vocab_size=160)

DRY = Scale(
    shape=_TINY,
    grouped=ModelShape(hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1, vocab_size=160),
    num_layers=1,
    layers=("down",),
    rows=(1, 2),
    decode=((2, 19),),
    flex=((2, 19), (1, 19)),
    prefill=((1, 19),),
    chunks=((5, 19),),
    model_prefill=(9,),
    model_contexts=(9,),
    model_batches=(),
    model_steps=1,
    ablation_contexts=(9,),
    ablation_batches=(),
    working_set_bytes=1,
    read_buffer_bytes=2**16,
    max_cache_bytes=2**20,
    kv_cache_bytes=2**22,
    num_rounds=1,
    min_calls=1,
    min_s=0.0,
    formats=("float32", "int4"),
    model_formats=("float32",),
    num_threads=1,
    heads=("grouped",),
    compile_backend="eager",
    flashinfer="scripts.gpu_check.flashinfer_stand_in",
)
