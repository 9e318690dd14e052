"""How near the native linear kernels come to this machine's limits, beside torch's F.linear.

The limits are measured in the same run: reading a large buffer, and multiplying what never leaves the L1 cache. Weights
rotate through copies larger than any cache. For integer weights torch's column is bfloat16, the best it offers for the
same matrix.

    python scripts/bench_linear.py [--threads N] [--formats int4,bfloat16] [--rows 1,8,512] [--target avx2]
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace import _native
from headrace.config import WeightFormat
from headrace.kernels import PackedWeight, cpu, reference
from headrace.machine import cpu_limits, cpu_name

SHAPES = {
    "qkv": (2560, 2048),
    "o": (2048, 2048),
    "gate_up": (11264, 2048),
    "down": (2048, 5632),
    "lm_head": (32000, 2048),
}
"""[N, K] of TinyLlama-1.1B, q, k and v fused, gate and up fused."""

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
WORKING_SET_BYTES = 256 * 2**20
READ_BUFFER_BYTES = 512 * 2**20
MIN_CALLS, MIN_S = 5, 0.15
"""Best of at least so many calls, over at least so many seconds."""

_MULTIPLIES_AS = {
    WeightFormat.FLOAT32: _native.Format.FLOAT32,
    WeightFormat.BFLOAT16: _native.Format.BFLOAT16,
    WeightFormat.INT8: _native.Format.INT8,
    WeightFormat.INT4: _native.Format.INT8,  # the dot products are those of int8
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    bytes_per_s: float
    ops_per_s: dict[WeightFormat, float]


def measure_limits(target: str) -> Limits:
    kinds = {kind: _native.measure_ops_per_s(target, kind, 60) for kind in _MULTIPLIES_AS.values()}
    return Limits(
        bytes_per_s=_native.measure_read_bytes_per_s(target, READ_BUFFER_BYTES, 8),
        ops_per_s={f: kinds[kind] for f, kind in _MULTIPLIES_AS.items()},
    )


def best_s(run: Callable[[int], object], num_copies: int) -> float:
    """Seconds of the fastest call run(copy), the copies in turn; what else the machine does meanwhile drops out."""
    best, num_calls, begin = float("inf"), 0, time.perf_counter()
    while num_calls < MIN_CALLS or time.perf_counter() - begin < MIN_S:
        start = time.perf_counter()
        run(num_calls % num_copies)
        best = min(best, time.perf_counter() - start)
        num_calls += 1
    return best


def packed_copies(weight_format: WeightFormat, matrix: Tensor) -> list[PackedWeight]:
    num_copies = -(-WORKING_SET_BYTES // cpu.weight_num_bytes(weight_format, *matrix.shape))
    is_integer = weight_format in (WeightFormat.INT8, WeightFormat.INT4)
    quantized = reference.quantize_rows(matrix, weight_format) if is_integer else None
    copies = []
    for _ in range(num_copies):
        builder = cpu.make_weight_builder(weight_format, *matrix.shape)
        if quantized is not None:
            builder.write_quantized(0, *quantized)
        else:
            builder.write(0, matrix)
        weight = builder.build()
        assert isinstance(weight, PackedWeight)
        copies.append(weight)
    return copies


def table(target: str, formats: Iterable[WeightFormat], rows: Iterable[int], limits: Limits) -> Iterable[str]:
    yield (
        f"{'format':9} {'shape':8} {'[N, K]':14} {'M':>4} {'us':>9} {'GB/s':>6} {'of read':>7} "
        f"{'Gop/s':>6} {'of peak':>7} {'torch us':>9} {'torch / ours':>12}"
    )
    linear = cpu.Linear(target, cpu.Stream())
    for weight_format in formats:
        dtype = torch.float32 if weight_format is WeightFormat.FLOAT32 else torch.bfloat16
        for name, (n, k) in SHAPES.items():
            matrix = torch.randn(n, k)
            packed = packed_copies(weight_format, matrix)
            dense = [matrix.to(dtype).clone() for _ in range(-(-WORKING_SET_BYTES // (n * k * dtype.itemsize)))]
            for m in rows:
                x = torch.randn(m, k, dtype=dtype)
                ours_s = best_s(lambda i, x=x, packed=packed: linear(x, packed[i]), len(packed))
                torch_s = best_s(lambda i, x=x, dense=dense: F.linear(x, dense[i]), len(dense))
                bytes_per_s, ops_per_s = packed[0].num_bytes / ours_s, 2 * m * n * k / ours_s
                yield (
                    f"{weight_format.value:9} {name:8} {f'[{n}, {k}]':14} {m:4} {ours_s * 1e6:9.1f} "
                    f"{bytes_per_s / 1e9:6.1f} {bytes_per_s / limits.bytes_per_s:7.0%} "
                    f"{ops_per_s / 1e9:6.0f} {ops_per_s / limits.ops_per_s[weight_format]:7.0%} "
                    f"{torch_s * 1e6:9.1f} {torch_s / ours_s:12.2f}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=cpu_limits().num_threads)
    parser.add_argument("--target", default=cpu.best_target(), choices=cpu.supported_targets())
    parser.add_argument("--formats", default="int4,int8,bfloat16,float32")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    args = parser.parse_args()
    cpu.set_num_threads(args.threads)
    limits = measure_limits(args.target)
    print(f"{cpu_name()}, {args.threads} threads, {args.target}, torch {torch.__version__}")
    print(f"read {limits.bytes_per_s / 1e9:.1f} GB/s; ", end="")
    print(", ".join(f"{f.value} {ops / 1e9:.0f} Gop/s" for f, ops in limits.ops_per_s.items()))
    formats = [WeightFormat(name) for name in args.formats.split(",")]
    with torch.inference_mode():
        for line in table(args.target, formats, [int(m) for m in args.rows.split(",")], limits):
            print(line, flush=True)


if __name__ == "__main__":
    main()
