"""How near native attention comes to this machine's limits: reading memory while decoding, multiplying in a prefill.

The limits are measured in the same run. Caches rotate through copies larger than any cache of the machine. Bytes are
those of the keys and values that a step attends to, scales included; a causal prefill of n tokens is counted as
4 * head_dim * num_heads * n (n + 1) / 2 operations, on the peak of the multiplications it is made of.

    python scripts/bench_attention.py [--threads N] [--shapes gqa8] [--formats bfloat16,int8] [--schemes lazy]
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from headrace import _native
from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.kernels import AttentionSpec, KvCache, KvCacheSpec, SoftmaxSpec, cpu
from headrace.machine import cpu_limits, cpu_name

BLOCK_SIZE = 16
WORKING_SET_BYTES = 256 * 2**20
READ_BUFFER_BYTES = 512 * 2**20
MIN_CALLS, MIN_S = 5, 0.15
"""Best of at least so many calls, over at least so many seconds."""

_MULTIPLIES_AS = {
    KvCacheFormat.FLOAT32: _native.Format.FLOAT32,
    KvCacheFormat.BFLOAT16: _native.Format.BFLOAT16,
    # Two products of int8 for each multiplication: queries and probabilities have 14 bits.
    KvCacheFormat.INT8: _native.Format.INT8,
}
_DTYPES = {KvCacheFormat.FLOAT32: torch.float32}
_ELEMENT_BYTES = {KvCacheFormat.FLOAT32: 4, KvCacheFormat.BFLOAT16: 2, KvCacheFormat.INT8: 1}


@dataclass(frozen=True, kw_only=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "gqa8": Shape(num_heads=32, num_kv_heads=4, head_dim=64),  # TinyLlama-1.1B
    "mha": Shape(num_heads=32, num_kv_heads=32, head_dim=128),  # Llama-2-7B
    "gqa3": Shape(num_heads=9, num_kv_heads=3, head_dim=64),  # SmolLM-135M
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """New tokens at the end of a context, over several caches of the same random content."""

    shape: Shape
    cache_format: KvCacheFormat
    context_len: int
    num_new: int

    @property
    def kv_bytes(self) -> int:
        head_bytes = self.shape.head_dim * _ELEMENT_BYTES[self.cache_format]
        scale_bytes = 4 if self.cache_format is KvCacheFormat.INT8 else 0
        return 2 * self.context_len * self.shape.num_kv_heads * (head_bytes + scale_bytes)

    @property
    def num_ops(self) -> int:
        pairs = self.num_new * (2 * self.context_len - self.num_new + 1) // 2
        return 4 * self.shape.head_dim * self.shape.num_heads * pairs

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES.get(self.cache_format, torch.bfloat16)

    def random(self, num_tokens: int, num_heads: int) -> torch.Tensor:
        return torch.randn(num_tokens, num_heads, self.shape.head_dim).to(self.dtype)

    def make_caches(self, num_blocks: int) -> list[KvCache]:
        spec = KvCacheSpec(
            cache_format=self.cache_format,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
        )
        num_slots = spec.num_slots
        nothing = self.random(num_slots, 0)
        key, value = (self.random(num_slots, spec.num_kv_heads) for _ in range(2))
        caches = []
        for _ in range(-(-WORKING_SET_BYTES // self.kv_bytes)):
            cache = cpu.make_kv_cache(spec)
            cpu.RotaryStoreKv(cpu.best_target(), cpu.Stream())(
                nothing, key, value, cache, torch.arange(num_slots), None
            )
            caches.append(cache)
        return caches


def best_s(run: Callable[[int], object], num_copies: int) -> float:
    """Seconds of the fastest call run(copy), the copies in turn; what else the machine does meanwhile drops out."""
    best, num_calls, begin = float("inf"), 0, time.perf_counter()
    while num_calls < MIN_CALLS or time.perf_counter() - begin < MIN_S:
        start = time.perf_counter()
        run(num_calls % num_copies)
        best = min(best, time.perf_counter() - start)
        num_calls += 1
    return best


def time_schemes(target: str, problem: Problem, schemes: Iterable[SoftmaxScheme]) -> dict[SoftmaxScheme, float]:
    num_blocks = -(-problem.context_len // BLOCK_SIZE)
    caches = problem.make_caches(num_blocks)
    query = problem.random(problem.num_new, problem.shape.num_heads)
    # Blocks that lie in no order, as in an engine that has run for a while.
    tables = torch.randperm(num_blocks, dtype=torch.int32)[None]
    context_lens = torch.tensor([problem.context_len], dtype=torch.int32)
    bounds = torch.tensor([0, problem.num_new], dtype=torch.int32)
    attention = cpu.Attention(target, cpu.Stream())
    found = {}
    for scheme in schemes:
        spec = AttentionSpec(softmax_scale=problem.shape.head_dim**-0.5, softmax=SoftmaxSpec(scheme=scheme))

        def run(copy: int, spec: AttentionSpec = spec) -> object:
            return attention(query, caches[copy], tables, context_lens, bounds, spec)

        found[scheme] = best_s(run, len(caches))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cpu_limits().num_threads)
    parser.add_argument("--target", default=cpu.best_target(), choices=cpu.supported_targets())
    parser.add_argument("--shapes", default="gqa8,mha")
    parser.add_argument("--formats", default="bfloat16,int8")
    parser.add_argument("--schemes", default=",".join(scheme.value for scheme in SoftmaxScheme))
    parser.add_argument("--contexts", default="512,4096,32768")
    parser.add_argument("--prefill", default="512")
    args = parser.parse_args()
    cpu.set_num_threads(args.threads)
    read = _native.measure_read_bytes_per_s(args.target, READ_BUFFER_BYTES, 8)
    print(f"{cpu_name()}, {args.threads} threads, {args.target}; read {read / 1e9:.1f} GB/s")
    schemes = [SoftmaxScheme(name) for name in args.schemes.split(",")]
    formats = [KvCacheFormat(name) for name in args.formats.split(",")]
    lengths = [(int(n), 1) for n in args.contexts.split(",") if n] + [
        (int(n), int(n)) for n in args.prefill.split(",") if n
    ]
    for cache_format in formats:
        peak = _native.measure_ops_per_s(args.target, _MULTIPLIES_AS[cache_format], 60)
        peak /= 2 if cache_format is KvCacheFormat.INT8 else 1
        for name in args.shapes.split(","):
            for context_len, num_new in lengths:
                problem = Problem(
                    shape=SHAPES[name], cache_format=cache_format, context_len=context_len, num_new=num_new
                )
                for scheme, seconds in time_schemes(args.target, problem, schemes).items():
                    what = f"decode {context_len}" if num_new == 1 else f"prefill {context_len}"
                    rate = problem.kv_bytes / seconds
                    ops = problem.num_ops / seconds
                    limit = f"{rate / 1e9:6.1f} GB/s {rate / read:6.1%} of read"
                    if num_new > 1:
                        limit = f"{ops / 1e9:6.0f} GF/s {ops / peak:6.1%} of peak"
                    print(
                        f"{cache_format.value:9} {name:5} {what:14} {scheme.value:13} {seconds * 1e6:10.1f} us {limit}",
                        flush=True,
                    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
